"""A quarter of an hour of one GPU, used from its first second: the most valuable first.

    python -m experiments.gpu_session --prepare                    # where there is no GPU: the data, to be carried
    python -m experiments.gpu_session --compile h100 --out plans   # there too: all its programs, by the GPU's compiler
    python -m experiments.gpu_session --minutes 15 --out records   # where there is one

`--prepare` packs the token stores that are read into WORK/data.tar.xz. The session unpacks it and makes the records of
MEASURES, each before the next begins, then the runs of PLAN, as lanes of one program each. After each part, and at its
end, it packs what has ended into a new archive in OUT. It ends before its minutes do: runs at work save their step, and
the same command goes on. `--config.a.b=c` is one of every measure and run, as for sweeps: with a tiny model on a CPU it
is a rehearsal.
"""

import contextlib
import dataclasses
import io
import os
import signal
import tarfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from experiments.gpu_measures import MEASURES, NO_AUTOTUNING, Overrides, compile_for, measure
from experiments.record import about, save_record
from experiments.sweep_records import ended, keep, unpack
from spannorm_jax.command import Parser, run_command
from spannorm_jax.config import MeshConfig, replace
from spannorm_jax.config_file import split_overrides
from spannorm_jax.data.floors import floors
from spannorm_jax.data.tokens import open_store, open_tokenizer
from spannorm_jax.errors import UserError
from spannorm_jax.parallel.mesh import make_mesh
from spannorm_jax.paths import user_path
from spannorm_jax.plan.target import open_target
from spannorm_jax.plan.topology import known_name
from spannorm_jax.sweep.cost import run_flops
from spannorm_jax.sweep.expansion import Sweep, expand
from spannorm_jax.sweep.records import ENDED, RunPlace
from spannorm_jax.sweep.runner import FAILED_EXIT, INTERRUPTED_EXIT, in_groups, local
from spannorm_jax.training.program_key import program_key


@dataclass(frozen=True)
class Part:
    """The runs of a sweep that have one seed; at most so many are trained together, at about `rate` FLOP/s.

    The rates are guesses from smaller programs of an H100, for the minutes that are said. Nothing follows from them.
    """

    sweep: str
    seed: int
    lanes: int
    rate: float

    def of(self, sweep: Sweep) -> Sweep:
        return dataclasses.replace(sweep, runs=tuple(run for run in sweep.runs if run.config.seed == self.seed))


PLAN = (
    Part("rung_m", 0, lanes=8, rate=1.5e13),
    Part("rate_stress", 0, lanes=8, rate=1.5e13),
    Part("rung_m", 1, lanes=8, rate=1.5e13),
    Part("rate_stress", 1, lanes=8, rate=1.5e13),
    Part("rung_l", 0, lanes=4, rate=3.9e13),
    Part("rung_l", 1, lanes=4, rate=3.9e13),
)
JOBS = 2  # while one compiles or evaluates, the other trains
# None of these changes what a run is. A checkpoint of eight lanes, and small batches of evaluation, keep a GPU waiting.
QUICK = (
    ("checkpoint.every_steps", "1000"),
    ("eval.batch_size", "256"),
    ("metrics.tensorboard", "false"),
)
SAVE_S, KILL_S = 60, 20  # before the end: when runs at work are asked to save their step, and when they are killed

_DATA, _TOKENS, _FULL_NAME, _RUNS = "data.tar.xz", "tokens", "full_name", "sweeps"


# ---- the data -----------------------------------------------------------------------------------------


def prepare(work: Path, overrides: Overrides) -> Path:
    """Packs what all runs of PLAN read: the stores, their floors, and the full name by which they are found again."""
    config = expand(PLAN[0].sweep, "cpu", overrides=overrides).runs[0].config  # all of them read the same
    data = replace(config.data, cache_dir=str(work / _TOKENS))
    train, held_out = open_store(data, data.train_split), open_store(data, data.eval_split)
    floors(train, held_out, open_tokenizer(data), data.seq_len, config.eval.tokens)
    name = io.BytesIO(train.dataset.encode())
    with tarfile.open(work / _DATA, "w:xz") as archive:
        member = tarfile.TarInfo(_FULL_NAME)
        member.size = len(name.getvalue())
        archive.addfile(member, name)
        for path in (train.path, held_out.path, *held_out.path.parent.glob("floors-*.json")):
            archive.add(path, Path(_TOKENS) / path.relative_to((work / _TOKENS).absolute()))
    return work / _DATA


def carried(work: Path) -> Overrides:
    """Unpacks the data, and returns the overrides by which runs find them, whatever sources this machine has."""
    if not (work / _DATA).exists():
        raise UserError(f"there is no {work / _DATA}; make it: python -m experiments.gpu_session --prepare")
    unpack(work / _DATA, work)
    try:
        full_name = (work / _FULL_NAME).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{work / _DATA} was not made by --prepare: it lacks the data's name") from error
    return ("data.cache_dir", str(work / _TOKENS)), ("data.full_name", full_name)


# ---- the session --------------------------------------------------------------------------------------


@contextlib.contextmanager
def ending(seconds: float) -> Iterator[list[int]]:
    """Signals this process before so many seconds are over: to save, then to kill. Yields those that no runner took."""
    signals: list[int] = []
    usual = signal.signal(signal.SIGTERM, lambda number, frame: signals.append(number))
    timers = [threading.Timer(max(0, seconds - s), os.kill, (os.getpid(), signal.SIGTERM)) for s in (SAVE_S, KILL_S)]
    for timer in timers:
        timer.daemon = True
        timer.start()
    try:
        yield signals
    finally:
        for timer in timers:
            timer.cancel()
        signal.signal(signal.SIGTERM, usual)


