"""The demo: {pre, post, span} x {plain, scale} on one recipe, evaluated from checkpoints, one report.

    python -m experiments.demo --out runs/demo [--smoke]

Six runs differ in nothing but placement and initialisation: same data order, steps and learning rate. Each is
trained and then evaluated in processes of their own, through the command lines that a user would type. Started
again after an interruption it goes on where it was.
"""

import argparse
import shlex
import subprocess
import sys
import time
from pathlib import Path

from spannorm_jax.analysis import report
from spannorm_jax.errors import run_command
from spannorm_jax.training.loop import DIVERGED_EXIT
from spannorm_jax.training.metrics import format_seconds
from spannorm_jax.training.run_folder import DIVERGED, DONE, EVAL

RUNS = [(placement, init) for placement in ("pre", "post", "span") for init in ("plain", "scale")]
FULL = ("--config.training.steps=250", "--config.checkpoint.every_steps=50")
SMOKE = ("--config.training.steps=12", "--config.eval.tokens=8192", "--config.checkpoint.every_steps=6")
TITLE = "24 blocks, width 64: three norm placements, two initialisations"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.demo", description=__doc__, allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of runs and report")
    parser.add_argument("--smoke", action="store_true", help="a few steps a run: does everything work?")
    args = parser.parse_args(argv)
    began = time.monotonic()
    done_here = 0
    for number, (placement, init) in enumerate(RUNS, 1):
        workdir = args.out / f"{placement}-{init}"
        if _ended(workdir) and (workdir / EVAL).exists():
            print(f"[{number}/{len(RUNS)}] {placement} / {init}: done before", flush=True)
            continue
        left = ""
        if done_here:
            each = (time.monotonic() - began) / done_here
            left = f"  (about {format_seconds(each * (len(RUNS) - number + 1))} left in all)"
        print(f"\n[{number}/{len(RUNS)}] {placement} / {init}{left}", flush=True)
        config = f"configs/dense.py:tiny,placement={placement},init={init}"
        train = ["spannorm_jax.train", "--config", config, "--workdir", str(workdir)]
        code = 0 if _ended(workdir) else _run([*train, *(SMOKE if args.smoke else FULL)])
        if code == 0 and not _ended(workdir):
            print("interrupted; the same command goes on from here", flush=True)
            return 130
        if code in (0, DIVERGED_EXIT) and any((workdir / "checkpoints").iterdir()):
            code = _run(["spannorm_jax.evaluate", "--workdir", str(workdir)])
        if code not in (0, DIVERGED_EXIT):
            return code
        done_here += 1
    print(flush=True)
    return report.main([str(args.out), "--out", str(args.out), "--title", TITLE])


def _ended(workdir: Path) -> bool:
    return (workdir / DONE).exists() or (workdir / DIVERGED).exists()


def _run(module_and_args: list[str]) -> int:
    print("$ python -m " + shlex.join(module_and_args), flush=True)
    process = subprocess.Popen([sys.executable, "-m", *module_and_args])
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            pass  # the terminal sent it to the trainer as well, which saves and ends


if __name__ == "__main__":
    run_command(main)
