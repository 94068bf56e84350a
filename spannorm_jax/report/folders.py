"""Run folders, read: what each holds, finished or not.

Numbers that a folder does not hold are None or NaN. What cannot be read of a run's files is left out and said, so that
one damaged file costs no report.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from spannorm_jax.config import Config, flatten, former_defaults, is_runtime, unread
from spannorm_jax.errors import UserError, one_line
from spannorm_jax.model.initialisation import reading
from spannorm_jax.paths import NO_UTF8, is_utf8
from spannorm_jax.run.folder import CONFIG, DIVERGED, DONE, EVAL, METRICS, STARTS

_NEEDED = {"model.placement": str, "model.init": str, "seed": int, "training.steps": int}  # what makes a config a run's
_AXES: dict[str, Any] = {"model.depth": int, "model.width": int, "optim.lr": (int, float)}  # of figures
_COLUMNS = ("loss", "grad_norm", "tokens_per_s", "held_out_loss")
_DEFAULTS = flatten(Config())
_BEFORE = {key: value for key, value in (_DEFAULTS | former_defaults()).items() if not is_runtime(key)}


@dataclass(frozen=True, eq=False)
class Metrics:
    """The columns of metrics.jsonl that reports use, by step, each step once; NaN where a line holds no number."""

    step: np.ndarray
    loss: np.ndarray
    grad_norm: np.ndarray
    tokens_per_s: np.ndarray
    held_out_loss: np.ndarray
    block_grad_norm: tuple[tuple[int, list[Any]], ...]  # (step, norms) of the lines that have them


@dataclass(frozen=True)
class RunFolder:
    """One run's folder, read."""

    folder: Path
    config: dict[str, Any] = field(repr=False)  # nested, as in config.json
    starts: tuple[dict[str, Any], ...] = field(repr=False)  # one for each time the trainer started
    metrics: Metrics = field(repr=False)
    evals: tuple[dict[str, Any], ...] = field(repr=False)  # in the order written
    done: dict[str, Any] | None = None
    diverged: dict[str, Any] | None = None
    damage: tuple[str, ...] = ()  # what could not be read
    cut: tuple[str, ...] = ()  # files that end in half a line, which a trainer at work or killed leaves

    @cached_property
    def options(self) -> dict[str, Any]:
        """Dotted config keys to values; of options that are younger than the run, what was done before they came.

        An option that the run's initialisation does not read has its default.
        """
        recorded = _flatten(self.config)
        return _BEFORE | recorded | {key: _DEFAULTS[key] for key in unread(recorded["model.init"])}

    @cached_property
    def of_another_version(self) -> tuple[list[str], list[str]]:
        """Options that the run's config lacks, and options in it that this version does not know."""
        recorded = _flatten(self.config)
        return [k for k in _BEFORE if k not in recorded], [k for k in recorded if k not in _DEFAULTS]

    @property
    def placement(self) -> str:
        return self.options["model.placement"]

    @property
    def init(self) -> str:
        """`model.init`, with the reading of ScaleInit (`model.initialisation.reading`)."""
        options = self.options
        return reading(*(options[f"model.{key}"] for key in ("init", "variance_exponent", "depth_factor")))

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
        return int(self.metrics.step[-1]) if len(self.metrics.step) else 0

    @property
    def data(self) -> dict[str, Any]:
        """What the last start recorded about the data."""
        data = self.starts[-1].get("data") if self.starts else None
        return data if isinstance(data, dict) else {}

    @property
    def fingerprint(self) -> str:
        """Hash of the data; "" when it was not recorded."""
        return self.options["data.fingerprint"] or self.data.get("fingerprint") or ""

    @property
    def unigram_entropy(self) -> float | None:
        """Nats per token of the training split's token frequencies."""
        return finite(self.data.get("unigram_entropy"))

    @property
    def tokens_per_step(self) -> int | None:
        sizes = [self.options.get(key) for key in ("training.batch_size", "data.seq_len")]
        return math.prod(sizes) if all(isinstance(size, int) for size in sizes) else None  # type: ignore[arg-type]

    @property
    def flops_per_token(self) -> float | None:
        return finite(self.starts[-1].get("flops_per_token")) if self.starts else None


