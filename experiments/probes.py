"""What an update does to a model: probes of cells whose ceiling a sweep finds, and runs watched step by step.

    python -m experiments.probes probe ceiling_placements
    python -m experiments.probes watch --config configs/stability.py:tiny,placement=span \
        --config.training.steps=250 --rates 0.008,0.0115

`probe` takes a cell at its initial weights, and after `STEPS` steps of its own recipe at the rate `PROBE_LR`, alike
for all. Its next update, per unit of the learning rate, is a direction along which the weights are moved by each of
`RATES`. So nothing of a probe depends on what the cell bears. `watch` trains at each rate for the first `WATCH[-1]`
steps of the run, and measures the model and its next update at each of `WATCH`. Both have seed 0, write a line each
into experiments/results/stability, and go on where they were.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from experiments.record import about, append_record, read_records
from experiments.stability_records import PROBES, RATES, STEPS, WATCHED, cell_name, read_probes
from spannorm_jax.analysis import blocks
from spannorm_jax.analysis.sharpness import sharpness
from spannorm_jax.analysis.tracked import run_block
from spannorm_jax.command import Parser, run_command
from spannorm_jax.config import Config, replace
from spannorm_jax.config_file import load, split_overrides
from spannorm_jax.errors import UserError, did_you_mean
from spannorm_jax.parallel.platform import start_jax
from spannorm_jax.sweep.bisection import cells_of
from spannorm_jax.sweep.expansion import expand
from spannorm_jax.training.batches import batches_of
from spannorm_jax.training.flags import Flags
from spannorm_jax.training.optimizer import learning_rate
from spannorm_jax.training.session import Session, open_session
from spannorm_jax.training.task import Batch

PROBE_LR, ROWS = 2e-3, 8
WATCH = (0, 5, 10, 15, 20, 25, 30, 35, 40, 50, 60, 80, 100)
SHARP = (20,)  # of WATCH: where sharpness is measured too, which takes as long as all the rest
_VERBS = ("probe", "watch")
Measure = Callable[[Any, Any], tuple[dict[str, float], np.ndarray]]


def held_out_rows(session: Session) -> Batch:
    sample = session.task.sample(session.data.eval, session.config.data.seq_len, ROWS, "ROWS")
    return jax.tree.map(jnp.asarray, sample)


def measure_of(session: Session) -> Measure:
    """(params, model_state) -> numbers over `ROWS` held-out rows, and the logits less their mean over the vocabulary.

    loss               nats a token
    token_correlation  of what the head reads (docs/signal.md)
    attenuation        sum of log(1 + f) over all branches: minus the log of the share that the entry has in the stream,
                       where every sum is normed
    """
    task, model, rows = session.task, session.model, held_out_rows(session)

    def shares(block: Any, stream: Any, layer: Array, angles: Any, _: None) -> tuple[Any, Array, None]:
        attn, ffn = (lambda x: block.attn(x, angles)), (lambda x: block.feed_forward(x)[0])
        behind, additions = run_block(block, stream, layer, attn, ffn)
        f = [blocks.mean_square(each.added) / blocks.mean_square(each.skip) for each in additions.values()]
        return behind, sum(map(jnp.log1p, f), jnp.zeros(())), None

    @jax.jit
    def numbers(params: Any, model_state: Any) -> tuple[dict[str, Array], Array]:
        bound = model.bind(params, model_state)
        passed = bound.run(task.inputs(rows), shares)
        scalars = {
            "loss": blocks.mean_nll(bound, passed.features, task.targets(rows)),
            "token_correlation": blocks.token_correlation(passed.features),
            "attenuation": jnp.sum(passed.ys),
        }
        logits = bound.logits(passed.features).astype(jnp.float32)
        return scalars, (logits - jnp.mean(logits, axis=-1, keepdims=True)).reshape(-1, logits.shape[-1])

    def measured(params: Any, model_state: Any) -> tuple[dict[str, float], np.ndarray]:
        scalars, logits = jax.device_get(numbers(params, model_state))
        return {key: _rounded(value) for key, value in scalars.items()}, np.asarray(logits, np.float64)

    return measured


def changes(old: np.ndarray, new: np.ndarray) -> dict[str, float]:
    """How far logits have moved, over what they were.

    `token_change` has them less their mean over all tokens: what the model says of a token beyond the frequencies.
    """
    of_tokens = [logits - logits.mean(axis=0) for logits in (old, new)]
    pairs = {"logits_change": (old, new), "token_change": of_tokens}
    return {key: _rounded(np.linalg.norm(b - a) / np.linalg.norm(a)) for key, (a, b) in pairs.items()}


def _rounded(value: Any) -> float:
    return float(f"{float(value):.6g}")


@contextmanager
def _training(config: Config, lr: float, steps: int) -> Iterator[tuple[Session, Any, Any]]:
    """(session, its first state, its batches) of a run at a rate with seed 0, for its first `steps` steps."""
    start_jax(config.platform)
    session = open_session(replace(config, optim__lr=lr, seed=0), Path("not written"), Flags([]))
    with jax.set_mesh(session.mesh), closing(batches_of(session, range(1, steps + 1))) as batches:
        yield session, session.program.init(session.config.seed), batches


_copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))  # of a state that the step then takes
_moved = jax.jit(lambda params, update, rate: jax.tree.map(lambda w, u: w + rate * u, params, update))


def probe(config: Config, steps: int) -> dict[str, list[float]]:
    """The numbers of `measure_of` and `changes` along the update after so many steps, at 0 and at each of RATES.

    `token_step` is `token_change` from the rate before, and zero at the first.
    """
    with _training(config, PROBE_LR, steps + 1) as (session, state, batches):
        program, numbers = session.program, session.numbers
        for _ in range(steps):
            state, _ = program.train(state, next(batches), numbers)
        before, model_state = _copy((state.params, state.model_state))
        after, _ = program.train(state, next(batches), numbers)
        rate = learning_rate(session.config.optim.schedule, numbers, steps + 1)
        update = jax.tree.map(lambda new, old: (new - old) / rate, after.params, before)
        measured = measure_of(session)
        each = [measured(_moved(before, update, rate), model_state) for rate in (0.0, *RATES)]
    lines = [scalars | changes(each[0][1], logits) for scalars, logits in each]
    steps_between = [changes(old, new)["token_change"] for (_, old), (_, new) in itertools.pairwise(each)]
    return {key: [line[key] for line in lines] for key in lines[0]} | {"token_step": [0.0, *steps_between]}


def watch(config: Config, lr: float) -> list[dict[str, float]]:
    """At each of WATCH the numbers of `measure_of`, and the `changes` by the next update; at SHARP also
    `over_the_edge`, the preconditioned sharpness over its bound at that update's rate (docs/signal.md)."""
    found: list[dict[str, float]] = []
    with _training(config, lr, WATCH[-1] + 1) as (session, state, batches):
        measured, rows = measure_of(session), held_out_rows(session)
        for step in range(WATCH[-1] + 1):
            edge = {}
            if step in SHARP:
                sharp = sharpness(session.config, state.params, state.model_state, state.opt_state, rows)
                edge["over_the_edge"] = _rounded(sharp["preconditioned_sharpness"] / sharp["sharpness_bound"])
            old = measured(state.params, state.model_state) if step in WATCH else None
            state, _ = session.program.train(state, next(batches), session.numbers)
            if old:
                new = measured(state.params, state.model_state)
                found.append({"step": step} | old[0] | changes(old[1], new[1]) | edge)
    return found


