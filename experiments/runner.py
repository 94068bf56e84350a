"""Trains and evaluates a list of runs one after the other, each in processes of its own.

Started again after an interruption it goes on where it was: finished runs are passed over, an unfinished one
continues from its newest checkpoint.
"""

import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from spannorm_jax.errors import DIVERGED_EXIT
from spannorm_jax.run.folder import CHECKPOINTS, DIVERGED, DONE, EVAL
from spannorm_jax.training.step_log import format_seconds

INTERRUPTED_EXIT = 130


def run_all(out: Path, runs: Mapping[str, Sequence[str]]) -> int:
    """Runs `{name: train's arguments}` in folders `out/name`; returns 0, or the code of what stopped it."""
    began, done_here = time.monotonic(), 0
    for number, (name, arguments) in enumerate(runs.items(), 1):
        workdir = out / name
        if _ended(workdir) and (_evaluated(workdir) or not _has_checkpoint(workdir)):
            print(f"[{number}/{len(runs)}] {name}: done before", flush=True)
            continue
        left = ""
        if done_here:
            each = (time.monotonic() - began) / done_here
            left = f"  (about {format_seconds(each * (len(runs) - number + 1))} left in all)"
        print(f"\n[{number}/{len(runs)}] {name}{left}", flush=True)
        if not _ended(workdir):
            code = _run(["spannorm_jax.train", *arguments, "--workdir", str(workdir)])
            if code not in (0, DIVERGED_EXIT):
                return code
            if not _ended(workdir):
                print("interrupted; the same command goes on from here", flush=True)
                return INTERRUPTED_EXIT
        if _has_checkpoint(workdir):
            code = _run(["spannorm_jax.evaluate", "--workdir", str(workdir)])
            if code not in (0, DIVERGED_EXIT):
                return code
        done_here += 1
    return 0


def _ended(workdir: Path) -> bool:
    return (workdir / DONE).exists() or (workdir / DIVERGED).exists()


def _evaluated(workdir: Path) -> bool:
    return (workdir / EVAL).exists()


def _has_checkpoint(workdir: Path) -> bool:
    return any((workdir / CHECKPOINTS).iterdir())


def _run(module_and_arguments: list[str]) -> int:
    print("$ python -m " + shlex.join(module_and_arguments), flush=True)
    process = subprocess.Popen([sys.executable, "-m", *module_and_arguments])
    interrupted = False
    while True:
        try:
            code = process.wait()
        except KeyboardInterrupt:  # the terminal sent it to the child as well: a trainer saves, then ends
            interrupted = True
            continue
        if interrupted and code < 0:
            return INTERRUPTED_EXIT
        return code
