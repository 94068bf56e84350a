"""The highest learning rate that a method bears while something is held fixed by hand: python -m
experiments.interventions NAME --config configs/stability.py:tiny,placement=span --out runs/interventions

What was only seen is no cause. Each NAME holds one thing after every update of the library's own step; `none` holds
nothing. The rates are bisected as a sweep's (`spannorm_jax.report.ceilings`), one run after another: the same command
goes on. Runs lie in OUT/NAME, and `spannorm_jax.report OUT/NAME --ladder ... --seeds N` reads them. What the config has
an option for needs no intervention: `sweep ceiling_factor local --config.model.qk_norm=true`, or optim.b2=0.99.

  hold_norm    each branch's output projection has, block by block, the norm that it began with; the option
               optim.hold_norms=attn_out,ffn_out does the same without bisecting
  cap_norm     that norm stays below twice what it began with
  clip_blocks  no block's weights move by more than 3% of their norm in an update
  unit_embed   each token's embedding has a mean square of one, as a norm without gains would give it
"""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from experiments.record import about, save_record
from spannorm_jax.command import Parser, run_command
from spannorm_jax.config import replace
from spannorm_jax.config_file import load, split_overrides
from spannorm_jax.errors import UserError, did_you_mean
from spannorm_jax.model.definition import ModelDef
from spannorm_jax.model.stack import STACKS
from spannorm_jax.parallel.rank import ProcessFlags
from spannorm_jax.parallel.xla_options import xla_options
from spannorm_jax.paths import user_path
from spannorm_jax.report.ceilings import bracket, interval_text
from spannorm_jax.report.folders import read_run
from spannorm_jax.report.runs import FAILED
from spannorm_jax.run.folder import DIVERGED
from spannorm_jax.sweep.definition import ladder
from spannorm_jax.sweep.expansion import folder_name
from spannorm_jax.training.flags import Flags
from spannorm_jax.training.loop import train
from spannorm_jax.training.session import Session
from spannorm_jax.training.signal import block_squares
from spannorm_jax.training.step import train_step

STOPPED, CAP, LARGEST_MOVE = 75, 2.0, 0.03
OUTPUTS = ("attn_out", "ffn_out")
# (model, weights at the start, before and after an update) -> weights after it
Intervention = Callable[[ModelDef, Any, Any, Any], Any]


def scaled_norms(scale: Callable[[Array], Array], model: ModelDef, first: Any, before: Any, after: Any) -> Any:
    """Output projections, each layer's times `scale` of its norm over the first one."""

    def held(spec: Any, w0: Array, w: Array) -> Array:
        if spec.site not in OUTPUTS:
            return w
        axes = tuple(range(1, w.ndim))
        ratio = jnp.sqrt(jnp.sum(w**2, axes, keepdims=True) / jnp.sum(w0**2, axes, keepdims=True))
        return w * jnp.where(ratio > 0, scale(ratio), 1.0)

    return model.map_weights(held, first, after)


def clip_blocks(model: ModelDef, first: Any, before: Any, after: Any) -> Any:
    """Updates, each block's with its norm at most `LARGEST_MOVE` of the block's weights'."""
    moved = jax.tree.map(jnp.subtract, after, before)
    ratio_L = jnp.sqrt(block_squares(model, moved) / block_squares(model, before))
    factor_L = jnp.minimum(1.0, LARGEST_MOVE / jnp.maximum(ratio_L, 1e-30))
    clipped = {}
    for name, weights in after.items():
        if name not in STACKS.values():
            clipped[name] = weights
            continue
        own = factor_L[jnp.array(model.weights[name]["attn"]["q"].layers)]
        clipped[name] = jax.tree.map(
            lambda w, d, own=own: w + d * own.reshape(-1, *[1] * (d.ndim - 1)), before[name], moved[name]
        )
    return clipped


def unit_embed(model: ModelDef, first: Any, before: Any, after: Any) -> Any:
    """Weights, each row of the embedding (V x D) with a mean square of one."""
    return after | {"embed": after["embed"] * jax.lax.rsqrt(jnp.mean(after["embed"] ** 2, axis=-1, keepdims=True))}