def _probe_all(names: str, argv: list[str]) -> None:
    sweeps, done = [expand(name, "cpu") for name in names.split(",")], read_probes()
    for sweep in (sweep for sweep in sweeps if not sweep.bisects):
        raise UserError(f"sweep {sweep.names} bisects nothing, so that it has no ceilings to be probed for")
    for cell in {cell_name(cell): cell for sweep in sweeps for cell in cells_of(sweep)}.values():
        for steps in (steps for steps in (0, STEPS) if (cell_name(cell), steps) not in done):
            numbers = probe(cell.rungs[0][0].config, steps)
            facts = about("experiments.probes", argv) | {"lr": PROBE_LR, "seed": 0, "rates": RATES}
            append_record(PROBES, facts | {"cell": cell_name(cell), "title": cell.title, "steps": steps, **numbers})
            print(f"{cell.title}: after {steps} steps", flush=True)


def _watch_all(spec: str, overrides: list[tuple[str, str]], rates: list[float], argv: list[str]) -> None:
    config = load(spec, overrides)
    done = {(record["config"], *record["overrides"], record["lr"]) for record in read_records(WATCHED)}
    told = [f"{key}={text}" for key, text in overrides]
    for lr in (lr for lr in rates if (spec, *told, lr) not in done):
        facts = about("experiments.probes", argv) | {"config": spec, "overrides": told, "lr": lr, "seed": 0}
        append_record(WATCHED, facts | {"measured": watch(config, lr)})
        print(f"{spec} at {lr:g}", flush=True)


def main(argv: list[str]) -> int:
    rest, overrides = split_overrides(argv)
    parser = Parser(prog="python -m experiments.probes", description=__doc__)
    parser.add_argument("verb", metavar="VERB", help=" | ".join(_VERBS))
    parser.add_argument("names", metavar="NAMES", nargs="?", help="sweeps that bisect, with commas between, for probe")
    parser.add_argument("--config", help="FILE.py or FILE.py:arg, for watch")
    parser.add_argument("--rates", help="with commas between, for watch")
    args = parser.parse_args(rest)
    if args.verb not in _VERBS:
        raise UserError(f"unknown verb {args.verb!r}; {did_you_mean(args.verb, _VERBS)}")
    watching = args.verb == "watch"
    if [bool(part) for part in (args.names, args.config, args.rates)] != [not watching, watching, watching]:
        raise UserError("probe takes the names of sweeps alone, and watch --config and --rates")
    if overrides and not watching:
        raise UserError("probe takes no --config.x, since a sweep's cells have theirs; watch does")
    if args.verb == "probe":
        _probe_all(args.names, argv)
        return 0
    try:
        rates = [float(text) for text in args.rates.split(",")]
    except ValueError:
        raise UserError(f"--rates {args.rates!r} must be numbers with commas between, as in 0.008,0.0115") from None
    _watch_all(args.config, overrides, rates, argv)
    return 0


if __name__ == "__main__":
    run_command(main, lasting=True)
