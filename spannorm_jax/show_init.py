"""Prints each weight's std and the predicted branch variance: python -m spannorm_jax.show_init --config FILE.py[:arg]

Nothing is allocated and no data is read, so it answers for any size at once.
"""

from spannorm_jax.command import Parser, run_command
from spannorm_jax.config_file import load, resolve_without_data, split_overrides
from spannorm_jax.model.definition import count_params, define
from spannorm_jax.model.initialisation import (
    fan_in,
    gain_starts,
    predicted_additions,
    predicted_branch_variance,
    residual_additions,
    weight_stds,
)
from spannorm_jax.model.placement import PLACEMENTS


def main(argv: list[str]) -> int:
    rest, overrides = split_overrides(argv)
    parser = Parser(prog="python -m spannorm_jax.show_init", description=__doc__)
    parser.add_argument("--config", required=True, help="FILE.py or FILE.py:arg, see configs/")
    args = parser.parse_args(rest)
    cfg = resolve_without_data(load(args.config, overrides), platform="cpu").model
    model, stds, fan = define(cfg), weight_stds(cfg), fan_in(cfg)
    print(f"{cfg.placement} / {cfg.init}: {cfg.depth} blocks, width {cfg.width}, {count_params(model):,} parameters\n")
    print(f"{'weight':<12}{'role':<11}{'shape':<22}{'fan_in':>7}{'std':>12}{'std x sqrt(fan_in)':>20}")
    for spec in model.specs():
        if spec.site in stds:
            std, n = stds[spec.site], fan[spec.site]
            shape = " x ".join(map(str, spec.shape))
            print(f"{spec.site:<12}{spec.role:<11}{shape:<22}{n:>7}{std:>12.6f}{std * n**0.5:>20.4f}")
    variance = predicted_branch_variance(cfg)
    experts = f", experts {variance['moe']:.6f}" if cfg.moe.num_experts else ""
    additions = PLACEMENTS[cfg.placement].additions
    gains = {name: start for name, start in gain_starts(cfg).items() if start != 1}
    for name, start in gains.items():
        print(f"{name:<12}{'norm':<11}gain, starts at {start:.6g}")
    print(
        f"\npredicted branch variance at unit-variance input: attention {variance['attn']:.6f} (at the first position; "
        f"less where values are averaged), feed-forward {variance['ffn']:.6f}{experts}"
        f"\nadded to the stream over its {residual_additions(cfg)} additions (sized by {', '.join(additions.values())})"
        f": {cfg.depth * sum(predicted_additions(cfg).values()):.4f}"
    )
    return 0


if __name__ == "__main__":
    run_command(main)
