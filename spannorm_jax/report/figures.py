"""The two figures of a report: one colour per placement and one line style per init in both.

Matplotlib is imported where it draws, and only its Agg canvas: nothing here touches pyplot's state.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spannorm_jax.report.folders import Run, finite
from spannorm_jax.report.rows import INIT_ORDER, PLACEMENT_ORDER, Group, Row, ranked

# Distinct for colour-blind readers too, and at least 4.5:1 on white.
_COLOURS = {"pre": "#0067a5", "post": "#c24e00", "span": "#00805b"}
_MORE_COLOURS = ("#a8437f", "#6d5bb3", "#8a6d00", "#4d4d4d")
_DASHES = {"plain": (1, 1.3), "gpt2": (5, 1.8), "scale": ()}  # on, off, ... in line widths
_MORE_DASHES = ((5, 1.5, 1, 1.5), (9, 2), (3, 1.2, 1, 1.2, 1, 1.2))
_INK, _GREY = "#1f2328", "#59636e"

SMOOTHING = 0.02  # of the logged steps: the width of the running mean
_LINE = 0.235  # inches between the legend's lines
_DPI = 200  # twice what a README shows


def colours(placements: Iterable[str]) -> dict[str, str]:
    others = [p for p in ranked(placements, PLACEMENT_ORDER) if p not in _COLOURS]
    return _COLOURS | {p: _MORE_COLOURS[i % len(_MORE_COLOURS)] for i, p in enumerate(others)}


def dashes(inits: Iterable[str]) -> dict[str, tuple[float, ...]]:
    """Line styles; () is a solid line."""
    others = [n for n in ranked(inits, INIT_ORDER) if n not in _DASHES]
    return _DASHES | {n: _MORE_DASHES[i % len(_MORE_DASHES)] for i, n in enumerate(others)}


def svg_line(group: Group, groups: Iterable[Group]) -> str:
    """The group's line as the figures draw it, to stand inside a line of HTML."""
    colour, dash = _look(group, groups)
    pattern = " ".join(str(2.5 * d) for d in dash)
    return (
        '<svg width="34" height="8" aria-hidden="true"><line x1="0" x2="34" y1="4" y2="4" '
        f'stroke="{colour}" stroke-width="2.5" stroke-dasharray="{pattern}"/></svg>'
    )


def _look(group: Group, groups: Iterable[Group]) -> tuple[str, tuple[float, ...]]:
    groups = list(groups)
    colour = colours(g.placement for g in groups)[group.placement]
    return colour, dashes(g.init for g in groups)[group.init]


# ---- what is drawn ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """One line with its band; `label` is empty for a seed that no mean includes."""

    group: Group
    label: str
    x: np.ndarray
    y: np.ndarray
    low: np.ndarray
    high: np.ndarray
    broken: bool  # it ends because the run diverged


def smooth(values: np.ndarray, fraction: float = SMOOTHING) -> np.ndarray:
    """Centred running mean over `fraction` of the points.

    Near the start the window shrinks but stays centred, for the loss falls fast there; near the end
    it loses its right part only.
    """
    n = len(values)
    index, half = np.arange(n), round(fraction * n / 2)
    first = index - np.minimum(half, index)
    after = np.minimum(2 * index - first, n - 1) + 1
    sums = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    return (sums[after] - sums[first]) / (after - first)


def _losses(run: Run) -> dict[int, float]:
    """Step -> smoothed loss, up to the first that is not finite."""
    steps, losses = [], []
    for line in run.metrics:
        loss = finite(line.get("loss"))
        if loss is None:
            break
        steps.append(line["step"])
        losses.append(loss)
    return dict(zip(steps, smooth(np.array(losses)).tolist(), strict=True)) if losses else {}


def label_of(group: Group) -> str:
    """placement / init, and how the group differs otherwise: `span / scale, depth=48`."""
    variant = [f"{key.rsplit('.', 1)[-1]}={value}" for key, value in group.variant]
    label = ", ".join([f"{group.placement} / {group.init}", *variant])
    return label if len(label) <= 36 else label[:35] + "…"


def _curve(group: Group, rows: Sequence[Row], series: Sequence[dict], label: str) -> Curve | None:
    """The mean of `series` (x -> y) over the x that all hold, with a band of one deviation."""
    series = [s for s in series if s]
    xs = sorted(set.intersection(*map(set, series))) if series else []
    if not xs:
        return None
    values = np.array([[s[x] for x in xs] for s in series])
    mean = values.mean(axis=0)
    deviation = values.std(axis=0, ddof=1) if len(series) > 1 else np.zeros_like(mean)
    broken = all(row.outcome.kind == "diverged" for row in rows)
    return Curve(group, label, np.array(xs), mean, mean - deviation, mean + deviation, broken)


def _ending(group: Group) -> str:
    counted, seeds = len(group.counted), len(group.rows)
    if counted < seeds:
        return f" ({counted} of {seeds} seeds)"
    return "" if {row.outcome.kind for row in group.rows} <= {"trained", "stalled"} else f", {group.ending}"


