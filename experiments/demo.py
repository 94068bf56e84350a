"""The demo: {pre, post, span} x {plain, scale} on one recipe, evaluated from checkpoints, one report.

    python -m experiments.demo --out runs/demo [--smoke]

Six runs differ in nothing but placement and initialisation: same data order, steps and learning rate. Each is
trained, then evaluated in a new process, through the command lines that a user would type.
"""

from pathlib import Path

from experiments.runner import run_all
from spannorm_jax.analysis import report
from spannorm_jax.errors import Parser, run_command

FULL = ("--config.training.steps=250", "--config.checkpoint.every_steps=50")
SMOKE = ("--config.training.steps=12", "--config.checkpoint.every_steps=6", "--config.eval.tokens=8192")
TITLE = "24 blocks, width 64: three norm placements, two initialisations"


def main(argv: list[str]) -> int:
    parser = Parser(prog="python -m experiments.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of runs and report")
    parser.add_argument("--smoke", action="store_true", help="a few steps a run: does everything work?")
    args = parser.parse_args(argv)
    runs = {
        f"{placement}-{init}": (
            "--config",
            f"configs/dense.py:tiny,placement={placement},init={init}",
            *(SMOKE if args.smoke else FULL),
        )
        for placement in ("pre", "post", "span")
        for init in ("plain", "scale")
    }
    code = run_all(args.out, runs)
    if code == 0:
        print()
        code = report.main([str(args.out), "--out", str(args.out), "--title", TITLE])
    return code


if __name__ == "__main__":
    run_command(main)
