"""Records what the devices' own compilers plan for our programs; docs/speed.md has the table.

    .venv-tpu/bin/python -m experiments.benchmarks.plans --chip v5 --json tpu.json     # v5e and v5p, by libtpu
    python -m experiments.benchmarks.plans --chip h100 --json gpu.json                 # with the extra gpu installed

Nothing runs on a device and none need be here. A program takes from seconds to two minutes.
"""

import sys
from pathlib import Path

from experiments.record import about, save_record
from spannorm_jax.command import Parser, run_command
from spannorm_jax.config_file import load
from spannorm_jax.errors import UserError
from spannorm_jax.paths import user_path
from spannorm_jax.plan import target
from spannorm_jax.plan.topology import known_name

# name -> topology, program, config, overrides
CASES: dict[str, tuple[str, str, str, dict[str, int]]] = {
    "124m span": ("v5e:2x2", "train", "dense.py:124m", {"training.batch_size": 32}),
    "124m pre": ("v5e:2x2", "train", "dense.py:124m,placement=pre", {"training.batch_size": 32}),
    "350m": ("v5p:2x2x1", "train", "dense.py:350m", {"training.batch_size": 64, "mesh.fsdp": 4, "mesh.data": 1}),
    "1b": ("v5e:4x4", "train", "dense.py:1b", {"training.batch_size": 32, "mesh.fsdp": 16, "mesh.data": 1}),
    "8x124m": ("v5e:2x2", "train", "moe.py:8x124m", {"training.batch_size": 16, "mesh.expert": 4}),
    "124m, its dense twin": ("v5e:2x2", "train", "dense.py:124m", {"training.batch_size": 16}),
    "124m sample": ("v5e:2x2", "sample", "dense.py:124m", {}),
    "124m span, H100": ("h100:1x1x1", "train", "dense.py:124m", {"training.batch_size": 16}),
    "124m pre, H100": ("h100:1x1x1", "train", "dense.py:124m,placement=pre", {"training.batch_size": 16}),
    "350m, H100": (
        "h100:1x1x8", "train", "dense.py:350m", {"training.batch_size": 64, "mesh.fsdp": 8, "mesh.data": 1}
    ),
}  # fmt: skip
CONFIGS = Path(__file__).parents[2] / "configs"


def planned(name: str) -> dict[str, dict[str, float]]:
    """Program -> its plan, in bytes, cycles, kernels and seconds."""
    topology, program, arg, changes = CASES[name]
    to = target.open_target(known_name(topology), 1)
    config = load(f"{CONFIGS}/{arg}", [(key, str(value)) for key, value in changes.items()])
    config = target.resolved(config, to, program)
    return {
        part: {
            "memory": cost.memory,
            "temporaries": cost.temporaries,
            "cycles": cost.cycles,
            "kernel_cycles": sum(cost.kernel_cycles.values()),
            "kernels": cost.kernels,
            "moved": cost.moved,
            "received": sum(one.received for one in cost.collectives if not one.branch),
            "collectives": sum(one.count for one in cost.collectives if not one.branch),
            "step_s": target.seconds_of(cost, config, to, program),
            "peak_share": target.peak_share(cost, config, to, program),
            "compile_s": seconds,
        }
        for part, cost, seconds in target.costs(config, to, program, 1)
    }


def main(argv: list[str]) -> int:
    parser = Parser(prog="python -m experiments.benchmarks.plans", description=__doc__)
    parser.add_argument("--chip", required=True, help="plans for chips whose name begins so: v5, h100")
    parser.add_argument("--json", type=user_path, required=True, help="the record")
    args = parser.parse_args(argv)
    names = [name for name, case in CASES.items() if case[0].startswith(args.chip)]
    if not names:
        raise UserError(f"--chip {args.chip!r} is none of {', '.join(sorted({case[0] for case in CASES.values()}))}")
    plans: dict[str, dict] = {}
    for name in names:
        topology, _, config, changes = CASES[name]
        plans[name] = {"topology": topology, "config": config, "overrides": changes, "programs": planned(name)}
        save_record(args.json, {"about": about("experiments.benchmarks.plans", argv), "plans": plans})
        print(name, plans[name]["programs"], file=sys.stderr, flush=True)
    return 0


if __name__ == "__main__":
    run_command(main)
