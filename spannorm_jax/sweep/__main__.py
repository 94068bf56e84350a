"""Sweeps: python -m spannorm_jax.sweep NAMES VERB [--size cpu|gpu] [--out runs/sweeps] [--config.a.b=c]

NAMES are sweeps of a config file (`sweep_NAME` in configs/*.py), and several with commas between are multiplied:
demo,seed. An override is one of every run. VERB is one of

  list    a line a run: index, folder, argument and overrides
  cost    FLOPs, hours at this machine's measured rate, disk
  local   trains and evaluates what is left, --jobs at a time; the same command goes on after whatever stopped it.
          With --lanes K up to K runs that differ only in numbers, seed or initialisation are one vmapped program
  run I   does run I alone, as a task of an array
  slurm   submits what is missing as an array
  status  how far each run is, and which key has changed where a run has another name than before
  table   the table of the runs that have started
  report  tables, figures and a page of them, in OUT/reports

Of a sweep that bisects (`definition.bisects`) only those runs are done that decide its ceilings.

A run that diverged is a result. One that failed is tried again with --retry.
"""

import argparse
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from spannorm_jax.command import Parser, add_flags, flags_of, run_command
from spannorm_jax.config_file import split_overrides
from spannorm_jax.durable import InUse
from spannorm_jax.errors import UserError, did_you_mean, one_line
from spannorm_jax.resolution import num_steps
from spannorm_jax.run.bucket import in_bucket
from spannorm_jax.run.folder import run_folder_path
from spannorm_jax.sweep.definition import SIZES
from spannorm_jax.sweep.expansion import Run, Sweep, expand, shown
from spannorm_jax.sweep.records import ENDED, FAILED, NEW, STATES, STOPPED, STOPPED_EXIT, RunPlace, asked_before, former

VERBS = ("list", "cost", "local", "run", "slurm", "status", "table", "report")
_OF_VERB = {  # flags that mean nothing with other verbs, by their default
    "jobs": (None, ("local",)),
    "lanes": (1, ("local",)),
    "retry": (False, ("local", "run", "slurm")),
    "rate": (None, ("cost",)),
    "at_most": (None, ("slurm",)),
    "sbatch": (None, ("slurm",)),
    "of": (None, ("run",)),
    "index": (None, ("run",)),
    "coordinator": (None, ("run",)),
    "num_processes": (None, ("run",)),
    "process_id": (None, ("run",)),
}


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[tuple[str, str]]]:
    """Flags and overrides of a command line. Raises UserError."""
    rest, overrides = split_overrides(argv)
    parser = Parser(
        prog="python -m spannorm_jax.sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", metavar="NAMES", help="sweeps, with commas between")
    parser.add_argument("verb", metavar="VERB", help=" | ".join(VERBS))
    parser.add_argument("index", metavar="I", nargs="?", type=int, help="of the run, for run")
    parser.add_argument("--size", choices=SIZES, default=SIZES[0], help="what the runs are made for (default: cpu)")
    parser.add_argument("--config", metavar="FILE", help="the file that defines them (default: the one in configs/)")
    parser.add_argument("--out", type=run_folder_path, default=Path("runs/sweeps"), help="folder of all runs")
    parser.add_argument("--jobs", type=int, metavar="N", help="local: runs at a time (default: one, or one a GPU)")
    parser.add_argument("--lanes", type=int, default=1, metavar="K", help="local: runs that a job trains together")
    parser.add_argument("--retry", action="store_true", help="local, run, slurm: also what has failed")
    parser.add_argument("--rate", type=float, metavar="FLOP/s", help="cost: in place of the measured one")
    parser.add_argument("--at_most", type=int, metavar="N", help="slurm: tasks at one time (default 8)")
    parser.add_argument("--sbatch", metavar="OPTIONS", help="slurm: of sbatch, in quotes")
    parser.add_argument("--of", metavar="HASH", help="run: refuse if the sweep is no longer the one of this hash")
    add_flags(parser)
    args = parser.parse_args(rest)
    if args.verb not in VERBS:
        raise UserError(f"unknown verb {args.verb!r}; {did_you_mean(args.verb, VERBS)}")
    for name, (default, verbs) in _OF_VERB.items():
        if getattr(args, name) != default and args.verb not in verbs:
            flag = "I" if name == "index" else f"--{name}"
            raise UserError(f"{flag} goes with {', '.join(verbs)}, not with {args.verb}; leave it out")
    for name in ("jobs", "lanes", "at_most", "rate"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name} {value} must be above 0")
    if not in_bucket(args.out):
        there = next(path for path in (args.out, *args.out.absolute().parents) if path.exists())
        if not there.is_dir():
            raise UserError(f"--out {args.out}: {there} is not a folder; give another")
    if args.verb == "run" and args.index is None:
        raise UserError("run needs the index of a run; list shows them")
    return args, overrides


