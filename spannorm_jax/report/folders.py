"""Run folders, read: what each holds, finished or not.

A run's folder is all that is read. Numbers that a folder does not hold are None, never guessed.
"""

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spannorm_jax.errors import UserError, one_line

_NEEDED = {"model.placement": str, "model.init": str, "seed": int, "training.steps": int}  # what makes a config a run's


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
    for folder, subfolders, files in os.walk(root, followlinks=True):  # a sweep links to its runs
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
    for line in foreign:
        passed_over(line)
    return runs
