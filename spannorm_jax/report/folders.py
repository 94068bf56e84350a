"""Reads run folders. What cannot be read is left out and said: a damaged file costs no report."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from spannorm_jax.errors import UserError, one_line
from spannorm_jax.paths import NO_UTF8, is_utf8
from spannorm_jax.report.runs import Metrics, RunFolder, dotted, finite
from spannorm_jax.run import lines
from spannorm_jax.run.folder import CONFIG, DIVERGED, DONE, EVAL, METRICS, STARTS
from spannorm_jax.run.store import walk

_NEEDED = {"model.placement": str, "model.init": str, "seed": int, "training.steps": int}  # what makes a config a run's
_AXES: dict[str, Any] = {"model.depth": int, "model.width": int, "optim.lr": (int, float)}  # of figures
_OF_LINES = (METRICS, STARTS, EVAL)
_COLUMNS = ("loss", "grad_norm", "tokens_per_s", "held_out_loss")


@dataclass
class _Reader:
    """Reads the files of a folder, and keeps what was wrong with them."""

    folder: Path
    damage: list[str] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)

    def content(self, name: str) -> bytes | None:
        """The file's content, or None when there is no such file."""
        try:
            return lines.read(self.folder / name) if name in _OF_LINES else (self.folder / name).read_bytes()
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
    ordered = [line | {"tokens_per_s": line.get("tokens_per_s", line.get("images_per_s"))} for line in ordered]
    columns = {key: np.array([finite(line.get(key)) for line in ordered], np.float64) for key in _COLUMNS}
    norms = ((line["step"], line.get("block_grad_norm")) for line in ordered)
    return Metrics(
        step=np.array(sorted(by_step), dtype=np.int64),
        block_grad_norm=tuple((step, values) for step, values in norms if isinstance(values, list) and values),
        **columns,
    )


class NotARun(UserError):
    """A folder's config is not that of a run."""


def _read_config(reader: _Reader) -> dict[str, Any]:
    path = reader.folder / CONFIG
    config = reader.object(CONFIG)
    if reader.damage:
        raise NotARun(reader.damage[0])
    if config is None:
        raise NotARun(f"{reader.folder} holds no {CONFIG}; name the folder of a run")
    options = dotted(config)
    missing = [key for key, kind in _NEEDED.items() if not isinstance(options.get(key), kind)]
    missing += [f"number for {key}" for key, kinds in _AXES.items() if not isinstance(options.get(key, 0), kinds)]
    if missing:
        raise NotARun(f"{path} holds no {missing[0]}; is it a run's config?")
    return config


def metrics_lines(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, by step. Raises UserError if a line is damaged, or there is none."""
    reader = _Reader(folder)
    lines = reader.lines(METRICS, with_steps=True)
    if reader.damage or not lines:
        raise UserError(reader.damage[0] if reader.damage else f"{folder} holds no {METRICS}; name the folder of a run")
    return lines


def read_run(folder: Path) -> RunFolder:
    """Raises NotARun: its config is absent, is no JSON object, or lacks a key that a report needs."""
    reader = _Reader(folder)
    config, starts = _read_config(reader), tuple(reader.lines(STARTS))
    metrics, lines = _columns(reader.lines(METRICS, with_steps=True)), reader.lines(EVAL, with_steps=True)
    evals, judged = (tuple(line for line in lines if ("tasks" in line) == of_tasks) for of_tasks in (False, True))
    done, diverged = reader.object(DONE), reader.object(DIVERGED)
    said = tuple(reader.damage), tuple(reader.cut)
    return RunFolder(reader.folder, config, starts, metrics, evals, done, diverged, *said, judged)


def find_runs(roots: Path | Sequence[Path], passed_over: Callable[[str], None] = lambda why: None) -> list[RunFolder]:
    """Reads every run below the folders `roots` (or those themselves), in order of path, each once.

    A run's own subfolders are not searched, for checkpoints hold a config.json too. Of a config.json that is another
    program's, or lies in a folder whose name is no UTF-8, `passed_over` is told.

    Raises:
      UserError: one of `roots` is no folder, or no run is below any.
    """
    listed = [roots] if isinstance(roots, Path) else roots
    runs: dict[Path, RunFolder] = {}
    foreign: list[str] = []
    for root in listed:
        if not root.is_dir():
            raise UserError(f"{root} is not a folder; name the folder that holds the runs")
        found = False
        for name, subfolders, files in walk(root):
            subfolders.sort()
            if CONFIG not in files:
                continue
            folder = type(root)(name)
            try:
                if is_utf8(folder):
                    runs.setdefault(folder.resolve(), read_run(folder))
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
