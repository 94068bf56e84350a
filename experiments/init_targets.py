"""Ablation: which output projections should ScaleInit damp with depth? It decides the default of `init_targets`.

    python -m experiments.init_targets --out runs/init_targets

{pre, post, span} x {ffn_out; attn_out and ffn_out} x three seeds on the demo's recipe: every placement gets both,
so that no arm is tuned alone.
"""

from pathlib import Path

from experiments.demo import FULL
from experiments.runner import run_all
from spannorm_jax.command import Parser, run_command
from spannorm_jax.paths import user_path
from spannorm_jax.report.__main__ import main as report

PLACEMENTS = ("pre", "post", "span")
TARGETS = ("ffn_out", "attn_out,ffn_out")
SEEDS = (0, 1, 2)


def main(argv: list[str]) -> int:
    parser = Parser(prog="python -m experiments.init_targets", description=__doc__)
    parser.add_argument("--out", type=user_path, default=Path("runs/init_targets"), help="folder of the runs")
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
        print()
        code = report([str(args.out), "--out", str(args.out), "--title", "Which projections ScaleInit damps"])
    return code


if __name__ == "__main__":
    run_command(main, lasting=True)
