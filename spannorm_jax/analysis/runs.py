"""Run folders -> rows: what each run reached, and the seeds of one setting taken together.

A run's folder is all that is read. Numbers that a folder does not hold are None, never guessed.
"""

import contextlib
import json
import math
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spannorm_jax.config import NAMES_OF_DATA, RUNTIME_KEYS
from spannorm_jax.errors import UserError, one_line

# What a report compares; a difference in any other config key is said aloud.
COMPARED_KEYS = ("model.placement", "model.init", "seed")
# A finished run has stalled unless its train loss is this far below the unigram entropy.
STALL_MARGIN = 0.05  # at least, as a fraction of the entropy
FINAL_FRACTION = 0.1  # of the steps taken, over which the train loss is averaged
WARMUP_STEPS = 5  # left out of tokens/s: they hold compilation

PLACEMENT_ORDER = ("pre", "post", "span")  # others follow in alphabetical order
INIT_ORDER = ("plain", "gpt2", "scale")

_NEEDED = {"model.placement": str, "model.init": str, "seed": int, "training.steps": int}  # what makes a config a run's


# ---- reading ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One run's folder, read."""

    folder: Path
    config: dict[str, Any] = field(repr=False)  # nested, as in config.json
    starts: tuple[dict[str, Any], ...] = field(repr=False)  # one for each time the trainer started
    metrics: tuple[dict[str, Any], ...] = field(repr=False)  # by step, each step once
    evals: tuple[dict[str, Any], ...] = field(repr=False)  # in the order written
    done: dict[str, Any] | None = None
    diverged: dict[str, Any] | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Dotted config keys to values."""
        return _flatten(self.config)

    @property
    def placement(self) -> str:
        return self.options["model.placement"]

    @property
    def init(self) -> str:
        return self.options["model.init"]

    @property
    def seed(self) -> int:
        return self.options["seed"]

    @property
    def steps(self) -> int:
        """Steps asked for."""
        return self.options["training.steps"]

    @property
    def last_step(self) -> int:
        """The last step logged; 0 before the first."""
        return self.metrics[-1]["step"] if self.metrics else 0

    @property
    def data(self) -> dict[str, Any]:
        """What the last start recorded about the data."""
        return (self.starts[-1].get("data") if self.starts else None) or {}

    @property
    def fingerprint(self) -> str:
        """Hash of the data; "" when it was not recorded."""
        return self.options.get("data.fingerprint") or self.data.get("fingerprint") or ""

    @property
    def unigram_entropy(self) -> float | None:
        """Nats per token of the training split's token frequencies."""
        return finite(self.data.get("unigram_entropy"))