def session(work: Path, out: Path, seconds: float, overrides: Overrides) -> int:
    """Does what is left of MEASURES and PLAN while the seconds last: 0, or 1 if something failed."""
    end = time.monotonic() + seconds - SAVE_S
    runs, codes, kept = work / _RUNS, list[int](), list[Future[int]]()
    jobs = min(JOBS, len(os.sched_getaffinity(0)))
    with ending(seconds) as signals, ThreadPoolExecutor(1) as packer:  # which packs while the next part trains
        for one in MEASURES:
            left = min(one.limit_s, end - time.monotonic())
            if left > 0 and not signals and not (out / f"gpu-{one.name}.json").exists():
                print(f"{one.name}: at most {left:.0f} s", flush=True)
                if not measure(one, out, left, [*same_text(), *overrides], lambda: bool(signals)):
                    codes.append(FAILED_EXIT)
        os.environ.setdefault("XLA_FLAGS", NO_AUTOTUNING)
        for part in PLAN:
            whole = expand(part.sweep, "cpu", overrides=[*QUICK, *overrides])
            print(_said(part, whole, runs), flush=True)
            if signals or INTERRUPTED_EXIT in codes:
                continue
            codes.append(local(part.of(whole), runs, jobs, False, part.lanes))
            kept.append(packer.submit(keep, part.sweep, ended(whole, runs), runs, out, preset=1))
    for packed in kept:
        packed.result()
    print(f"records of what has ended are in {out}; what is left goes on with the same command")
    return FAILED_EXIT if FAILED_EXIT in codes else 0


def same_text() -> Overrides:
    """A benchmark's config reads what the runs of PLAN read, and no other text need be carried."""
    data = expand(PLAN[0].sweep, "cpu").runs[0].config.data
    return [(f"data.{key}", getattr(data, key)) for key in ("dataset", "train_split", "eval_split", "tokenizer")]


def compiled(chip: str, out: Path, argv: list[str], overrides: Overrides) -> int:
    """Compiles all that a session runs, and records the plans: 1 if one does not compile or fit.

    Raises:
      UserError: the chip's compiler is not here.
    """
    to = open_target(known_name(f"{chip}:1x1x1"), 1)
    overrides = [*same_text(), *overrides]
    with jax.set_mesh(make_mesh(MeshConfig(), to.devices)):  # which implementation `auto` is, is asked of it
        programs = [(one.name, *program) for one in MEASURES for program in one.programs(overrides)]
    lanes: dict[Any, tuple] = {}  # a part's program may be another's
    for part in PLAN:
        for group in in_groups(part.of(expand(part.sweep, "cpu", overrides=overrides)).runs, part.lanes):
            config = group[0].config
            lanes.setdefault(
                (program_key(config), len(group)), (part.sweep, group[0].name, "lanes", config, len(group))
            )
    programs += lanes.values()
    plans: dict[str, dict[str, dict]] = {}
    for name, title, plan in compile_for(to, programs):
        print(name, title, plan, flush=True)
        plans.setdefault(name, {})[title] = plan
        save_record(out / f"gpu-session-{chip}.json", {"about": about("experiments.gpu_session", argv), "plans": plans})
    return FAILED_EXIT if any("error" in plan for part in plans.values() for plan in part.values()) else 0


def _said(part: Part, sweep: Sweep, out: Path) -> str:
    own = part.of(sweep).runs
    left = [run for run in own if RunPlace(out, run.name).state() not in ENDED]
    minutes = sum(run_flops(run.config) for run in left) / part.rate / 60
    much = f"{len(left)} of {len(own)} runs are left, {minutes:.0f} min at {part.rate:.1e} FLOP/s"
    return f"{part.sweep}, seed {part.seed}: {much}"


def main(argv: list[str]) -> int:
    began = time.monotonic()
    rest, overrides = split_overrides(argv)
    parser = Parser(prog="python -m experiments.gpu_session", description=__doc__)
    parser.add_argument("--prepare", action="store_true", help="make WORK/data.tar.xz, and say what the parts take")
    parser.add_argument(
        "--compile", choices=("h100", "h200", "b200"), help="a chip, whose compiler is in the extra gpu"
    )
    parser.add_argument("--minutes", type=float, metavar="M", help="after which the session has ended")
    parser.add_argument("--out", type=user_path, help="folder of the records")
    parser.add_argument("--work", type=user_path, default=Path("runs/gpu_session"), help="folder of data and runs")
    args = parser.parse_args(rest)
    if args.prepare:
        for part in PLAN:
            print(_said(part, expand(part.sweep, "cpu", overrides=overrides), args.work / _RUNS))
        path = prepare(args.work, overrides)
        print(f"carry along {path}, {path.stat().st_size / 2**20:.1f} MiB")
        return 0
    if args.compile:
        if args.out is None:
            raise UserError("--compile takes --out, the folder of its record")
        return compiled(args.compile, args.out, argv, overrides)
    if args.out is None or args.minutes is None or not 1 < args.minutes < 10_000:
        raise UserError("a session takes --out and --minutes, above 1 and below 10,000; or --prepare makes its data")
    overrides = [("platform", "gpu"), *carried(args.work), *overrides]
    return session(args.work, args.out, args.minutes * 60 - (time.monotonic() - began), overrides)


if __name__ == "__main__":
    run_command(main, lasting=True)
