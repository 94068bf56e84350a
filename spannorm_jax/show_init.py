"""Prints each weight's std, a parametrisation's multipliers and the branch variance that follows.

    python -m spannorm_jax.show_init --config FILE.py[:arg]

Nothing is allocated and no data is read, so it answers for any size at once.
"""

from typing import TYPE_CHECKING

import numpy as np

from spannorm_jax.command import Parser, run_command
from spannorm_jax.config import Config
from spannorm_jax.config_file import load, resolve_without_data, split_overrides
from spannorm_jax.model.initialisation import (
    init_of,
    initial_size,
    predicted_additions,
    predicted_branch_variance,
    residual_additions,
)
from spannorm_jax.model.parametrisation import PARAMETRISATIONS, forward
from spannorm_jax.model.placement import placement_of
from spannorm_jax.validation import notices

if TYPE_CHECKING:
    from spannorm_jax.model.definition import ModelDef


def main(argv: list[str]) -> int:
    rest, overrides = split_overrides(argv)
    parser = Parser(prog="python -m spannorm_jax.show_init", description=__doc__)
    parser.add_argument("--config", required=True, help="FILE.py or FILE.py:arg, see configs/")
    args = parser.parse_args(rest)
    config = resolve_without_data(load(args.config, overrides), platform="cpu")
    cfg = config.model
    # JAX comes with it: a command that is mistyped does without.
    from spannorm_jax.model.definition import count_params
    from spannorm_jax.training.tasks import task_of

    model = task_of(config).define(config)
    print(
        f"{cfg.placement} / {init_of(cfg)}: {cfg.depth} blocks, width {cfg.width}, {count_params(model):,} parameters\n"
    )
    print(f"{'weight':<12}{'role':<11}{'shape':<22}{'fan_in':>7}{'std':>12}{'std x sqrt(fan_in)':>20}")
    gains = []
    for spec in model.specs():
        sizes = np.atleast_1d(initial_size(cfg, spec))
        size = float(np.mean(sizes))
        if spec.start is None:
            shape = " x ".join(map(str, spec.shape))
            gain = size * spec.fan_in**0.5
            ends = f"   mean of {sizes[0]:.6f} to {sizes[-1]:.6f}" if sizes[0] != sizes[-1] else ""
            print(f"{spec.site:<12}{spec.role:<11}{shape:<22}{spec.fan_in:>7}{size:>12.6f}{gain:>20.4f}{ends}")
        elif size != 1:
            kind = "gain, starts" if spec.role == "norm" else "starts"
            gains.append(f"{spec.site:<12}{spec.role:<11}{kind} at {size:.6g}")
    print("\n".join(gains), end="\n" if gains else "")
    if PARAMETRISATIONS[cfg.parametrisation].base:
        _print_multipliers(config, model)
    branches = {"attn": "attention", "ffn": "feed-forward", "moe": "experts"}
    variance = predicted_branch_variance(cfg, model.specs())
    words = [f"{branches[name]} {np.mean(values):.6f}" for name, values in variance.items()]
    words[0] += f" ({'at the first position' if model.causal else 'at most'}; less where values are averaged)"
    additions = placement_of(cfg).additions
    print(
        f"\npredicted branch variance at unit-variance input: {', '.join(words)}"
        f"\nadded to the stream over its {residual_additions(cfg)} additions (sized by {', '.join(additions.values())})"
        f": {sum(np.sum(values) for values in predicted_additions(cfg, model.specs()).values()):.4f}"
        + (f"\ntimes (t / (T l))^2 in block l, update t, up to 1: T = {T:g}" if (T := cfg.branch_warmup_steps) else "")
    )
    for notice in notices(config):
        print(notice)
    return 0


def _print_multipliers(config: Config, model: "ModelDef") -> None:
    """The table of a parametrisation that is not the standard one: what differs from the base, by weight."""
    from spannorm_jax.training.optimizer import OPTIMIZERS

    cfg = config.model
    read = PARAMETRISATIONS[cfg.parametrisation].base
    sizes = ", ".join(f"{size} {getattr(cfg, size)} from {getattr(cfg, f'base_{size}')}" for size in read)
    print(f"\n{cfg.parametrisation}, {sizes}; {config.optim.name}'s multipliers")
    print(f"{'weight':<20}{'std':>12}{'rate':>12}{'decay':>12}{'eps':>12}")
    for spec in model.specs():
        of = OPTIMIZERS[config.optim.name].multipliers(cfg, spec)
        print(f"{spec.site:<20}{of.init:>12.6g}{of.lr:>12.6g}{of.decay:>12.6g}{of.eps:>12.6g}")
    of_model = forward(cfg)
    print(
        f"forward: branches that are added x {of_model.branch:.6g}, attention logits x {of_model.attention:.6g}, "
        f"output logits x {of_model.logits:.6g}"
        + (f", embeddings' factor sqrt(width) x {of_model.embedding:.6g}" if cfg.tied_head else "")
    )


if __name__ == "__main__":
    run_command(main)