def _flatten(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def finite(value: Any) -> float | None:
    """The value, or None where there is no number: files hold null there, and those of older code NaN or Infinity."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if number and math.isfinite(value) else None


def _read_bytes(path: Path) -> bytes | None:
    """The file's content, or None when there is no such file."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def _parse(text: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {one_line(error)}") from error
    if not isinstance(value, dict):
        raise UserError(f"{where} is not a JSON object but {one_line(value)[:40]!r}")
    return value


def _read_object(path: Path) -> dict[str, Any] | None:
    text = _read_bytes(path)
    return None if text is None else _parse(text, str(path))


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file, less half a last line, which a killed writer leaves."""
    lines = (_read_bytes(path) or b"").split(b"\n")
    objects = [_parse(line, f"{path} line {number}") for number, line in enumerate(lines[:-1], start=1) if line.strip()]
    with contextlib.suppress(UserError):  # nothing, half a line or a whole one
        objects.append(_parse(lines[-1], str(path)))
    return objects


def _by_step(lines: Iterable[dict[str, Any]], path: Path) -> list[dict[str, Any]]:
    """Sorted by step; of two lines for a step the later counts."""
    steps: dict[int, dict[str, Any]] = {}
    for line in lines:
        step = line.get("step")
        if not isinstance(step, int) or isinstance(step, bool):
            raise UserError(f"{path} has a line without an integer 'step': {str(line)[:60]}")
        steps[step] = line
    return [steps[step] for step in sorted(steps)]


class NotARun(UserError):
    """A folder's config.json is not that of a run."""


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    text = _read_bytes(path)
    if text is None:
        raise NotARun(f"{folder} holds no config.json; name the folder of a run")
    try:
        config = _parse(text, str(path))
    except UserError as error:
        raise NotARun(str(error)) from error
    options = _flatten(config)
    for key, kind in _NEEDED.items():
        if not isinstance(options.get(key), kind):
            raise NotARun(f"{path} holds no {key}; is it a run's config?")
    return config


def read_run(folder: str | os.PathLike[str]) -> Run:
    """Reads one run's folder, finished or not.

    Raises:
      NotARun: config.json is absent, is no JSON object, or lacks a key that a report needs.
      UserError: a file is damaged.
    """
    folder = Path(folder)
    config = _read_config(folder)
    evals = _read_lines(folder / "eval.jsonl")
    _by_step(evals, folder / "eval.jsonl")  # only to check the steps: the order written counts
    return Run(
        folder=folder,
        config=config,
        starts=tuple(_read_lines(folder / "starts.jsonl")),
        metrics=tuple(_by_step(_read_lines(folder / "metrics.jsonl"), folder / "metrics.jsonl")),
        evals=tuple(evals),
        done=_read_object(folder / "DONE"),
        diverged=_read_object(folder / "DIVERGED"),
    )


def find_runs(root: str | os.PathLike[str], passed_over: Callable[[str], None] = lambda why: None) -> list[Run]:
    """Reads every run below `root` (or `root` itself), in order of path.

    A run's own subfolders are not searched: its checkpoints hold a config.json too. Other programs' folders hold a
    config.json as well: `passed_over` is told why it is not a run's, and what is below is searched.

    Raises:
      UserError: `root` is no folder, holds no run, or a run is damaged.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root} is not a folder; name the folder that holds the runs")
    runs, foreign = [], []
    for folder, subfolders, files in os.walk(root):
        subfolders.sort()
        if "config.json" in files:
            try:
                runs.append(read_run(folder))
                subfolders.clear()
            except NotARun as why:
                foreign.append(str(why))
    if not runs:
        more = f" (and {len(foreign) - 1} more)" if len(foreign) > 1 else ""
        raise UserError(f"no run below {root}: {foreign[0] + more if foreign else 'no folder holds a config.json'}")
    for why in foreign:
        passed_over(why)
    return runs


# ---- one run ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    kind: str  # diverged | unfinished | stalled | trained
    step: int  # where it diverged, or the last step logged
    steps: int  # asked for

    def __str__(self) -> str:
        notes = {
            "diverged": f" (step {self.step})",
            "unfinished": f" (step {self.step} of {self.steps})",
        }
        return self.kind + notes.get(self.kind, "")


@dataclass(frozen=True)
class Row:
    """What one run reached; None stands for a number that its folder does not hold."""

    placement: str
    init: str
    seed: int
    train_loss: float | None  # nats/token, mean over the last 10% of steps; None when diverged
    bits_per_byte: float | None  # held out, of the newest evaluation of the highest step
    tokens_per_s: float | None  # median over the steps after the first 5
    outcome: Outcome
    run: Run = field(repr=False)


def train_loss(run: Run) -> float | None:
    """Mean loss over the last 10% of the steps taken (at least the last one), in nats per token."""
    first = (1 - FINAL_FRACTION) * run.last_step
    losses = [finite(line.get("loss")) for line in run.metrics if line["step"] > first + 1e-6]
    return None if not losses or None in losses else math.fsum(losses) / len(losses)


def held_out(run: Run) -> dict[str, Any] | None:
    """The evaluation that counts: newest of the highest step, on the config's held-out split.

    Other splits count only when that one was never evaluated, the training split never.
    """
    options = run.options
    lines = [e for e in run.evals if e.get("split") in (None, options.get("data.eval_split"))]
    if not lines:
        lines = [e for e in run.evals if e.get("split") != options.get("data.train_split")]
    return max(reversed(lines), key=lambda e: e["step"], default=None)  # the first of equals wins


def outcome(run: Run) -> Outcome:
    """How the run ended.

    diverged    a loss or gradient became non-finite.
    unfinished  neither diverged nor done: still running, or stopped.
    stalled     done, but its train loss is not at least 5% (`STALL_MARGIN`) below the unigram
                entropy of the training data: it has learnt little more than token frequencies.
    trained     done, and not stalled (or the entropy was not recorded).
    """
    last = run.last_step
    if run.diverged is not None:
        step = run.diverged.get("step")
        return Outcome("diverged", step if isinstance(step, int) else last, run.steps)
    if run.metrics and finite(run.metrics[-1].get("loss")) is None:
        return Outcome("diverged", last, run.steps)
    if run.done is None:
        return Outcome("unfinished", last, run.steps)
    loss, entropy = train_loss(run), run.unigram_entropy
    stalled = loss is not None and entropy is not None and loss > (1 - STALL_MARGIN) * entropy
    return Outcome("stalled" if stalled else "trained", last, run.steps)


def summarise(run: Run) -> Row:
    """The run's numbers, as `Row` defines them."""
    ended = outcome(run)
    speeds = [finite(m.get("tokens_per_s")) for m in run.metrics if m["step"] > WARMUP_STEPS]
    speeds = [s for s in speeds if s is not None]
    evaluation = held_out(run)
    return Row(
        placement=run.placement,
        init=run.init,
        seed=run.seed,
        train_loss=None if ended.kind == "diverged" else train_loss(run),
        bits_per_byte=None if evaluation is None else finite(evaluation.get("bits_per_byte")),
        tokens_per_s=statistics.median(speeds) if speeds else None,
        outcome=ended,
        run=run,
    )


def fact(run: Run, key: str) -> str:
    """What each start recorded under `key`, told again wherever it changed between starts."""
    told = [_words(start[key]) for start in run.starts if start.get(key)]
    return ", then ".join(dict.fromkeys(told)) or "not recorded"


def _words(value: Any) -> str:
    """`value` in words: a dictionary as `name value, name value`, a large number with commas."""
    if value is None:
        return "not recorded"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_words(value[name])}" for name in sorted(value))
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() else f"{value:.6g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


