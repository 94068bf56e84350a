"""A process that does runs of a sweep one after another and imports JAX once.

    python -m spannorm_jax.sweep.worker '{"cores": [0], "platform": "cpu", ...}'

Its runner writes a JSON line to its standard input, a list of runs (`Job`) to train together, and reads one from its
standard output, how each of them has ended. When the input ends, because the runner asks for it or has died, the runs
at work save their step and the process ends.
"""

import contextlib
import dataclasses
import json
import os
import queue
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Any, TextIO

from spannorm_jax.console import guard_output
from spannorm_jax.errors import UserError
from spannorm_jax.parallel.memory import keep_freed_memory


@dataclasses.dataclass(frozen=True)
class Job:
    """A run as the runner hands it over; the worker reads its config again."""

    spec: str
    overrides: tuple[tuple[str, str], ...]
    index: int
    name: str
    retry: bool
    wait: bool  # for another runner that is at work on it


def main(argv: list[str]) -> int:
    keep_freed_memory()  # before the listener: its arena would be the backend's threads' too
    setup = json.loads(argv[0])
    if setup["cores"]:  # before JAX counts them for its threads
        os.sched_setaffinity(0, setup["cores"])
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    guard_output(lasting=True)  # a log that cannot be written ends no run
    jobs: queue.Queue[list[dict[str, Any]] | None] = queue.Queue()
    working, ended = threading.Event(), threading.Event()
    threading.Thread(target=_listen, args=(jobs, working, ended), daemon=True, name="listener").start()
    _answer(answers, **_hello(setup["platform"]))
    while (job := jobs.get()) is not None:
        working.set()
        if ended.is_set():  # before this job was taken, or the listener has seen that it was
            break
        try:
            answer = _do([Job(**each) for each in job], setup["out"])
        except UserError as error:
            answer = {"error": str(error)}
        working.clear()
        _answer(answers, **answer)
    return 0


def _listen(jobs: "queue.Queue[list[dict[str, Any]] | None]", working: threading.Event, ended: threading.Event) -> None:
    """Hands jobs on. At the end of the input a run at work is stopped as by `kill`, and saves its step."""
    for line in sys.stdin:
        jobs.put(json.loads(line))
    ended.set()
    jobs.put(None)
    if working.is_set():
        os.kill(os.getpid(), signal.SIGTERM)


def _hello(platform: str) -> dict[str, Any]:
    """What this process has: the number and platform of its devices, or why there are none."""
    from spannorm_jax.parallel.platform import start_jax
    from spannorm_jax.parallel.rank import ProcessFlags

    try:
        start_jax(platform, ProcessFlags())
    except UserError as error:
        return {"error": str(error)}
    import jax

    return {"devices": jax.device_count(), "backend": jax.default_backend()}


def _do(jobs: Sequence[Job], folder: str) -> dict[str, Any]:
    """How each of the runs has ended. Raises UserError for what is no end of a run: the runner says it and ends."""
    from spannorm_jax.config_file import load
    from spannorm_jax.durable import InUse
    from spannorm_jax.run.folder import run_folder_path
    from spannorm_jax.sweep.expansion import Run, folder_name
    from spannorm_jax.sweep.records import FAILED, RUNNING, RunPlace
    from spannorm_jax.sweep.work import work, work_in_lanes

    out, runs = run_folder_path(folder), []
    for job in jobs:
        overrides = tuple((key, text) for key, text in job.overrides)
        config = load(job.spec, overrides)
        run = Run(job.index, job.spec, overrides, config, folder_name(config))
        if run.name != job.name:
            raise UserError(f"{job.spec} has changed since the runner read it; start the runner again")
        runs.append(run)
    if len(runs) > 1:
        return {"ends": work_in_lanes(runs, out, retry=jobs[0].retry)}
    place = RunPlace(out, runs[0].name)
    with place.printing():
        try:
            end = work(runs[0], place, retry=jobs[0].retry, wait=jobs[0].wait)
        except InUse as error:  # by a trainer, no runner, if it was waited for
            end = FAILED if jobs[0].wait else RUNNING, str(error)
    return {"ends": [end]}


def _answer(answers: TextIO, **values: Any) -> None:
    with contextlib.suppress(BrokenPipeError):  # the runner has died, and this process is about to end
        answers.write(json.dumps(values) + "\n")
        answers.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
