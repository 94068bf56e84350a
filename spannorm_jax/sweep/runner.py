"""Runs a sweep on this machine: worker processes, each with its own cores, and one display.

A worker takes a group of runs at a time: one, or with `--lanes` several that it trains as lanes of one program.

What a worker does with a run stands in `work.py`. Whatever dies, and whenever: the kernel frees the claim on the run
that was at work, and the next start goes on from its newest checkpoint.
"""

import contextlib
import functools
import json
import os
import selectors
import signal
import subprocess
import sys
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from spannorm_jax.config_file import resolve_without_data
from spannorm_jax.durable import InUse
from spannorm_jax.errors import UserError
from spannorm_jax.parallel.mesh import check_divisible, lane_shards, mesh_shape
from spannorm_jax.parallel.rank import ProcessFlags, find_rank
from spannorm_jax.resolution import num_steps
from spannorm_jax.sweep.bisection import Bisection
from spannorm_jax.sweep.cost import run_flops
from spannorm_jax.sweep.display import Display
from spannorm_jax.sweep.expansion import Run, Sweep
from spannorm_jax.sweep.records import ENDED, FAILED, RUNNING, RunPlace
from spannorm_jax.sweep.worker import Job
from spannorm_jax.training.program_key import check_lanes, program_key

Group = tuple[Run, ...]  # runs that a worker takes together
Choose = Callable[[Collection[int]], Group]  # of what is next, besides runs by index; () while nothing is

INTERRUPTED_EXIT, FAILED_EXIT = 130, 1
_LOOK_S = 0.5  # between looks at signals and at the runs' progress
_MEMORY = 0.9  # of a GPU, for all workers that share it


# ---- the machine, divided ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Share:
    """What one worker has of the machine: cores, and variables of its environment."""

    cores: tuple[int, ...]
    env: dict[str, str]


def gpus_here(platform: str, env: Mapping[str, str]) -> list[str]:
    """NVIDIA's devices that a process sees which runs on `platform`, as CUDA_VISIBLE_DEVICES names them."""
    if platform not in ("auto", "gpu") or env.get("JAX_PLATFORMS") == "cpu":
        return []
    if "CUDA_VISIBLE_DEVICES" in env:
        return [name for name in env["CUDA_VISIBLE_DEVICES"].split(",") if name]
    return [str(i) for i, _ in enumerate(Path("/dev").glob("nvidia[0-9]*"))]


