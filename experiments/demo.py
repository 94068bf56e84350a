"""The demo: {pre, post, span} x {plain, scale}, and the three again with experts; trained, evaluated, reported.

    python -m experiments.demo --out runs/demo [--smoke]

The runs of a folder, OUT/dense or OUT/moe, differ in nothing but placement and initialisation: same data order, steps
and learning rate. Each is trained, then evaluated in a new process, through the command lines that a user would type.
"""

from pathlib import Path

from experiments.runner import run_all
from spannorm_jax.command import Parser, run_command
from spannorm_jax.paths import user_path
from spannorm_jax.report.__main__ import main as report

FULL = ("--config.training.steps=250", "--config.checkpoint.every_steps=50")
SMOKE = ("--config.training.steps=12", "--config.checkpoint.every_steps=6", "--config.eval.tokens=8192")
PLACEMENTS = ("pre", "post", "span")
FOLDERS = {  # of OUT, and configs/: initialisations, title of the report
    "dense": (("plain", "scale"), "24 blocks, width 64: three norm placements, two initialisations"),
    "moe": (("scale",), "24 blocks, width 64, 8 experts (2 a token): three norm placements"),
}


def main(argv: list[str]) -> int:
    parser = Parser(prog="python -m experiments.demo", description=__doc__)
    parser.add_argument("--out", type=user_path, default=Path("runs/demo"), help="folder of runs and reports")
    parser.add_argument("--smoke", action="store_true", help="a few steps a run: does everything work?")
    args = parser.parse_args(argv)
    for folder, (inits, title) in FOLDERS.items():
        out = args.out / folder
        runs = {
            f"{placement}-{init}": (
                "--config",
                f"configs/{folder}.py:tiny,placement={placement},init={init}",
                *(SMOKE if args.smoke else FULL),
            )
            for placement in PLACEMENTS
            for init in inits
        }
        code = run_all(out, runs)
        if code == 0:
            print()
            code = report([str(out), "--out", str(out), "--title", title])
        if code:
            return code
    return 0


if __name__ == "__main__":
    run_command(main, lasting=True)