def loss_curves(groups: Sequence[Group]) -> list[Curve]:
    """The mean curve of each group's counted seeds, then each other seed alone."""
    made = []
    for group in groups:
        loss = group.over_seeds(lambda row: row.train_loss)
        label = label_of(group) + (f"  {loss.mean:.3f}" if loss else "") + _ending(group)
        series = [_losses(row.run) for row in group.counted]
        made.append(_curve(group, group.counted, series, label))
        for row in group.rows:
            if row not in group.counted:
                made.append(_curve(group, (row,), [_losses(row.run)], ""))
    return [curve for curve in made if curve is not None]


def _block_norms(run: Run, last: bool) -> tuple[int, dict[int, float]]:
    """(step, block -> log10 of its gradient norm) at the initial weights, or at the last record."""
    found: tuple[int, dict[int, float]] = (0, {})
    for line in run.metrics:
        recorded = [finite(n) for n in line.get("block_grad_norm") or ()]
        norms = [n for n in recorded if n is not None]
        if norms and len(norms) == len(recorded) and (line["step"] > 1) == last:
            logs = {i: math.log10(n) for i, n in enumerate(norms) if n > 0}
            found = (line["step"], logs)
    return found


def block_curves(groups: Sequence[Group], last: bool) -> list[Curve]:
    """log10 of the gradient norm by block; mean and band over seeds are the logarithm's."""
    made = []
    for group in groups:
        found = [_block_norms(row.run, last) for row in group.counted]
        label = label_of(group)
        early = {step for (step, _), row in zip(found, group.counted, strict=True)
                 if step and step != row.run.last_step}  # fmt: skip
        if last and early:
            label += f", step {', '.join(map(str, sorted(early)))}"
        made.append(_curve(group, group.counted, [logs for _, logs in found], label))
    return [curve for curve in made if curve is not None]


def entropies(rows: Iterable[Row]) -> list[float]:
    """Distinct unigram entropies of the rows' training data."""
    found = {round(e, 4) for row in rows if (e := row.run.unigram_entropy) is not None}
    return sorted(found)


# ---- drawing ----------------------------------------------------------------------------------


def spread_out(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions in [low, high], `gap` apart or more, nearest to `wanted` in least squares."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    pools: list[list[float]] = []  # [sum, count] of neighbours that touch
    for rank, i in enumerate(order):
        pools.append([wanted[i] - rank * gap, 1])
        while len(pools) > 1 and pools[-2][0] / pools[-2][1] > pools[-1][0] / pools[-1][1]:
            total, count = pools.pop()
            pools[-1] = [pools[-1][0] + total, pools[-1][1] + count]
    means = [total / count for total, count in pools for _ in range(int(count))]
    top = max(low, high - (len(wanted) - 1) * gap)
    placed = [0.0] * len(wanted)
    for rank, i in enumerate(order):
        placed[i] = min(max(means[rank], low), top) + rank * gap
    return placed


def _figure(height: float, columns: int) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, height), facecolor="white")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(1, columns, squeeze=False)[0])
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color("#b8c0c8")
        axis.tick_params(labelsize=11, labelcolor=_INK, color="#b8c0c8", which="both")
        axis.grid(axis="y", color="#e6e9ec", linewidth=0.8)
        axis.set_axisbelow(True)
    return figure, axes


def _style(curve: Curve, groups: Sequence[Group]) -> dict[str, Any]:
    colour, dash = _look(curve.group, groups)
    return {
        "color": colour,
        "linestyle": (0, dash) if dash else "-",
        "linewidth": 2.0 if curve.label else 1.1,
        "alpha": 1.0 if curve.label else 0.7,
    }


def _draw(axis: Any, curve: Curve, style: dict[str, Any]) -> None:
    axis.plot(curve.x, curve.y, **style)
    if (curve.high > curve.low).any():
        axis.fill_between(curve.x, curve.low, curve.high, color=style["color"], alpha=0.16, linewidth=0)
    if curve.broken:
        axis.plot(curve.x[-1], curve.y[-1], "X", color=style["color"], markersize=9, mec="white")


@dataclass(frozen=True)
class _Entry:
    text: str
    style: dict[str, Any]
    y: float | None = None  # where its line ends; None: it ends before the right edge
    near: float = 0.0  # the height that the entry should be near