def divide(jobs: int | None, cores: Sequence[int], gpus: Sequence[str]) -> list[Share]:
    """The machine in as many shares as there are jobs (None: one for each GPU, or one).

    Raises:
      UserError: there are fewer cores, or the GPUs do not come out even.
    """
    jobs = jobs or max(1, len(gpus))
    if jobs > len(cores):
        raise UserError(f"--jobs {jobs} is more than the {len(cores)} cores here; write {len(cores)} or less")
    if gpus and max(jobs, len(gpus)) % min(jobs, len(gpus)):
        raise UserError(f"--jobs {jobs} does not go with {len(gpus)} GPUs; write a divisor or a multiple of that")

    def env(i: int) -> dict[str, str]:
        if not gpus:
            return {}
        if jobs <= len(gpus):
            each = len(gpus) // jobs
            return {"CUDA_VISIBLE_DEVICES": ",".join(gpus[i * each : (i + 1) * each])}
        fraction = _MEMORY * len(gpus) / jobs
        return {"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)], "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{fraction:.3f}"}

    n = len(cores)
    return [Share(tuple(cores[i * n // jobs : (i + 1) * n // jobs]), env(i)) for i in range(jobs)]


def check_fits(groups: Iterable[Group], devices: int, backend: str) -> None:
    """Raises UserError for the first run that cannot be divided over its part of so many devices."""
    for run, lanes in ((run, len(group)) for group in groups for run in group):
        try:
            config = resolve_without_data(run.config, backend)
            shape = mesh_shape(config.mesh, devices // lane_shards(config.mesh, devices, lanes))
            microbatch = config.training.batch_size // config.training.num_microbatches
            check_divisible(config, shape, "training.batch_size / num_microbatches", microbatch)
        except UserError as error:
            raise UserError(
                f"run {run.index} ({run.name}) cannot run on the devices of one job here: {error}"
            ) from error


# ---- the runs, in groups ------------------------------------------------------------------------------


def in_groups(runs: Sequence[Run], lanes: int) -> list[Group]:
    """Runs of one program together, at most so many, in groups as even as can be; runs of like lengths meet."""
    programs: dict[Any, list[Run]] = {}
    for run in runs:
        programs.setdefault(program_key(run.config), []).append(run)
    groups = []
    for same in programs.values():
        same.sort(key=lambda run: num_steps(run.config))
        number, n = -(-len(same) // lanes), len(same)
        groups += [tuple(same[i * n // number : (i + 1) * n // number]) for i in range(number)]
    return groups


def check_groups(sweep: Sweep, lanes: int) -> None:
    """Raises UserError if there is no use in lanes for a sweep, or a group cannot be trained so."""
    groups = in_groups(sweep.runs, lanes)
    if all(len(group) == 1 for group in groups):
        raise UserError(
            f"--lanes {lanes}: no two runs of sweep {sweep.title} share a program, as those do that differ in nothing "
            "but the seed, the initialisation and the numbers of the step; leave it out"
        )
    for group in groups:
        if len(group) > 1:
            check_lanes({run.name: run.config for run in group})


# ---- workers --------------------------------------------------------------------------------------


@dataclass
class Worker:
    """A worker process, and the runs that it is at work on; before the first ones it has to say hello."""

    share: Share
    process: subprocess.Popen[bytes]
    group: Group = ()
    greeted: bool = False

    def take(self, group: Group, retry: bool, wait: bool) -> None:
        self.group = group
        jobs = [Job(run.spec, run.overrides, run.index, run.name, retry, wait) for run in group]
        with contextlib.suppress(BrokenPipeError):  # it has died: its silence is heard soon
            self._write(json.dumps([asdict(job) for job in jobs]).encode() + b"\n")

    def _write(self, data: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(data)
        self.process.stdin.flush()

    def heard(self) -> dict[str, Any] | None:
        """What it says; None if it has ended without a word."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        return json.loads(line) if line.endswith(b"\n") else None

    def end(self) -> None:
        """No run more: those at work save their step."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()


def _start(share: Share, platform: str, out: Path) -> Worker:
    setup = json.dumps({"cores": share.cores, "platform": platform, "out": str(out)})
    process = subprocess.Popen(
        [sys.executable, "-m", "spannorm_jax.sweep.worker", setup],
        env=os.environ | share.env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is for the runner alone
    )
    return Worker(share, process)


def _how_it_ended(code: int) -> str:
    name = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
    return f"the process at work on it ended {name}"


# ---- the runner -------------------------------------------------------------------------------------


@dataclass
class Runner:
    """The state of `local`: what is left, who works, and whether a signal asks for the end."""

    out: Path
    platform: str
    choose: Choose
    planned: Sequence[Group]  # whose like will be chosen
    taken: set[int]  # runs that were chosen, and those that are not to be
    retry: bool
    display: Display
    todo: deque[Group] = field(default_factory=deque)  # taken up again
    busy: list[Run] = field(default_factory=list)  # at work in another runner
    waiting: bool = False  # for the other runners: nothing else is left
    workers: list[Worker] = field(default_factory=list)
    selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)
    signals: int = 0  # that ask for the end

    def start(self, share: Share) -> None:
        worker = _start(share, self.platform, self.out)
        self.workers.append(worker)
        assert worker.process.stdout is not None
        self.selector.register(worker.process.stdout, selectors.EVENT_READ, worker)

    def hear(self, worker: Worker) -> None:
        said = worker.heard()
        if said is None:
            self._ended(worker)
        elif "error" in said:
            raise UserError(said["error"])
        elif not worker.greeted:
            check_fits(self.planned, said["devices"], said["backend"])
            worker.greeted = True
        else:
            group, worker.group = worker.group, ()
            for run, (state, reason) in zip(group, said["ends"], strict=True):
                if state == RUNNING:
                    self.busy.append(run)
                self.display.ended(run, state, reason)

    def _ended(self, worker: Worker) -> None:
        """A worker has died: its run has failed, unless all are to end, and another worker takes its place.

        Of several runs nobody knows which was at fault: they are taken up again, each alone.
        """
        code = worker.process.wait()
        assert worker.process.stdout is not None
        self.selector.unregister(worker.process.stdout)
        self.workers.remove(worker)
        if self.signals:
            return
        if not worker.greeted:
            raise UserError(
                f"a worker ended before its first run ({_how_it_ended(code)}); what it printed stands above"
            )
        if len(worker.group) > 1:
            self.todo.extendleft((run,) for run in reversed(worker.group))
            self.display.alone(worker.group, _how_it_ended(code))
        for run in worker.group if len(worker.group) == 1 else ():
            self.display.ended(run, FAILED, _how_it_ended(code))
            place = RunPlace(self.out, run.name)
            with contextlib.suppress(InUse), place.claim():  # another runner may have it already
                if place.state_at_rest() not in ENDED:
                    place.fail(_how_it_ended(code))
        if self.at_work():  # what others are at may need it next
            self.start(worker.share)

    def next_group(self) -> Group:
        """When only the runs of other runners are left, it waits for them."""
        if not self.todo and (group := self.choose(self.taken)):
            self.taken.update(run.index for run in group)
            self.waiting = False
            return group
        if not self.todo and self.busy and all(worker.greeted and not worker.group for worker in self.workers):
            self.todo, self.busy, self.waiting = deque((run,) for run in self.busy), [], True
        return self.todo.popleft() if self.todo else ()

    def hand_out(self) -> None:
        """Gives each idle worker the next runs."""
        for worker in self.workers:
            if worker.greeted and not worker.group and (group := self.next_group()):
                for run in group:
                    self.display.started(run, self.waiting, len(group))
                worker.take(group, self.retry, self.waiting)

    def left(self) -> bool:
        return bool(self.todo or self.busy or self.choose(self.taken))

    def at_work(self) -> bool:
        return any(worker.group for worker in self.workers) or self.left()

    def end(self) -> None:
        """Ends all workers: each saves what it is at, and one signal more, after the first that asked, kills it."""
        asked, killed = min(self.signals, 1), False
        at_work = [run for worker in self.workers for run in worker.group]
        for worker in self.workers:
            worker.end()
        if at_work:
            self.display.ending(at_work, "a second signal" if asked else "a signal")
        for worker in self.workers:
            while worker.process.poll() is None:
                if self.signals > asked and not killed:
                    killed = True
                    self.display.killed()
                    for other in self.workers:
                        other.process.kill()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    worker.process.wait(timeout=_LOOK_S)


def local(sweep: Sweep, out: Path, jobs: int | None, retry: bool, lanes: int = 1) -> int:
    """Does what is left of a sweep: 0; 1 if runs have failed; 130 if a signal has stopped it.

    At most so many runs of one program are trained together, as `lanes` of it.

    Raises:
      UserError: the sweep does not fit this machine; nothing is started then.
    """
    if find_rank(ProcessFlags(), os.environ):
        raise UserError("local is for one process, and this is one of several; there, each takes a run: run I")
    if lanes > 1:
        check_groups(sweep, lanes)
    platforms = sorted({run.config.platform for run in sweep.runs})
    if len(platforms) > 1:
        raise UserError(f"sweep {sweep.names} has runs with platform={' and '.join(platforms)}: give --config.platform")
    shares = divide(jobs, sorted(os.sched_getaffinity(0)), gpus_here(platforms[0], os.environ))
    states = {run.index: RunPlace(out, run.name).state_at_rest() for run in sweep.runs}
    left = [r for r in sweep.runs if states[r.index] not in ENDED and (retry or states[r.index] != FAILED)]
    taken = {run.index for run in sweep.runs} - {run.index for run in left}
    if sweep.bisects:
        bisection = Bisection(sweep, out)
        choose: Choose = functools.partial(bisection.next_group, lanes)
        groups: list[Group] = [(run,) for cell in bisection.cells for run in cell.rungs[0]]
        display = Display(out, sweep, {}, bisection.progress)
    else:
        groups = in_groups(left, lanes) if lanes > 1 else [(run,) for run in left]
        choose = functools.partial(_first, groups)
        display = Display(out, sweep, {run.index: run_flops(run.config) for run in left})
    if choose(taken):
        runner = Runner(out, platforms[0], choose, groups, taken, retry, display)
        with _heeding_signals(runner):
            _run(runner, shares[: len(groups)])
        if runner.signals:
            print("stopped; the same command goes on from here", flush=True)
            return INTERRUPTED_EXIT
    states = {run.index: RunPlace(out, run.name).state() for run in sweep.runs}
    display.close(Counter(states.values()))
    if sweep.bisects:
        print("\n".join(bisection.lines()), flush=True)
        return 0 if bisection.settled() == len(bisection.cells) else FAILED_EXIT
    return 0 if all(state in ENDED for state in states.values()) else FAILED_EXIT


def _first(groups: Iterable[Group], taken: Collection[int]) -> Group:
    return next((group for group in groups if group[0].index not in taken), ())


def _run(runner: Runner, shares: Sequence[Share]) -> None:
    try:
        for share in shares:
            runner.start(share)
        while runner.at_work() and not runner.signals:
            for key, _ in runner.selector.select(_LOOK_S):
                runner.hear(key.data)
            runner.hand_out()
            runner.display.show([run for worker in runner.workers for run in worker.group])
    finally:
        runner.end()


@contextlib.contextmanager
def _heeding_signals(runner: Runner) -> Iterator[None]:
    """SIGTERM, SIGHUP and Ctrl-C end the runner when the runs at work have saved their step."""

    def handler(number: int, frame: Any) -> None:
        runner.signals += 1

    numbers = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]
    usual = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous in usual.items():
            signal.signal(number, previous)