def main(argv: list[str]) -> int:
    args, overrides = parse(argv)
    sweep = expand(args.names, args.size, args.config, overrides)
    if args.verb == "list":
        return _list(sweep)
    if args.verb == "status":
        return _status(sweep, args.out)
    # What follows needs JAX or the report, which the others do without.
    if args.verb == "cost":
        from spannorm_jax.sweep import cost

        print(cost.report(sweep, args.rate))
        return 0
    if args.verb == "local":
        from spannorm_jax.sweep.runner import local

        return local(sweep, args.out, args.jobs, args.retry, args.lanes)
    if args.verb == "run":
        return _run(sweep, args)
    if args.verb == "slurm":
        from spannorm_jax.sweep.slurm import submit

        if sweep.bisects:
            raise UserError(
                f"sweep {sweep.title} bisects: how runs end decides what is run next, and an array is chosen before; "
                f"start one or more of `sweep {sweep.names} local` with one --out"
            )
        return submit(sweep, args.out, args.at_most or 8, shlex.split(args.sbatch or ""), args.retry)
    from spannorm_jax.sweep.reports import write_report

    return write_report(sweep, args.out, table_only=args.verb == "table")


def _list(sweep: Sweep) -> int:
    for run in sweep.runs:
        print(f"{run.index:4d}  {run.name}  {shown(run)}")
    if sweep.bisects:
        print(f"a bisection: of these {len(sweep.runs)} runs those alone are done that decide its ceilings (status)")
    return 0


def _status(sweep: Sweep, out: Path) -> int:
    asked, states = asked_before(out), Counter[str]()
    for run in sweep.runs:
        place = RunPlace(out, run.name)
        state = place.state()
        states[state] += 1
        if sweep.bisects and state == NEW:
            continue
        print(f"{run.index:4d}  {run.name}  {_how_far(run, place, state)}")
        if state == NEW:
            for name, changes in former(asked, run):
                said = ", ".join(f"{key} was {old!r} and is {new!r}" for key, old, new in changes)
                print(f"      was {name}: {said or 'another version of this code named it'}")
    print(f"{len(sweep.runs)} runs: {', '.join(f'{states[state]} {state}' for state in STATES if states[state])}")
    if sweep.bisects:
        from spannorm_jax.sweep.bisection import Bisection

        print("\n".join(Bisection(sweep, out).lines()))
    return 0


def _how_far(run: Run, place: RunPlace, state: str) -> str:
    if state in ENDED or state == NEW:
        return state
    reason = f": {place.failure()} (see {place.log})" if state == FAILED else ""
    return f"{state} at step {place.last_step()} of {num_steps(run.config)}{reason}"


def _run(sweep: Sweep, args: argparse.Namespace) -> int:
    """Run I in this process: 0 if it has ended, 2 if it fails or has failed, 75 if a signal stops it or it is taken."""
    if not 0 <= args.index < len(sweep.runs):
        raise UserError(f"sweep {sweep.title} has no run {args.index}; its runs are 0 to {len(sweep.runs) - 1}")
    if args.of not in (None, sweep.hash):
        raise UserError(f"sweep {sweep.title} has changed since it was submitted (--of {args.of}, now {sweep.hash})")
    from spannorm_jax.parallel.platform import start_jax
    from spannorm_jax.sweep.work import work

    run = sweep.runs[args.index]
    start_jax(run.config.platform, flags_of(args))
    place = RunPlace(args.out, run.name)
    try:
        state, reason = work(run, place, retry=args.retry, processes=_flags_again(args))
    except InUse as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return STOPPED_EXIT
    if state == FAILED:
        raise UserError(f"run {run.index} ({run.name}) has failed: {reason}; --retry tries it again")
    print(f"run {run.index} ({run.name}): {state}")
    return STOPPED_EXIT if state == STOPPED else 0


def _flags_again(args: argparse.Namespace) -> Sequence[str]:
    """The flags of `add_flags`, as they were given."""
    names = ("coordinator", "num_processes", "process_id", "start_timeout_s", "heartbeat_s")
    return [f"--{name}={value}" for name in names if (value := getattr(args, name)) is not None]


if __name__ == "__main__":
    run_command(main, lasting=True)
