"""Ablation: which output projections should ScaleInit damp with depth? It decides the default of `init_targets`.

    python -m experiments.init_targets --out runs/init_targets

{pre, post, span} x {ffn_out; attn_out and ffn_out} x three seeds on the demo's recipe: every placement gets both,
so that no arm is tuned alone. Prints mean and range over seeds of the held-out loss.
"""

import argparse
from pathlib import Path

from experiments.demo import FULL
from experiments.runner import run_all
from spannorm_jax.analysis.runs import find_runs, summarise
from spannorm_jax.errors import run_command

PLACEMENTS = ("pre", "post", "span")
TARGETS = ("ffn_out", "attn_out,ffn_out")
SEEDS = (0, 1, 2)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.init_targets", description=__doc__, allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("runs/init_targets"), help="folder of the runs")
    args = parser.parse_args(argv)
    runs = {
        f"{placement}-{targets.replace(',', '-')}-seed{seed}": (
            "--config",
            f"configs/dense.py:tiny,placement={placement},init=scale",
            f"--config.model.init_targets={targets}",
            f"--config.seed={seed}",
            *FULL,
        )
        for seed in SEEDS
        for placement in PLACEMENTS
        for targets in TARGETS
    }
    code = run_all(args.out, runs)
    if code == 0:
        print_table(args.out)
    return code


def print_table(out: Path) -> None:
    rows = [summarise(run) for run in find_runs(out)]
    print(f"\n{'placement':<11}{'init_targets':<20}{'seeds':>5}{'held-out bits/byte, mean (range)':>36}")
    for placement in PLACEMENTS:
        for targets in TARGETS:
            bits = [
                row.bits_per_byte
                for row in rows
                if row.run.placement == placement and row.run.options["model.init_targets"] == targets.split(",")
            ]
            spread = f"{sum(bits) / len(bits):.4f} ({min(bits):.4f} to {max(bits):.4f})"
            print(f"{placement:<11}{targets:<20}{len(bits):>5}{spread:>36}")


if __name__ == "__main__":
    run_command(main)
