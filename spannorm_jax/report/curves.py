"""The curves of a report: the training loss of each setting over its seeds, and the gradient norm of each block."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl

from spannorm_jax.report.comparisons import OWN, differences
from spannorm_jax.report.runs import RunFolder
from spannorm_jax.report.stats import smooth
from spannorm_jax.report.study import ARM, Study

SMOOTHING = 0.02  # of the logged steps: the width of the running mean
LATE = 1 / 3  # of the steps asked for: the last part of a run, where methods lie close together
LATE_SMOOTHING = 0.1
WINDOW = 2**0.5  # how much further a window of `gap_curves` ends than it begins
FIRST = 8  # step before which there is none: runs are at their start
WHEN = ("at the initial weights", "at the last record")
_POINTS = (40, 300)  # the fewest and the most that a curve is drawn with
_ALL_POINTS = 16_000  # of all curves together, which a page still draws in a moment

_ARM: dict[str, Any] = {"method": pl.Int64, "depth": pl.Int64, "width": pl.Int64, "lr": pl.Float64}
_BAND: dict[str, Any] = {"low": pl.Float64, "high": pl.Float64}
_LOSS: dict[str, Any] = {
    **{"curve": pl.Int32, **_ARM, "best_lr": pl.Boolean, "runs": pl.String, "alone": pl.Boolean, "crossed": pl.Boolean},
    **{"step": pl.Int64, **dict.fromkeys(("train_loss", "tokens", "flops", "loss"), pl.Float64), **_BAND},
}
_GAP: dict[str, Any] = _ARM | dict.fromkeys(("baseline_lr", "step", "tokens", "gap"), pl.Float64) | _BAND
_GAP |= {"seeds": pl.Int64}
_BLOCK: dict[str, Any] = {**_ARM, "when": pl.String, "block": pl.Int64, "norm": pl.Float64, **_BAND}


def _at_best(study: Study, setting: dict[str, Any]) -> bool:
    """Whether a setting is at its method's best learning rate; where none is known, each is."""
    method, depth, width, lr = (setting[key] for key in ARM)
    return study.best.get((method, depth, width), lr) == lr


def _losses(row: RunFolder, smoothing: float) -> tuple[np.ndarray, np.ndarray]:
    """(steps, smoothed losses), up to the first that is not finite."""
    step, loss = row.metrics.step, row.metrics.loss
    end = next(iter(np.flatnonzero(~np.isfinite(loss))), len(loss))
    return step[:end], smooth(loss[:end], smoothing)


def _over_seeds(rows: Sequence[RunFolder], smoothing: float) -> tuple[np.ndarray, np.ndarray]:
    """(steps that all have, losses of each row there)."""
    each = [(steps, losses) for steps, losses in (_losses(row, smoothing) for row in rows) if len(steps)]
    if not each:
        return np.empty(0, np.int64), np.empty((0, 0))
    steps = functools.reduce(np.intersect1d, [steps for steps, _ in each])
    return steps, np.stack([losses[np.searchsorted(own, steps)] for own, losses in each])


