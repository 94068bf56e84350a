"""Files of a sweep's folder beside its runs: who works on a run, why it failed, how it was specified.

OUT/NAME/          a run, as spannorm_jax.train makes it
OUT/.sweep/NAME/   LOCK    held by the process at work on the run, from its start to its evaluation
                   FAILED  {"reason": ...}, until it is tried again
                   asked.json  spec, overrides and identity: what the name is a hash of
                   log.txt what train and evaluate printed
OUT/reports/       reports, each by the names of its sweep
"""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spannorm_jax.config import Config, flatten
from spannorm_jax.durable import unwritable
from spannorm_jax.errors import UserError
from spannorm_jax.run import lines
from spannorm_jax.run.folder import (
    CHECKPOINTS,
    CONFIG,
    DIVERGED,
    DONE,
    LOCK,
    METRICS,
    is_evaluated,
    read_config,
    read_mark,
)
from spannorm_jax.run.store import append_text, exclusive, is_locked, make_folder, on_disk, write_json
from spannorm_jax.sweep.expansion import Run, identity

NEW, RUNNING, STOPPED, FAILED = "new", "running", "stopped", "failed"
TRAINED, GONE_OFF = "done", "diverged"
ENDED = (TRAINED, GONE_OFF)  # results: a run that diverged is one
STATES = (TRAINED, GONE_OFF, FAILED, RUNNING, STOPPED, NEW)
REPORTS = "reports"
STOPPED_EXIT = 75  # of train and of `run`, if a signal stops them before the end: a scheduler starts them again
_NOTES, _FAILED, _ASKED, _LOG = ".sweep", "FAILED", "asked.json", "log.txt"


