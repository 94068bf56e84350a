"""How a step's time and memory grow with one size at a time, each against its formula.

    python -m experiments.benchmarks.growth --config configs/throughput.py --json growth.json

Each axis starts from the given config with 12 blocks of width 128, heads of 64 and 4 sequences of 128. The time's
formula is the model's FLOPs (`model.definition.flops_per_token`), the memory's is state, gradients and what backward
keeps, from the shapes. `exponent` is the slope of log time over log FLOPs along the axis, by least squares: above 1 is
growth that the formula does not have. Time is the least of the steps taken, memory is the compiled program's.
"""

import math
from typing import Any

import numpy as np

from experiments.benchmarks.timing import step_times, train_loader, write_record
from spannorm_jax.command import Parser, run_command
from spannorm_jax.config import Config, replace
from spannorm_jax.config_file import load, split_overrides
from spannorm_jax.data.open import open_data
from spannorm_jax.parallel.platform import start_jax
from spannorm_jax.paths import user_path
from spannorm_jax.resolution import fill_sizes
from spannorm_jax.validation import validate

BASE = {
    "model__depth": 12,
    "model__width": 128,
    "model__num_heads": 2,
    "model__num_kv_heads": 0,
    "data__seq_len": 128,
    "training__batch_size": 4,
}
AXES: dict[str, tuple[int, ...]] = {
    "depth": (12, 24, 48, 96, 128),
    "width": (128, 256, 512),
    "seq_len": (128, 256, 512, 1024, 2048),
    "vocab_size": (256, 2048, 16384, 50304),
    "experts": (1, 4, 16, 64),
}


def at(base: Config, axis: str, size: int) -> Config:
    """The config with one size changed. A token meets one expert, as large as the dense feed-forward."""
    changes: dict[str, Any] = {
        "depth": {"model__depth": size},
        "width": {"model__width": size, "model__num_heads": size // 64, "model__num_kv_heads": 0, "model__ffn_dim": 0},
        "seq_len": {"data__seq_len": size},
        "vocab_size": {"model__vocab_size": size},
        "experts": {"model__moe__num_experts": size, "model__moe__top_k": 1},
    }[axis]
    config = fill_sizes(replace(base, **changes))
    validate(config)
    return config


def main(argv: list[str]) -> int:
    rest, overrides = split_overrides(argv)
    parser = Parser(prog="python -m experiments.benchmarks.growth", description=__doc__)
    parser.add_argument("--config", required=True, help="FILE.py or FILE.py:arg, see configs/")
    parser.add_argument("--json", type=user_path, help="where the record goes")
    parser.add_argument("--axes", default=",".join(AXES), help="which of them, with commas between")
    parser.add_argument("--rounds", type=int, default=5, help="steps that each size is timed for")
    args = parser.parse_args(rest)
    unknown = sorted({*args.axes.split(",")} - {*AXES})
    if unknown:
        parser.error(f"--axes: {unknown[0]!r} is none of {', '.join(AXES)}")
    config = load(args.config, overrides)
    start_jax(config.platform)
    data, config = open_data(config)
    base = fill_sizes(replace(config, **BASE, model__ffn_dim=0))
    axes = {}
    for axis in args.axes.split(","):
        sizes = {str(size): at(base, axis, size) for size in AXES[axis]}
        points = {}
        for name, point in sizes.items():
            # One at a time: what is measured has the memory for itself.
            [got] = step_times({name: point}, train_loader(point, data), args.rounds, steps=1).values()
            step_s = min(got["step_times_s"])
            flops = got["model_flops_per_s"] * got["step_s"]
            kept = ("memory", "compile_s", "num_params", "page_faults")
            points[name] = {"step_s": step_s, "flops": flops, **{key: got[key] for key in kept}}
        axes[axis] = {"points": points, "exponent": exponent(points)}
        _print(axis, axes[axis])
    write_record(args.json, "experiments.benchmarks.growth", argv, data, base, {"axes": axes})
    return 0


def exponent(points: dict[str, dict[str, Any]]) -> float:
    """Slope of log time over log FLOPs; of experts, whose FLOPs are all alike, over log size."""
    flops = [point["flops"] for point in points.values()]
    x = flops if max(flops) > 1.5 * min(flops) else [float(name) for name in points]
    return float(np.polyfit([math.log(v) for v in x], [math.log(p["step_s"]) for p in points.values()], 1)[0])


def _print(axis: str, found: dict[str, Any]) -> None:
    print(f"{axis}: time grows as FLOPs to the power {found['exponent']:.2f}", flush=True)
    for name, p in found["points"].items():
        memory = p["memory"]
        print(
            f"{name:>8}{p['step_s'] * 1e3:>10.1f} ms{p['flops'] / p['step_s'] / 1e9:>9.1f} GFLOP/s"
            f"{(memory['step_bytes'] or 0) / 2**20:>9,.0f} MiB{memory['ratio'] or 0:>7.2f} x shapes"
        )


if __name__ == "__main__":
    run_command(main, lasting=True)
