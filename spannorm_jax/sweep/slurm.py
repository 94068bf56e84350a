"""Submits a sweep's missing runs as one Slurm array, a task per run, through experiments/launch/slurm.sh."""

import itertools
import shlex
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

from spannorm_jax.errors import UserError, one_line
from spannorm_jax.sweep.expansion import Sweep
from spannorm_jax.sweep.records import FAILED, NEW, STOPPED, RunPlace

_SCRIPT = "experiments/launch/slurm.sh"


def submit(sweep: Sweep, out: Path, at_most: int, options: Sequence[str], retry: bool) -> int:
    """Calls sbatch once, with the indices of the runs that nobody has done or is at work on.

    Args:
      at_most: tasks at one time.
      options: of sbatch, such as --gpus-per-node=8.
      retry: submit those that have failed too.

    Raises:
      UserError: there is no sbatch here, or it refuses.
    """
    wanted = (NEW, STOPPED, FAILED) if retry else (NEW, STOPPED)
    missing = [run.index for run in sweep.runs if RunPlace(out, run.name).state() in wanted]
    if not missing:
        print(f"sweep {sweep.title}: nothing is missing of {len(sweep.runs)} runs")
        return 0
    array = f"--array={ranges(missing)}%{at_most}"
    own = ["--size", sweep.size, "--config", sweep.file, "--out", str(out), "--of", sweep.hash]
    overrides = [f"--config.{key}={text}" for key, text in sweep.overrides]
    tasks = [_SCRIPT, "sweep", sweep.names, *own, *(["--retry"] if retry else []), *overrides]
    command = ["sbatch", array, f"--job-name={sweep.names}", *options, *tasks]
    print(f"$ {shlex.join(command)}", flush=True)
    if not Path(_SCRIPT).is_file():
        raise UserError(f"there is no {_SCRIPT} here; work in the checkout's root")
    if shutil.which("sbatch") is None:
        raise UserError("there is no sbatch here; give the command above where Slurm is")
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"sbatch refuses: {one_line(done.stderr or done.stdout)}")
    print(done.stdout.strip())
    return 0


def ranges(numbers: Iterable[int]) -> str:
    """Ascending numbers as Slurm writes them: 0-3,7."""
    groups = itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])
    runs = [[number for _, number in group] for _, group in groups]
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
