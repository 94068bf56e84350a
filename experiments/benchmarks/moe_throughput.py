"""Speed of Mixture-of-Experts models against a dense one with the same active FLOPs, all in one process.

    python -m experiments.benchmarks.moe_throughput --config configs/throughput.py --experts 8,32 \\
        --json experiments/results/throughput/cpu-moe.json

The dense model's feed-forward of F units becomes experts of F / top_k units, so that a token meets as many weights, and
the router's. `--grouped_matmul` names the implementations to compare. Prints a table and writes the record: for each
model the step's seconds, its rate of active model FLOPs, that rate over the dense model's, and its memory.
"""

from typing import Any

import jax

from experiments.benchmarks import timing
from spannorm_jax.command import run_command
from spannorm_jax.config import Config, replace, rules
from spannorm_jax.config_file import load, split_overrides
from spannorm_jax.data.open import open_data
from spannorm_jax.errors import UserError
from spannorm_jax.model.moe.grouped_matmul import grouped_matmul_for
from spannorm_jax.parallel.platform import start_jax
from spannorm_jax.validation import validate

CHOICES = rules()["execution.grouped_matmul"].choices


def main(argv: list[str]) -> int:
    rest, overrides = split_overrides(argv)
    parser = timing.benchmark_parser("moe_throughput", __doc__, rounds=5, steps=5, config_is="of the dense model: ")
    parser.add_argument("--experts", default="8,32", help="numbers of experts, with commas between")
    parser.add_argument("--top_k", type=int, default=2, help="experts that a token goes to")
    parser.add_argument("--grouped_matmul", default="auto", help=f"of {', '.join(CHOICES)}, with commas between")
    args = parser.parse_args(rest)
    config = load(args.config, overrides)
    start_jax(config.platform)
    data, config = open_data(config)
    variants = models(config, args.experts.split(","), args.top_k, args.grouped_matmul.split(","))
    record = {
        "peak_flops_per_s": timing.matmul_peak(config.model.dtype) * jax.device_count(),
        "tokens_per_step": config.training.batch_size * config.data.seq_len,
        "models": timing.step_times(variants, timing.train_loader(config, data), args.rounds, args.steps),
    }
    dense = record["models"]["dense"]
    for got in record["models"].values():
        flops = got["model_flops_per_s"] * got["step_s"] / (dense["model_flops_per_s"] * dense["step_s"])
        got["rate_over_dense"] = flops * timing.median_ratio(dense["step_times_s"], got["step_times_s"])["median"]
        got["peak_share_active_flops"] = got["model_flops_per_s"] / record["peak_flops_per_s"]
    print_table(record)
    timing.write_record(args.json, "experiments.benchmarks.moe_throughput", argv, data, config, record)
    return 0


def models(config: Config, numbers: list[str], top_k: int, backends: list[str]) -> dict[str, Config]:
    """`dense`, and one for each number of experts and implementation. Raises UserError for what cannot be."""
    if config.model.moe.num_experts:
        raise UserError("--config is of the dense model; give --experts instead of model.moe.num_experts")
    unknown = [name for name in numbers if not name.isdigit() or int(name) < 1] + sorted({*backends} - {*CHOICES})
    if unknown:
        raise UserError(f"{unknown[0]!r} is no number of experts and no implementation ({', '.join(CHOICES)})")
    if top_k < 1 or config.model.ffn_dim % top_k:
        raise UserError(f"--top_k={top_k} does not divide model.ffn_dim={config.model.ffn_dim}; write a divisor")
    variants = {"dense": config}
    for number in numbers:
        for backend in backends:
            variant = replace(
                config,
                model__moe__num_experts=int(number),
                model__moe__top_k=top_k,
                model__moe__expert_dim=config.model.ffn_dim // top_k,
                execution__grouped_matmul=grouped_matmul_for(backend)[0],
            )
            validate(variant)
            variants[f"{number} experts, {variant.execution.grouped_matmul}"] = variant
    return variants


def print_table(record: dict[str, Any]) -> None:
    print(
        f"matmul peak {record['peak_flops_per_s'] / 1e9:,.0f} GFLOP/s; {record['tokens_per_step']:,} tokens a step; "
        "FLOPs are those of active parameters"
    )
    print(
        f"{'model':<24}{'total':>13}{'active':>13}{'step':>12}{'of peak':>9}{'of dense':>10}{'memory':>11}{'faults':>9}"
    )
    for name, m in record["models"].items():
        used = (m["memory"]["step_bytes"] or 0) / 2**20
        print(
            f"{name:<24}{m['num_params']:>13,}{m['active_params']:>13,}{m['step_s'] * 1e3:>9.1f} ms"
            f"{m['peak_share_active_flops']:>9.1%}{m['rate_over_dense']:>10.1%}{used:>7,.0f} MiB"
            f"{m['page_faults']:>9,.0f}"
        )


if __name__ == "__main__":
    run_command(main, lasting=True)