@dataclass(frozen=True)
class RunPlace:
    """A run's folders in the folder of all runs."""

    out: Path
    name: str

    @property
    def workdir(self) -> Path:
        return self.out / self.name

    @property
    def notes(self) -> Path:
        return self.out / _NOTES / self.name

    @property
    def log(self) -> Path:
        return self.notes / _LOG

    # ---- how far it is

    def trained(self) -> bool:
        """Whether training has ended by itself: at its last step, or diverged."""
        marks = (self.workdir / DONE).exists() or (self.workdir / DIVERGED).exists()
        return marks and (self.workdir / CONFIG).exists()

    def to_train(self) -> bool:
        """Whether training has something to do, or to look at: a last checkpoint that waits for its evaluation."""
        return not self.trained() or (not (self.workdir / DIVERGED).exists() and self.to_evaluate() is not None)

    def to_evaluate(self) -> int | None:
        """The step of a trained run that waits for its evaluation: its last, or the last good one where it diverged.

        None: it is evaluated on what its config asks for, or it diverged before its first good
        checkpoint, or is a record without checkpoints.
        """
        diverged, config = read_mark(self.workdir / DIVERGED), read_config(self.workdir)
        if diverged is None:
            step = (read_mark(self.workdir / DONE) or {}).get("step", config.training.steps)
        else:
            step = diverged.get("last_good_checkpoint")
            if not any((self.workdir / CHECKPOINTS).glob("*")):
                step = None
        return None if step is None or is_evaluated(self.workdir, config, step) else step

    def state(self) -> str:
        """One of STATES, for whoever does not work on the run."""
        state = self.state_at_rest()
        return RUNNING if state not in ENDED and is_locked(self.notes / LOCK) else state

    def state_at_rest(self) -> str:
        """One of STATES but RUNNING: what there is to go on from, for the process that has claimed the run."""
        with contextlib.suppress(UserError):  # a config that cannot be read, which whoever goes on says
            if self.trained() and self.to_evaluate() is None:
                return GONE_OFF if (self.workdir / DIVERGED).exists() else TRAINED
        if (self.notes / _FAILED).exists():
            return FAILED
        return STOPPED if (self.workdir / CONFIG).exists() else NEW

    def last_step(self) -> int:
        """The last step that is logged; 0 before the first."""
        for line in reversed(lines.tail(self.workdir / METRICS)):
            with contextlib.suppress(ValueError, KeyError, TypeError):  # half a line, while it is written
                return int(json.loads(line)["step"])
        return 0

    # ---- claims and failures

    @contextlib.contextmanager
    def claim(self, wait: bool = False) -> Iterator[None]:
        """Keeps other runners off the run. The kernel lets go when this process dies.

        Raises:
          InUse: another process has claimed it, and it is not waited for.
          UserError: the folder cannot be written.
        """
        with contextlib.ExitStack() as stack:
            with self.writing():
                make_folder(self.notes)
                stack.enter_context(exclusive(self.notes / LOCK, f"run {self.name}", wait))
            yield

    def failure(self) -> str:
        """Why the run failed; "" if it did not."""
        try:
            return str(json.loads((self.notes / _FAILED).read_text(encoding="utf-8"))["reason"])
        except FileNotFoundError:
            return ""
        except (ValueError, KeyError, TypeError):
            return "for a reason that cannot be read any more"

    def fail(self, reason: str) -> None:
        """Records a failure. Raises UserError with its reason if it cannot be written."""
        with self.writing(f"run {self.name} has failed ({reason}), which cannot be recorded: "):
            write_json(self.notes / _FAILED, {"reason": reason, "log": str(self.log)})

    def forgive(self) -> None:
        with self.writing():
            (self.notes / _FAILED).unlink(missing_ok=True)

    @contextlib.contextmanager
    def writing(self, before: str = "") -> Iterator[None]:
        """Around what is written beside a run. Raises UserError if it cannot be; the line begins with `before`."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{before}cannot write in --out {self.out}: {unwritable(error) or error.strerror}; mend that and "
                "repeat the command, which goes on from here, or give another folder"
            ) from error

    @contextlib.contextmanager
    def printing(self) -> Iterator[None]:
        """Everything that this process prints, also below Python, is appended to the run's log."""
        with self.writing():
            make_folder(self.notes)
            local = on_disk(self.notes) / _LOG
            log = os.open(local, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        sys.stdout.flush()
        sys.stderr.flush()
        usual = [os.dup(1), os.dup(2)]
        for descriptor in (1, 2):
            os.dup2(log, descriptor)
        os.close(log)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for descriptor, before in zip((1, 2), usual, strict=True):
                os.dup2(before, descriptor)
                os.close(before)
            if local != self.log:
                with self.writing():
                    append_text(self.log, local)


# ---- what was asked ---------------------------------------------------------------------------------


def write_asked(place: RunPlace, run: Run) -> None:
    """Records what a claimed run was asked as: a later start tells by it what has changed."""
    values = {"spec": run.spec, "overrides": dict(run.overrides), "identity": identity(run.config)}
    with place.writing():
        write_json(place.notes / _ASKED, values)


Asked = dict[tuple[str, frozenset[tuple[str, str]]], list[tuple[str, dict[str, Any]]]]


def asked_before(out: Path) -> Asked:
    """What the runs in `out` were asked as: spec and overrides -> names and identities."""
    found: Asked = {}
    for path in sorted((out / _NOTES).glob(f"*/{_ASKED}")):
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):  # damaged: it tells nothing
            asked = json.loads(path.read_text(encoding="utf-8"))
            key = (asked["spec"], frozenset(asked["overrides"].items()))
            found.setdefault(key, []).append((path.parent.name, dict(asked["identity"])))
    return found


def former(asked: Asked, run: Run) -> list[tuple[str, list[tuple[str, Any, Any]]]]:
    """Names that this run had when it was asked the same way before, each with (key, value then, value now).

    There are some when the config file has changed since.
    """
    same = asked.get((run.spec, frozenset(run.overrides)), [])
    return [(name, _changed(then, run.config)) for name, then in same if name != run.name]


def _changed(then: dict[str, Any], config: Config) -> list[tuple[str, Any, Any]]:
    default = flatten(Config())
    now = json.loads(json.dumps(identity(config)))  # lists for tuples, as in the record
    keys = sorted(then.keys() | now.keys())
    both = [(key, then.get(key, default.get(key)), now.get(key, default.get(key))) for key in keys]
    return [(key, old, new) for key, old, new in both if old != new]