INTERVENTIONS: dict[str, Intervention] = {
    "none": lambda model, first, before, after: after,
    "hold_norm": functools.partial(scaled_norms, lambda ratio: 1 / ratio),
    "cap_norm": functools.partial(scaled_norms, lambda ratio: jnp.minimum(1.0, CAP / ratio)),
    "clip_blocks": clip_blocks,
    "unit_embed": unit_embed,
}


def with_intervention(intervention: Intervention, session: Session) -> Session:
    """The session, whose step is followed by the intervention."""
    config, model, mesh, program = session.config, session.model, session.mesh, session.program
    rows = config.training.batch_size // config.training.num_microbatches
    step = functools.partial(train_step, config, model, session.task.loss_sums(config, dict(mesh.shape), rows))

    def changed(state: Any, batch: Any, numbers: Any) -> tuple[Any, Any]:
        after, metrics = step(state, batch, numbers)
        first = model.init(jax.random.key(config.seed))  # drawn again in each step: so a run goes on after a kill
        return dataclasses.replace(after, params=intervention(model, first, state.params, after.params)), metrics

    shardings, batch = (jax.tree.map(lambda x: x.sharding, x) for x in (program.abstract_state, program.abstract_batch))
    replicated = NamedSharding(mesh, PartitionSpec())
    jitted = jax.jit(
        changed,
        in_shardings=(shardings, batch, replicated),
        out_shardings=(shardings, replicated),
        donate_argnums=0,
        compiler_options=xla_options(mesh),
    )
    return dataclasses.replace(session, program=dataclasses.replace(program, train=jitted))


def main(argv: list[str]) -> int:
    rest, overrides = split_overrides(argv)
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", metavar="NAME", help=", ".join(INTERVENTIONS))
    parser.add_argument("--config", required=True, help="FILE.py or FILE.py:arg")
    parser.add_argument("--out", required=True, type=user_path, help="folder of all interventions")
    parser.add_argument("--seeds", type=int, default=3, help="with which a rate has to train (default %(default)s)")
    parser.add_argument("--least", type=float, default=3e-4, help="rate of the ladder (default %(default)s)")
    parser.add_argument("--greatest", type=float, default=1e-1, help="rate of the ladder (default %(default)s)")
    args = parser.parse_args(rest)
    if args.name not in INTERVENTIONS:
        raise UserError(f"no intervention {args.name!r}; {did_you_mean(args.name, INTERVENTIONS)}")
    if not (0 < args.least < args.greatest <= 1e3 * args.least and args.seeds > 0):
        raise UserError("the ladder needs 0 < --least < --greatest <= 1000 x --least, and --seeds 1 or more")
    config, rates = load(args.config, overrides), ladder(args.least, args.greatest)
    change = functools.partial(with_intervention, INTERVENTIONS[args.name])
    outcomes: dict[str, str] = {}
    trained: dict[tuple[int, int], bool] = {}
    while wanted := bracket(len(rates), args.seeds, lambda *at: trained.get(at)).wanted:
        rung, seed = wanted[0]
        one = replace(config, optim__lr=rates[rung], seed=seed)
        workdir: Path = args.out / args.name / folder_name(one)
        flags = Flags(argv, stop_code=STOPPED, module="experiments.interventions")
        ended = (workdir / DIVERGED).exists()  # `train` itself passes over a run that is done
        if not ended and train(one, workdir, flags, ProcessFlags(), change) == STOPPED:
            sys.exit(STOPPED)
        outcomes[workdir.name] = read_run(workdir).outcome
        trained[rung, seed] = outcomes[workdir.name] not in FAILED

    low, high, _ = bracket(len(rates), args.seeds, lambda *at: trained.get(at))
    ends = [rates[rung] if 0 <= rung < len(rates) else None for rung in (low, high)]
    print(f"{args.name}: ceiling {interval_text(*ends)}")
    record = about("experiments.interventions", argv) | {"held": args.name, "ceiling": ends, "outcomes": outcomes}
    path = args.out / f"{args.name}.json"
    try:
        save_record(path, record)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; mend that and repeat, the runs are done") from error
    return 0


if __name__ == "__main__":
    run_command(main)