def _thinned(count: int, most: int) -> np.ndarray:
    """Indices of at most `most` of `count` points: half evenly spaced, half ever wider, as a log axis needs."""
    if count <= most:
        return np.arange(count)
    even = np.linspace(0, count - 1, most // 2)
    return np.unique(np.round(np.concatenate([even, np.geomspace(1, count, most - most // 2) - 1])).astype(int))


def loss_curves(study: Study, late: bool = False) -> pl.DataFrame:
    """Of each setting the mean of the seeds that count with their least and greatest, then each other seed alone.

    One line a point, `crossed` where a run that diverged ends. `late`: of the runs' last part alone, and smoother,
    for all runs of a seed have the same batches and so the same noise.
    """
    members: list[tuple[dict[str, Any], list[int], bool]] = []
    for setting in study.settings.iter_rows(named=True):
        members.append((setting, setting["counted"], False))
        members += [(setting, [row], True) for row in setting["rows"] if row not in setting["counted"]]
    most = min(max(_ALL_POINTS // max(1, len(members)), _POINTS[0]), _POINTS[1])
    curves = [pl.DataFrame(schema=_LOSS)]
    for number, (setting, indices, alone) in enumerate(members):
        rows = [study.rows[i] for i in indices]
        run = rows[0]
        steps, losses = _over_seeds(rows, LATE_SMOOTHING if late else SMOOTHING)
        kept = np.flatnonzero(steps > (1 - LATE) * run.steps) if late else np.arange(len(steps))
        if not len(kept):
            continue
        kept = kept[_thinned(len(kept), most)]
        steps, losses = steps[kept], losses[:, kept]
        tokens = steps * float(run.tokens_per_step or math.nan)
        points = {
            **{"step": steps, "tokens": tokens, "flops": tokens * (run.flops_per_token or math.nan)},
            **{"loss": losses.mean(axis=0), "low": losses.min(axis=0), "high": losses.max(axis=0)},
            "crossed": (steps == steps[-1]) & all(row.outcome == "diverged" for row in rows),
        }
        runs = f"seed {run.seed}, {run.ended}" if len(rows) == 1 else f"mean of {len(losses)} seeds"
        curve = {name: setting[name] for name in _ARM} | {"curve": number, "runs": runs, "alone": alone}
        curve |= {"best_lr": _at_best(study, setting), "train_loss": None if alone else setting["train_loss"]}
        constant = [pl.lit(value).alias(name) for name, value in curve.items()]
        curves.append(pl.DataFrame(points).with_columns(*constant).select(pl.col(n).cast(k) for n, k in _LOSS.items()))
    return pl.concat(curves).with_columns(pl.col(pl.Float64).fill_nan(None))


def gap_curves(study: Study) -> pl.DataFrame:
    """Training loss less the baseline's along the run, at own best rates, seed by seed: by window."""
    index, lines = study.by_seed("row", study.reported), []
    for pair in differences(study).filter(comparison=OWN).iter_rows(named=True):
        sides = ("method", "depth", "width", "lr"), ("baseline", "depth", "width", "baseline_lr")
        ours, theirs = (index.get(tuple(pair[key] for key in side), {}) for side in sides)
        seeds = sorted(ours.keys() & theirs.keys())
        each = [_gaps(study.rows[ours[seed]], study.rows[theirs[seed]]) for seed in seeds]
        for window in sorted(set().union(*each), reverse=True):
            gaps, run = [gaps[window] for gaps in each if window in gaps], study.rows[ours[seeds[0]]]
            step, per_step = run.steps / WINDOW ** (window + 0.5), run.tokens_per_step
            numbers = {"step": step, "tokens": None if per_step is None else step * per_step, "seeds": len(gaps)}
            numbers |= {"gap": sum(gaps) / len(gaps), "low": min(gaps), "high": max(gaps)}
            lines.append({key: pair[key] for key in (*ARM, "baseline_lr")} | numbers)
    return pl.DataFrame(lines, schema=_GAP)


def _gaps(ours: RunFolder, theirs: RunFolder) -> dict[int, float]:
    """Number of a window, from 0 for the last one -> mean difference of two runs' losses in it.

    Window k holds the steps from steps / WINDOW^(k + 1) to steps / WINDOW^k. A window that one of
    the runs has not gone through, or that begins before step `FIRST`, is left out.
    """
    (steps, losses), (others, their_losses) = _losses(ours, 0.0), _losses(theirs, 0.0)
    shared = np.intersect1d(steps, others, assume_unique=True)
    gaps = losses[np.searchsorted(steps, shared)] - their_losses[np.searchsorted(others, shared)]
    asked = ours.steps
    windows = np.floor(np.log(asked / shared) / math.log(WINDOW) + 1e-9).astype(int)  # the end of one is in it
    whole = (asked / WINDOW**windows < shared.max(initial=0) + 1) & (asked / WINDOW ** (windows + 1) > FIRST - 0.5)
    return {k: float(gaps[windows == k].mean()) for k in set(windows[whole].tolist())}


def _block_norms(row: RunFolder, last: bool) -> list[float | None]:
    """log10 of each block's gradient norm at the initial weights, or at the last record that is whole."""
    logs: list[float | None] = []
    for step, norms in row.metrics.block_grad_norm:
        numbers = [n for n in norms if isinstance(n, int | float) and math.isfinite(n)]
        if len(numbers) == len(norms) and (step > 1) == last:
            logs = [math.log10(n) if n > 0 else None for n in numbers]
    return logs


def block_curves(study: Study) -> pl.DataFrame:
    """Gradient norm by block of each setting at its best learning rate: the geometric mean, least and greatest."""
    lines = []
    for setting in study.settings.iter_rows(named=True):
        if not _at_best(study, setting):
            continue
        for when in WHEN:
            rows = [study.rows[i] for i in setting["counted"]]
            each = [norms for row in rows if (norms := _block_norms(row, when == WHEN[1]))]
            for block in range(min(map(len, each), default=0)):
                logs = [log for norms in each if (log := norms[block]) is not None]
                if logs:
                    norm, low, high = (10**log for log in (sum(logs) / len(logs), min(logs), max(logs)))
                    numbers = {"when": when, "block": block, "norm": norm, "low": low, "high": high}
                    lines.append({key: setting[key] for key in ARM} | numbers)
    return pl.DataFrame(lines, schema=_BLOCK)