def _flatten(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in node.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def finite(value: Any) -> float | None:
    """The value, or None where there is no number: files hold null there, and those of older code NaN or Infinity."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if number and math.isfinite(value) else None


# ---- files ------------------------------------------------------------------------------------


@dataclass
class _Reader:
    """Reads the files of a folder, and keeps what was wrong with them."""

    folder: Path
    damage: list[str] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)

    def content(self, name: str) -> bytes | None:
        """The file's content, or None when there is no such file."""
        try:
            return (self.folder / name).read_bytes()
        except FileNotFoundError:
            pass
        except OSError as error:
            self.damage.append(f"{self.folder / name} cannot be read: {error.strerror}")
        return None

    def object(self, name: str) -> dict[str, Any] | None:
        text = self.content(name)
        try:
            return None if text is None else _parse(text)
        except ValueError as error:
            self.damage.append(f"{self.folder / name} {error}")
        return None

    def lines(self, name: str, with_steps: bool = False) -> list[dict[str, Any]]:
        """The objects of a JSON Lines file, less half a last line, and less lines that are damaged."""
        texts = (self.content(name) or b"").split(b"\n")
        objects, bad = [], []
        for number, text in enumerate(texts, start=1):
            if not text.strip():
                continue
            try:
                objects.append(_parse(text, with_steps))
            except ValueError as error:
                if number < len(texts):
                    bad.append(f"line {number} {error}")
                else:
                    self.cut.append(str(self.folder / name))
        if bad:
            more = f" (and {len(bad) - 1} more lines)" if len(bad) > 1 else ""
            self.damage.append(f"{self.folder / name} {bad[0]}{more}")
        return objects


def _parse(text: bytes, with_step: bool = False) -> dict[str, Any]:
    """The JSON object. Raises ValueError with what ends a line about it."""
    try:
        value = json.loads(text)
        if b"\\u" in text:  # half a character, as "\\ud800" is, would stop whatever writes it
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON: {one_line(error)}") from error
    if not isinstance(value, dict):
        raise ValueError(f"is not a JSON object but {one_line(value)[:40]!r}")
    if with_step and type(value.get("step")) is not int:
        raise ValueError("has no integer 'step'")
    return value


def _columns(lines: Iterable[dict[str, Any]]) -> Metrics:
    """Sorted by step; of two lines for a step the later counts."""
    by_step = {line["step"]: line for line in lines}
    ordered = [by_step[step] for step in sorted(by_step)]
    columns = {key: np.array([finite(line.get(key)) for line in ordered], np.float64) for key in _COLUMNS}
    norms = ((line["step"], line.get("block_grad_norm")) for line in ordered)
    return Metrics(
        step=np.array(sorted(by_step), dtype=np.int64),
        block_grad_norm=tuple((step, values) for step, values in norms if isinstance(values, list) and values),
        **columns,
    )


# ---- folders ----------------------------------------------------------------------------------


class NotARun(UserError):
    """A folder's config is not that of a run."""


def _read_config(reader: _Reader) -> dict[str, Any]:
    path = reader.folder / CONFIG
    config = reader.object(CONFIG)
    if reader.damage:
        raise NotARun(reader.damage[0])
    if config is None:
        raise NotARun(f"{reader.folder} holds no {CONFIG}; name the folder of a run")
    options = _flatten(config)
    missing = [key for key, kind in _NEEDED.items() if not isinstance(options.get(key), kind)]
    missing += [f"number for {key}" for key, kinds in _AXES.items() if not isinstance(options.get(key, 0), kinds)]
    if missing:
        raise NotARun(f"{path} holds no {missing[0]}; is it a run's config?")
    return config


def read_run(folder: str | os.PathLike[str]) -> RunFolder:
    """Reads one run's folder, finished or not.

    Raises:
      NotARun: its config is absent, is no JSON object, or lacks a key that a report needs.
    """
    reader = _Reader(Path(folder))
    config, starts = _read_config(reader), tuple(reader.lines(STARTS))
    metrics, evals = _columns(reader.lines(METRICS, with_steps=True)), tuple(reader.lines(EVAL, with_steps=True))
    done, diverged = reader.object(DONE), reader.object(DIVERGED)
    said = tuple(reader.damage), tuple(reader.cut)
    return RunFolder(reader.folder, config, starts, metrics, evals, done, diverged, *said)


def find_runs(
    roots: str | os.PathLike[str] | Sequence[Path], passed_over: Callable[[str], None] = lambda why: None
) -> list[RunFolder]:
    """Reads every run below the folders `roots` (or those themselves), in order of path, each once.

    A run's own subfolders are not searched, for checkpoints hold a config.json too. Of a config.json that is another
    program's, or lies in a folder whose name is no UTF-8, `passed_over` is told.

    Raises:
      UserError: one of `roots` is no folder, or no run is below any.
    """
    listed = [Path(root) for root in ([roots] if isinstance(roots, str | os.PathLike) else roots)]
    runs: dict[Path, RunFolder] = {}
    foreign: list[str] = []
    for root in listed:
        if not root.is_dir():
            raise UserError(f"{root} is not a folder; name the folder that holds the runs")
        found = False
        for folder, subfolders, files in os.walk(root):
            subfolders.sort()
            if CONFIG not in files:
                continue
            try:
                if is_utf8(Path(folder)):
                    runs.setdefault(Path(folder).resolve(), read_run(folder))
                    found = True
                else:
                    foreign.append(f"{folder} {NO_UTF8}")
                subfolders.clear()
            except NotARun as why:
                foreign.append(str(why))
        if not found and len(listed) > 1:
            foreign.append(f"{root} holds no run's {CONFIG}")
    if not runs:
        more = f" (and {len(foreign) - 1} more)" if len(foreign) > 1 else ""
        names = listed[0] if len(listed) == 1 else f"{len(listed)} folders"
        raise UserError(f"no run below {names}: {foreign[0] + more if foreign else f'no folder holds a {CONFIG}'}")
    for line in dict.fromkeys(foreign):
        passed_over(line)
    return list(runs.values())
