"""Fuzzes the command line: every argument list is either a run that can start, or is refused in one line.

    python -m experiments.campaigns.fuzz --count 300 --seed 0 --json experiments/results/fuzz.json

Each case is train's argument list with something wrong, or merely odd, in it. It goes the way that training goes, up to
where the first program would be compiled: parse, load, open the data, resolve, define the model, trace train and
evaluation step. (Not covered: `platform`, which no one process can try twice.) Exit code 1 if a case ends otherwise.
"""

import os
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import chdir, closing, contextmanager
from itertools import cycle, islice
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np

from experiments.campaigns.fuzz_mutations import CONFIG, MUTATIONS
from experiments.record import about, save_record
from spannorm_jax.command import Parser, run_command
from spannorm_jax.config import CheckpointConfig, Config
from spannorm_jax.errors import UserError, one_line
from spannorm_jax.model.definition import count_params, flops_per_token
from spannorm_jax.model.initialisation import initial_size
from spannorm_jax.paths import user_path
from spannorm_jax.run.checkpoint import Checkpoints
from spannorm_jax.run.folder import CHECKPOINTS, open_run
from spannorm_jax.run.state import TrainState
from spannorm_jax.train import parse
from spannorm_jax.training.optimizer import learning_rate
from spannorm_jax.training.session import match_machine
from spannorm_jax.training.task import abstract_batch

FOLDER = "run"  # of the cases that are not about it
BASE = ("depth=2", "width=32")
LIMIT_S = 300  # a case; the slowest that is legal prepares a dataset, for half a minute on a busy machine
MAX_LINE = 1000


def make_cases(count: int, seed: int) -> list[tuple[str, list[str]]]:
    """`count` pairs of (kind, train's arguments), the kinds in turn."""
    rng = random.Random(seed)
    base = ["--config", f"{CONFIG}:{','.join(BASE)}", "--workdir", FOLDER]
    return [(kind, [*base, *mutation(rng)]) for kind, mutation in islice(cycle(MUTATIONS.items()), count)]


class _TooLong(BaseException):
    """Not an Exception, so that nothing on the way can take it for the user's mistake."""


@contextmanager
def time_limit(seconds: float):
    def expired(number, frame):
        raise _TooLong

    usual = signal.signal(signal.SIGALRM, expired)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, usual)


def keep_and_find(workdir: Path) -> None:
    """Raises what a checkpoint in that folder makes of its name."""
    state = jax.device_put(TrainState(np.int32(1), {"w": np.ones(2, np.float32)}, {"m": np.ones(2, np.float32)}, {}))
    with open_run(workdir, Config()):
        for config in (CheckpointConfig(), None):  # a trainer's, a reader's
            with closing(Checkpoints(workdir / CHECKPOINTS, config)) as checkpoints:
                if config:
                    checkpoints.save(1, state, {})
                else:
                    checkpoints.find(1)


def start(argv: list[str]) -> None:
    """What training does up to its first compilation, and what would make its first numbers useless.

    Raises:
      UserError: the arguments are refused.
      ValueError: they were accepted, and the run could not have gone well.
    """
    config, workdir, flags, _ = parse(argv)
    session = match_machine(config, workdir, flags)
    config, program = session.config, session.program
    if workdir != Path(FOLDER):
        keep_and_find(workdir)
    session.rows(1, 0, 1)
    count_params(session.model), flops_per_token(session.model, config.data.seq_len)
    with jax.set_mesh(session.mesh):
        state, fields = program.abstract_state, session.task.eval_fields(config)
        jax.eval_shape(program.train, state, program.abstract_batch, session.numbers)
        held_out = abstract_batch(fields, session.mesh)
        jax.eval_shape(program.evaluate, state.params, state.model_state, held_out)
    updates = (1, config.training.steps)
    rates = [float(learning_rate(config.optim.schedule, session.numbers, update)) for update in updates]
    stds = [np.float32(np.max(initial_size(config.model, spec))) for spec in session.model.specs()]
    if not np.all(np.isfinite([*rates, *stds])):
        raise ValueError(f"accepted, but the learning rate or a weight's std is not finite: {rates} {stds}")


def attempt(argv: list[str], limit_s: float = LIMIT_S) -> tuple[str, str]:
    """("valid" | "refused" | "hole", what was seen)."""
    try:
        with time_limit(limit_s):
            start(argv)
        return "valid", ""
    except UserError as error:
        line = one_line(error)
        if not line or len(line) > MAX_LINE:
            return "hole", f"a line of {len(line)} characters"
        return "refused", line
    except _TooLong:
        return "hole", f"no answer within {limit_s} s"
    except (Exception, SystemExit) as error:  # whatever else comes out is what we are here to find
        return "hole", f"{type(error).__name__}: {one_line(error)[:300]}"


def campaign(count: int, seed: int, show: Callable[[str], Any] = print) -> list[dict[str, Any]]:
    """Runs the cases in a folder of their own; token stores that they make do not outlive it."""
    made, began = [], time.monotonic()
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict(os.environ, XDG_CACHE_HOME=f"{folder}/cache"),
        chdir(folder),  # odd values of data.data_dir are folders here
    ):
        for number, (kind, argv) in enumerate(make_cases(count, seed), 1):
            outcome, seen = attempt(argv)
            shown = [ascii(a)[1:-1][:120] for a in argv[4:]]
            made.append({"kind": kind, "arguments": shown, "outcome": outcome, "seen": ascii(seen)[1:-1]})
            if outcome == "hole":
                show(f"HOLE {kind}: {shown}: {seen}")
            if number % 50 == 0:
                show(f"{number}/{count} cases, {time.monotonic() - began:.0f} s")
    return made


def main(argv: list[str]) -> int:
    parser = Parser(prog="python -m experiments.campaigns.fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=user_path, help="where the record goes")
    args = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")  # nothing is computed
    began = time.monotonic()
    cases = campaign(args.count, args.seed, lambda text: print(text, flush=True))
    outcomes = Counter(case["outcome"] for case in cases)
    print(", ".join(f"{n} {name}" for name, n in sorted(outcomes.items())), f"in {time.monotonic() - began:.0f} s")
    if args.json:
        facts = {"seed": args.seed, "outcomes": dict(outcomes), "seconds": round(time.monotonic() - began, 1)}
        save_record(args.json, about("experiments.campaigns.fuzz", argv) | facts | {"cases": cases})
    return 1 if outcomes["hole"] else 0


if __name__ == "__main__":
    run_command(main, lasting=True)
