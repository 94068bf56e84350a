"""Run folders, read: what each holds, finished or not.

A run's folder is all that is read, and each file of it once. Numbers that a folder does not hold are None or NaN,
never guessed. What cannot be read of a run's files is left out and said, so that one damaged file costs no report.
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

_NEEDED = {"model.placement": str, "model.init": str, "seed": int, "training.steps": int}  # what makes a config a run's
_TYPES: dict[str, Any] = {
    "model.depth": int,
    "model.width": int,
    "optim.lr": (int, float),
}  # of options that figures have axes for
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
class Run:
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
    def recorded(self) -> dict[str, Any]:
        """Dotted config keys to values, as in config.json."""
        return _flatten(self.config)

    @cached_property
    def options(self) -> dict[str, Any]:
        """The recorded options, and for those that are younger than the run what was done before they came.

        An option that the run's initialisation does not read has its default.
        """
        return _BEFORE | self.recorded | {key: _DEFAULTS[key] for key in unread(self.recorded["model.init"])}

    @cached_property
    def of_another_version(self) -> tuple[list[str], list[str]]:
        """Options that the run's config lacks, and options in it that this version does not know."""
        known = set(flatten(Config()))
        return [k for k in _BEFORE if k not in self.recorded], [k for k in self.recorded if k not in known]

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
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def finite(value: Any) -> float | None:
    """The value, or None where there is no number: files hold null there, and those of older code NaN or Infinity."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if number and math.isfinite(value) else None


def _is_step(step: Any) -> bool:
    return isinstance(step, int) and not isinstance(step, bool)


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
            return None
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
        *whole, last = (self.content(name) or b"").split(b"\n")
        objects, bad = [], []
        for number, line in enumerate(whole, start=1):
            if not line.strip():
                continue
            try:
                value = _parse(line)
                if with_steps and not _is_step(value.get("step")):
                    raise ValueError("has no integer 'step'")
                objects.append(value)
            except ValueError as error:
                bad.append(f"line {number} {error}")
        if bad:
            more = f" (and {len(bad) - 1} more lines)" if len(bad) > 1 else ""
            self.damage.append(f"{self.folder / name} {bad[0]}{more}")
        if last.strip():
            try:
                value = _parse(last)
                if not with_steps or _is_step(value.get("step")):
                    objects.append(value)
            except ValueError:
                self.cut.append(str(self.folder / name))
        return objects


def _parse(text: bytes) -> dict[str, Any]:
    """The JSON object. Raises ValueError with what ends a line about it."""
    try:
        value = json.loads(text)
        if b"\\u" in text:  # half a character, as "\\ud800" is, would stop whatever writes it
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON: {one_line(error)}") from error
    if not isinstance(value, dict):
        raise ValueError(f"is not a JSON object but {one_line(value)[:40]!r}")
    return value


def _columns(lines: Iterable[dict[str, Any]]) -> Metrics:
    """Sorted by step; of two lines for a step the later counts."""
    by_step = {line["step"]: line for line in lines}
    ordered = [by_step[step] for step in sorted(by_step)]

    def column(key: str) -> np.ndarray:
        values = (finite(line.get(key)) for line in ordered)
        return np.array([math.nan if value is None else value for value in values], dtype=np.float64)

    norms = ((line["step"], line.get("block_grad_norm")) for line in ordered)
    return Metrics(
        step=np.array(sorted(by_step), dtype=np.int64),
        loss=column("loss"),
        grad_norm=column("grad_norm"),
        tokens_per_s=column("tokens_per_s"),
        held_out_loss=column("held_out_loss"),
        block_grad_norm=tuple((step, values) for step, values in norms if isinstance(values, list) and values),
    )


# ---- folders ----------------------------------------------------------------------------------


class NotARun(UserError):
    """A folder's config.json is not that of a run."""


def _read_config(reader: _Reader) -> dict[str, Any]:
    path = reader.folder / "config.json"
    config = reader.object("config.json")
    if reader.damage:
        raise NotARun(reader.damage[0])
    if config is None:
        raise NotARun(f"{reader.folder} holds no config.json; name the folder of a run")
    options = _flatten(config)
    for key, kind in _NEEDED.items():
        if not isinstance(options.get(key), kind):
            raise NotARun(f"{path} holds no {key}; is it a run's config?")
    for key, kinds in _TYPES.items():
        if key in options and not isinstance(options[key], kinds):
            raise NotARun(f"{path} holds no number for {key}; is it a run's config?")
    return config


def read_run(folder: str | os.PathLike[str]) -> Run:
    """Reads one run's folder, finished or not.

    Raises:
      NotARun: config.json is absent, is no JSON object, or lacks a key that a report needs.
    """
    reader = _Reader(Path(folder))
    return Run(
        folder=reader.folder,
        config=_read_config(reader),
        starts=tuple(reader.lines("starts.jsonl")),
        metrics=_columns(reader.lines("metrics.jsonl", with_steps=True)),
        evals=tuple(reader.lines("eval.jsonl", with_steps=True)),
        done=reader.object("DONE"),
        diverged=reader.object("DIVERGED"),
        damage=tuple(reader.damage),
        cut=tuple(reader.cut),
    )


def find_runs(
    roots: str | os.PathLike[str] | Sequence[Path], passed_over: Callable[[str], None] = lambda why: None
) -> list[Run]:
    """Reads every run below the folders `roots` (or those themselves), in order of path, each once.

    A run's own subfolders are not searched: its checkpoints hold a config.json too. Other programs' folders hold a
    config.json as well: `passed_over` is told why it is not a run's, and what is below is searched. So it is with a
    folder whose name is no UTF-8, which no table could hold.

    Raises:
      UserError: one of `roots` is no folder, or no run is below any.
    """
    listed = [Path(root) for root in ([roots] if isinstance(roots, str | os.PathLike) else roots)]
    runs: dict[Path, Run] = {}
    foreign: list[str] = []
    for root in listed:
        if not root.is_dir():
            raise UserError(f"{root} is not a folder; name the folder that holds the runs")
        found = False
        for folder, subfolders, files in os.walk(root):
            subfolders.sort()
            if "config.json" in files:
                if not is_utf8(Path(folder)):
                    foreign.append(f"{folder} {NO_UTF8}")
                    subfolders.clear()
                    continue
                try:
                    runs.setdefault(Path(folder).resolve(), read_run(folder))
                    subfolders.clear()
                    found = True
                except NotARun as why:
                    foreign.append(str(why))
        if not found and len(listed) > 1:
            foreign.append(f"{root} holds no run's config.json")
    if not runs:
        more = f" (and {len(foreign) - 1} more)" if len(foreign) > 1 else ""
        names = listed[0] if len(listed) == 1 else f"{len(listed)} folders"
        raise UserError(f"no run below {names}: {foreign[0] + more if foreign else 'no folder holds a config.json'}")
    for line in dict.fromkeys(foreign):
        passed_over(line)
    return list(runs.values())
