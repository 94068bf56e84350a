"""Prints each weight's std and the predicted branch variance: python -m spannorm_jax.show_init --config FILE.py[:arg]

Nothing is allocated and no data is read, so it answers for any size at once.
"""

import numpy as np

from spannorm_jax.command import Parser, run_command
from spannorm_jax.config_file import load, resolve_without_data, split_overrides
from spannorm_jax.model.initialisation import (
    INITS,
    predicted_additions,
    predicted_branch_variance,
    residual_additions,
)
from spannorm_jax.model.placement import PLACEMENTS


def main(argv: list[str]) -> int:
    rest, overrides = split_overrides(argv)
    parser = Parser(prog="python -m spannorm_jax.show_init", description=__doc__)
    parser.add_argument("--config", required=True, help="FILE.py or FILE.py:arg, see configs/")
    args = parser.parse_args(rest)
    cfg = resolve_without_data(load(args.config, overrides), platform="cpu").model
    # JAX comes with it: a command that is mistyped does without.
    from spannorm_jax.model.definition import count_params, define

    model = define(cfg)
    print(f"{cfg.placement} / {cfg.init}: {cfg.depth} blocks, width {cfg.width}, {count_params(model):,} parameters\n")
    print(f"{'weight':<12}{'role':<11}{'shape':<22}{'fan_in':>7}{'std':>12}{'std x sqrt(fan_in)':>20}")
    gains = []
    for spec in model.specs():
        size = float(np.mean(INITS[cfg.init](cfg, spec)))
        if spec.start is None:
            shape = " x ".join(map(str, spec.shape))
            gain = size * spec.fan_in**0.5
            print(f"{spec.site:<12}{spec.role:<11}{shape:<22}{spec.fan_in:>7}{size:>12.6f}{gain:>20.4f}")
        elif size != 1:
            gains.append(f"{spec.site:<12}{'norm':<11}gain, starts at {size:.6g}")
    print("\n".join(gains), end="\n" if gains else "")
    branches = {"attn": "attention", "ffn": "feed-forward", "moe": "experts"}
    variance = predicted_branch_variance(cfg, model.specs())
    words = [f"{branches[name]} {np.mean(values):.6f}" for name, values in variance.items()]
    words[0] += " (at the first position; less where values are averaged)"
    additions = PLACEMENTS[cfg.placement].additions
    print(
        f"\npredicted branch variance at unit-variance input: {', '.join(words)}"
        f"\nadded to the stream over its {residual_additions(cfg)} additions (sized by {', '.join(additions.values())})"
        f": {sum(np.sum(values) for values in predicted_additions(cfg, model.specs()).values()):.4f}"
    )
    return 0


if __name__ == "__main__":
    run_command(main)