def _legend(figure: Any, axis: Any, entries: Sequence[_Entry], direct: bool, above: float) -> None:
    """A legend right of `axis`: each entry beside the end of its line, or all in order from the top.

    Leaves `above` inches over the axes for titles.
    """
    from matplotlib.lines import Line2D

    texts = [figure.text(0, 0, e.text, va="center", fontsize=11, color=_INK) for e in entries]
    renderer = figure.canvas.get_renderer()
    widest = max(text.get_window_extent(renderer).width for text in texts) / figure.dpi
    inch, height = 1 / figure.get_figwidth(), figure.get_figheight()
    right = max(1 - (widest + 0.82) * inch, 0.45)
    left, between = 0.8 * inch, 0.62 * inch  # room for tick labels
    figure.subplots_adjust(
        left=left,
        right=right,
        bottom=0.58 / height,
        top=1 - above / height,
        wspace=2 * between / (right - left - between),
    )
    low, high = axis.get_position().intervaly
    to_figure = axis.transData + figure.transFigure.inverted()

    def place(y: float) -> float:
        return min(max(to_figure.transform((axis.get_xlim()[1], y))[1], low), high)

    gap = _LINE / height
    places = [high - (i + 0.5) * gap for i in range(len(entries))]
    if direct:
        places = spread_out([place(e.near) for e in entries], gap, low, high)
    for entry, text, y in zip(entries, texts, places, strict=True):
        parts = [((0.22, 0.62), (y, y), entry.style)]
        if direct and entry.y is not None:
            thin = {"color": entry.style["color"], "linewidth": 0.7, "alpha": 0.7}
            parts.append(((0.03, 0.2), (place(entry.y), y), thin))
        for x, ys, style in parts:
            inches = [right + v * inch for v in x]
            figure.add_artist(Line2D(inches, ys, transform=figure.transFigure, **style))
        text.set_position((right + 0.7 * inch, y))


def _finish(figure: Any, axis: Any, path: Path, title: str) -> Path:
    left = axis.get_position().x0
    y = 1 - 0.2 / figure.get_figheight()
    figure.text(left, y, title, fontsize=13, fontweight="bold", color=_INK, va="center")
    figure.savefig(path, dpi=_DPI, metadata={"Software": None})
    return path


def _height(entries: int) -> float:
    return max(4.6, _LINE * entries + 1.1)


def plot_losses(groups: Sequence[Group], path: Path) -> Path | None:
    """Draws training loss over step for all groups; None when no step was logged."""
    curves = loss_curves(groups)
    if not curves:
        return None
    levels = entropies(row for group in groups for row in group.rows)
    figure, (axis,) = _figure(_height(len(curves) + len(levels)), columns=1)
    dashed = {"color": _GREY, "linestyle": "--", "linewidth": 1.3, "zorder": 1.5}
    entries = []
    for level in levels:
        axis.axhline(level, **dashed)
        entries.append(_Entry(f"unigram entropy  {level:.3f}", dashed, level, level))
    last = max(curve.x[-1] for curve in curves)
    for curve in curves:
        style = _style(curve, groups)
        _draw(axis, curve, style)
        if curve.label:
            loss = curve.group.over_seeds(lambda row: row.train_loss)  # what the label says
            end = curve.y[-1] if curve.x[-1] == last else None
            near = curve.y[-1] if loss is None else loss.mean
            entries.append(_Entry(curve.label, style, end, near))
    starts = [curve.y[0] for curve in curves] + levels
    highest = max(curve.high.max() for curve in curves)
    lowest = min([curve.low.min() for curve in curves] + levels)
    room = 0.04 * (max(starts) - lowest) or 0.1
    axis.set_ylim(lowest - room, min(max(highest, *starts) + room, 1.25 * max(starts)))
    axis.set_xlim(0, last if last > 1 else 2)
    axis.set_xlabel("step", fontsize=12, color=_INK)
    axis.set_ylabel("nats per token", fontsize=12, color=_INK)
    _legend(figure, axis, entries, direct=True, above=0.5)
    return _finish(figure, axis, path, "Training loss")


def plot_block_grad_norms(groups: Sequence[Group], path: Path) -> Path | None:
    """Draws gradient norm by block at step 0 and at the end; None when no run recorded it."""
    panels = [block_curves(groups, last=False), block_curves(groups, last=True)]
    if not any(panels):
        return None
    labelled = {id(c.group): c for curves in panels for c in curves}  # at the end, where it can be
    figure, axes = _figure(_height(len(labelled)), columns=2)
    deepest = max(curve.x[-1] for curves in panels for curve in curves)
    for axis, curves, title in zip(axes, panels, ("step 0", "end of training"), strict=True):
        for curve in curves:
            power = dataclasses.replace(curve, y=10**curve.y, low=10**curve.low, high=10**curve.high, broken=False)
            _draw(axis, power, _style(curve, groups) | ({"marker": "o"} if deepest == 0 else {}))
        axis.set_yscale("log")
        low, high = axis.get_ylim()
        if high < 20 * low:  # a flat profile should look flat
            middle = math.sqrt(low * high)
            axis.set_ylim(middle / math.sqrt(20), middle * math.sqrt(20))
        axis.set_xlim((0, deepest) if deepest else (-1, 1))
        axis.set_xlabel("block", fontsize=12, color=_INK)
        axis.xaxis.set_major_locator(_whole_numbers())
        axis.set_title(title, fontsize=12, color=_INK, loc="left", pad=6)
        if not curves:
            axis.text(0.5, 0.5, "not recorded", transform=axis.transAxes, ha="center", color=_GREY)
    axes[0].set_ylabel("gradient norm", fontsize=12, color=_INK)
    entries = [_Entry(curve.label, _style(curve, groups)) for curve in labelled.values()]
    _legend(figure, axes[1], entries, direct=False, above=0.72)
    return _finish(figure, axes[0], path, "Gradient norm of each block (each panel has its own scale)")


def _whole_numbers() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(integer=True, nbins=6, steps=[1, 2, 4, 5, 10])
