"""The curves of a report: the training loss of each setting over its seeds, and the gradient norm of each block."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl

from spannorm_jax.report.comparisons import OWN, differences
from spannorm_jax.report.rates import best_lr
from spannorm_jax.report.rows import Group, Row
from spannorm_jax.report.stats import smooth
from spannorm_jax.report.study import Place, Study, method_of

SMOOTHING = 0.02  # of the logged steps: the width of the running mean
LATE = 1 / 3  # of the steps asked for: the last part of a run, where methods lie close together
LATE_SMOOTHING = 0.1
WINDOW = 2**0.5  # how much further a window of `gap_curves` ends than it begins
FIRST = 8  # step before which there is none: runs are at their start
_POINTS = (40, 300)  # the fewest and the most that a curve is drawn with
_ALL_POINTS = 16_000  # of all curves together, which a page still draws in a moment

_SCHEMA: dict[str, Any] = {
    **{"curve": pl.Int32, "placement": pl.String, "init": pl.String, "other": pl.String},
    **{"depth": pl.Int64, "width": pl.Int64, "lr": pl.Float64, "best_lr": pl.Boolean, "runs": pl.String},
    **{
        "alone": pl.Boolean,
        "train_loss": pl.Float64,
        "crossed": pl.Boolean,
        "step": pl.Int64,
        "tokens": pl.Float64,
        "flops": pl.Float64,
    },
    **{"loss": pl.Float64, "low": pl.Float64, "high": pl.Float64},
}


def _losses(row: Row, smoothing: float) -> tuple[np.ndarray, np.ndarray]:
    """(steps, smoothed losses), up to the first that is not finite."""
    metrics = row.run.metrics
    bad = np.flatnonzero(~np.isfinite(metrics.loss))
    end = bad[0] if len(bad) else len(metrics.loss)
    return metrics.step[:end], smooth(metrics.loss[:end], smoothing)


def _over_seeds(rows: Sequence[Row], smoothing: float) -> tuple[np.ndarray, np.ndarray]:
    """(steps that all have, losses of each row there)."""
    each = [_losses(row, smoothing) for row in rows]
    each = [(steps, losses) for steps, losses in each if len(steps)]
    if not each:
        return np.empty(0, np.int64), np.empty((0, 0))
    steps = each[0][0]
    for others, _ in each[1:]:
        steps = np.intersect1d(steps, others, assume_unique=True)
    return steps, np.stack([losses[np.searchsorted(own, steps)] for own, losses in each])


def _thinned(count: int, most: int) -> np.ndarray:
    """Indices of at most `most` of `count` points: half evenly spaced, half ever wider, as a log axis needs."""
    if count <= most:
        return np.arange(count)
    even = np.linspace(0, count - 1, most // 2)
    return np.unique(np.round(np.concatenate([even, np.geomspace(1, count, most - most // 2) - 1])).astype(int))


def loss_curves(about: Study, late: bool = False) -> pl.DataFrame:
    """Of each setting the mean of the seeds that count with their least and greatest, then each other seed alone.

    One line a point, `crossed` where a run that diverged ends. This is what curves.csv holds. `late`: of the runs'
    last part alone, and smoother, for all runs of a seed have the same batches and so the same noise.
    """
    members: list[tuple[Group, tuple[Row, ...], bool]] = []
    for group in about.groups:
        members.append((group, group.counted, False))
        members += [(group, (row,), True) for row in group.rows if row not in group.counted]
    most = min(max(_ALL_POINTS // max(1, len(members)), _POINTS[0]), _POINTS[1])
    frames = []
    best = {(method, place): best_lr(about, method, place) for method, place, _ in about.cells}
    for number, (group, rows, alone) in enumerate(members):
        steps, losses = _over_seeds(rows, LATE_SMOOTHING if late else SMOOTHING)
        if late:
            kept = steps > (1 - LATE) * rows[0].run.steps
            steps, losses = steps[kept], losses[:, kept]
        if not len(steps):
            continue
        kept = _thinned(len(steps), most)
        steps, losses = steps[kept], losses[:, kept]
        first, run, method = rows[0], rows[0].run, method_of(group)
        own_best = best[method, Place(first.depth, first.width)]
        per_step, per_token = run.tokens_per_step or math.nan, run.flops_per_token or math.nan
        one, reached = len(rows) == 1, group.over_seeds(lambda row: row.train_loss)
        about_curve = {
            "curve": number,
            "placement": group.placement,
            "init": group.init,
            "other": method.other,
            "depth": first.depth,
            "width": first.width,
            "lr": float(first.lr),
            "best_lr": own_best is None or own_best == first.lr,
            "runs": f"seed {first.seed}, {first.outcome}" if one else f"mean of {len(losses)} seeds",
            "alone": alone,
            "train_loss": None if alone or reached is None else reached.mean,
        }
        tokens = steps * float(per_step)
        numbers = {"step": steps, "tokens": tokens, "flops": tokens * per_token, "loss": losses.mean(axis=0)}
        numbers |= {"low": losses.min(axis=0), "high": losses.max(axis=0)}
        if all(row.outcome.kind == "diverged" for row in rows):
            numbers["crossed"] = steps == steps[-1]
        else:
            about_curve["crossed"] = False
        frames.append(pl.DataFrame(numbers).select(*(pl.lit(v).alias(k) for k, v in about_curve.items()), pl.all()))
    typed = [pl.col(name).cast(kind) for name, kind in _SCHEMA.items()]
    made = pl.concat([pl.DataFrame(schema=_SCHEMA), *(frame.select(typed) for frame in frames)])
    return made.with_columns(pl.col(pl.Float64).fill_nan(None))


_GAP_SCHEMA: dict[str, Any] = {
    **{"placement": pl.String, "init": pl.String, "other": pl.String, "depth": pl.Int64, "width": pl.Int64},
    **{"lr": pl.Float64, "baseline_lr": pl.Float64, "step": pl.Float64, "tokens": pl.Float64, "gap": pl.Float64},
    **{"low": pl.Float64, "high": pl.Float64, "seeds": pl.Int64},
}


def gap_curves(about: Study) -> pl.DataFrame:
    """Of each method its training loss less its baseline's along the run, at own best rates.

    A point is of a window of steps that ends `WINDOW` times as far as it begins. The runs of a seed
    see the same batches, so the noise cancels in their mean difference; a line has the mean, the
    least and the greatest of these over seeds.
    """
    lines = []
    for pair in differences(about).filter(pl.col("comparison") == OWN).iter_rows(named=True):
        method, baseline = about.methods[pair["method"]], about.methods[pair["baseline"]]
        place = Place(pair["depth"], pair["width"])
        ours, theirs = about.cells[method, place, pair["lr"]], about.cells[baseline, place, pair["baseline_lr"]]
        each = [_gaps(ours[seed], theirs[seed]) for seed in sorted(about.reported & ours.keys() & theirs.keys())]
        run = next(iter(ours.values())).run
        asked, per_step = run.steps, run.tokens_per_step
        names = {"placement": method.placement, "init": method.init, "other": method.other, **place._asdict()}
        for window in sorted(set().union(*each), reverse=True):
            gaps = [gaps[window] for gaps in each if window in gaps]
            step = asked / WINDOW ** (window + 0.5)
            numbers = {"step": step, "tokens": None if per_step is None else step * per_step, "seeds": len(gaps)}
            numbers |= {"lr": pair["lr"], "baseline_lr": pair["baseline_lr"]}
            lines.append(names | numbers | {"gap": sum(gaps) / len(gaps), "low": min(gaps), "high": max(gaps)})
    return pl.DataFrame(lines, schema=_GAP_SCHEMA)


def _gaps(ours: Row, theirs: Row) -> dict[int, float]:
    """Number of a window, from 0 for the last one -> mean difference of two runs' losses in it.

    Window k holds the steps from steps / WINDOW^(k + 1) to steps / WINDOW^k. A window that one of
    the runs has not gone through, or that begins before step `FIRST`, is left out.
    """
    (steps, losses), (others, their_losses) = _losses(ours, 0.0), _losses(theirs, 0.0)
    shared = np.intersect1d(steps, others, assume_unique=True)
    gaps = losses[np.searchsorted(steps, shared)] - their_losses[np.searchsorted(others, shared)]
    asked = ours.run.steps
    windows = np.floor(np.log(asked / shared) / math.log(WINDOW) + 1e-9).astype(int)  # the end of one is in it
    whole = (
        k
        for k in set(windows.tolist())
        if asked / WINDOW**k < shared[-1] + 1 and asked / WINDOW ** (k + 1) > FIRST - 0.5
    )
    return {k: float(gaps[windows == k].mean()) for k in whole}


_BLOCK_SCHEMA: dict[str, Any] = {
    **{"placement": pl.String, "init": pl.String, "other": pl.String, "depth": pl.Int64, "width": pl.Int64},
    **{"lr": pl.Float64, "when": pl.String, "block": pl.Int64, "norm": pl.Float64, "low": pl.Float64},
    "high": pl.Float64,
}
WHEN = ("at the initial weights", "at the last record")


def _block_norms(row: Row, last: bool) -> list[float | None]:
    """log10 of each block's gradient norm at the initial weights, or at the last record that is whole."""
    found: list[float | None] = []
    for step, norms in row.run.metrics.block_grad_norm:
        numbers = [n for n in norms if isinstance(n, int | float) and math.isfinite(n)]
        if len(numbers) == len(norms) and (step > 1) == last:
            found = [math.log10(n) if n > 0 else None for n in numbers]
    return found


def block_curves(about: Study) -> pl.DataFrame:
    """Gradient norm by block of each setting at its best learning rate: the geometric mean, least and greatest."""
    lines = []
    for group in about.groups:
        first, method = group.rows[0], method_of(group)
        if best_lr(about, method, Place(first.depth, first.width)) not in (None, first.lr):
            continue
        for when in WHEN:
            each = [norms for row in group.counted if (norms := _block_norms(row, when == WHEN[1]))]
            for block in range(min(map(len, each), default=0)):
                logs = [x for norms in each if (x := norms[block]) is not None]
                if logs:
                    mean, low, high = (10**x for x in (sum(logs) / len(logs), min(logs), max(logs)))
                    numbers = {"when": when, "block": block, "norm": mean, "low": low, "high": high}
                    axes = {"depth": first.depth, "width": first.width, "lr": float(first.lr)}
                    names = {"placement": group.placement, "init": group.init, "other": method.other}
                    lines.append(names | axes | numbers)
    return pl.DataFrame(lines, schema=_BLOCK_SCHEMA)