# ---- several runs -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Spread:
    mean: float
    deviation: float | None  # sample standard deviation (n - 1); None for one run
    n: int


@dataclass(frozen=True)
class Group:
    """Rows that differ in nothing but the seed."""

    placement: str
    init: str
    variant: tuple[tuple[str, str], ...]  # other config keys in which the rows of the report differ
    rows: tuple[Row, ...]

    @property
    def counted(self) -> tuple[Row, ...]:
        """The rows that means are taken over: finished ones, else unfinished, else diverged."""
        for kinds in (("trained", "stalled"), ("unfinished",), ("diverged",)):
            rows = tuple(r for r in self.rows if r.outcome.kind in kinds)
            if rows:
                return rows
        return ()

    def over_seeds(self, number: Callable[[Row], float | None]) -> Spread | None:
        values = [v for v in map(number, self.counted) if v is not None]
        if not values:
            return None
        deviation = statistics.stdev(values) if len(values) > 1 else None
        return Spread(math.fsum(values) / len(values), deviation, len(values))

    @property
    def ending(self) -> str:
        """The outcomes of all the seeds, in words."""
        if len(self.rows) == 1:
            return str(self.rows[0].outcome)
        kinds: dict[str, list[int]] = {}
        for row in self.rows:
            kinds.setdefault(row.outcome.kind, []).append(row.outcome.step)
        if set(kinds) <= {"trained", "stalled"} and len(kinds) == 1:
            return next(iter(kinds))
        parts = []
        for kind, steps in kinds.items():
            at = f" (step{'s'[: len(steps) > 1]} {', '.join(map(str, sorted(steps)))})"
            parts.append(f"{len(steps)} {kind}{at if kind in ('diverged', 'unfinished') else ''}")
        return ", ".join(parts)


def ranked(names: Iterable[str], order: Sequence[str]) -> list[str]:
    """Distinct names: those of `order` first, in its order, then the others alphabetically."""
    return sorted(set(names), key=lambda n: (order.index(n) if n in order else len(order), n))


def is_runtime(key: str) -> bool:
    """Whether a config key leaves the numbers as they are, beyond float rounding."""
    return any(key == r or key.startswith(r + ".") for r in RUNTIME_KEYS)


def differing_keys(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Config keys that differ, but for those compared -> each run's value as JSON.

    What names the data is left out where they are the same.
    """
    all_options = [run.options | {"data.fingerprint": run.fingerprint} for run in runs]
    same_data = len({run.fingerprint for run in runs}) == 1 and runs[0].fingerprint
    left_out = COMPARED_KEYS + (NAMES_OF_DATA if same_data else ())
    keys = list(dict.fromkeys(key for options in all_options for key in options))
    values = {
        key: [json.dumps(o[key]) if key in o else "absent" for o in all_options] for key in keys if key not in left_out
    }
    return {key: texts for key, texts in values.items() if len(set(texts)) > 1}


def over_seeds(rows: Sequence[Row]) -> list[Group]:
    """Groups rows that differ in nothing but the seed, ordered by placement and initialisation."""
    differing = differing_keys([row.run for row in rows])
    differing = {key: texts for key, texts in differing.items() if not is_runtime(key)}
    groups: dict[tuple, list[Row]] = {}
    for i, row in enumerate(rows):
        variant = tuple((key, texts[i].strip('"')) for key, texts in differing.items())
        groups.setdefault((row.placement, row.init, variant), []).append(row)
    placements = ranked((row.placement for row in rows), PLACEMENT_ORDER)
    inits = ranked((row.init for row in rows), INIT_ORDER)
    made = [Group(*key, tuple(sorted(g, key=lambda r: r.seed))) for key, g in groups.items()]
    return sorted(made, key=lambda g: (placements.index(g.placement), inits.index(g.init), g.variant))
