"""The figures of a report, as Vega-Lite: one definition for the page, where they answer the mouse, and for print.

Here are those of what a sweep goes over; curve_figures.py has the curves.
"""

import functools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import polars as pl

from spannorm_jax.report import curve_figures, frames
from spannorm_jax.report.comparisons import OWN, SHARED
from spannorm_jax.report.looks import Figure, Views, alt, finished, in_panels, looks_of, tooltip, with_axes, with_panels
from spannorm_jax.report.palette import GREY, OUTCOME_COLOURS, OUTCOME_INK, OUTCOME_ORDER
from spannorm_jax.report.study import Study

_AXIS_TITLE = {"depth": "depth (blocks)", "width": "width", "lr": "peak learning rate"}
_AXIS_WORD = {"depth": "depth", "width": "width", "lr": "learning rate"}


def _ticks(values: list[float]) -> list[float]:
    """At most eight of the values."""
    return values[:: -(-len(values) // 8)]


def _axis(about: Study, axis: str, column: str = "") -> alt.X:
    """A log axis with the values that were run as its ticks."""
    values = sorted({getattr(row, axis) for row in about.rows})
    shown = alt.Axis(values=_ticks(values), format="~g", grid=False, labelOverlap="greedy")
    kind: Any = "linear" if values[0] == 0 else "log"  # a learning rate of zero trains nothing, but may be asked for
    scale = alt.Scale(type=kind, nice=False, padding=14)
    return alt.X(f"{column or axis}:Q", title=_AXIS_TITLE[axis], scale=scale, axis=shown)


def _dodged(about: Study, table: pl.DataFrame, axis: str) -> pl.Series:
    """Where each line of the table stands: methods beside one another, so that their intervals can be told apart."""
    count = len(about.methods)
    shift = {m.label: (2 * i - count + 1) / count for i, m in enumerate(about.methods)}  # within -1 and 1
    pairs = zip(table[axis], table["method"], strict=True)
    return pl.Series("at", [value * 1.08 ** shift[method] for value, method in pairs])


def _loss_title(about: Study) -> str:
    return f"{about.measure} loss (nats/token)"


# ---- losses against what a sweep goes over ----------------------------------------------------

_NEAR = "near the best"


def loss_by(about: Study, axis: str) -> Figure | None:
    """Final loss against depth, width or lr; None where it does not vary or nothing ended."""
    if not about.varies(axis):
        return None
    runs = frames.runs_table(about)
    if axis != "lr":  # at best rates, of the seeds that did not choose them
        runs = runs.filter("best_lr", pl.col("seed").is_in(list(about.reported)))
    table = frames.settings_table(runs)
    if table.is_empty():
        return None
    place = ["placement", "init", "other", "depth", "width"]
    best = table.group_by(place).agg(pl.col("loss").min())
    near = _near(best["loss"].to_list())
    table = table.with_columns(kind=pl.lit("setting"))
    if axis == "lr":
        optima = frames.optima_table(about).drop_nulls("lr").join(best, on=place, maintain_order="left")
        table = pl.concat([table, optima.with_columns(kind=pl.lit("optimum"))], how="diagonal")
    table, panels = with_panels(table, about, without=[axis])
    scales: dict[str, dict[str, Any]] = {
        "all": {},
        "log loss": {"type": "log"},
        _NEAR: {"domain": near, "zero": False, "nice": False},
    }

    def scaled(scale: dict[str, Any]) -> dict[str, Any]:
        return with_axes(first, lambda channel, y: y if channel == "x" else y | {"scale": y["scale"] | scale})

    first = _loss_by_view(about, axis, panels)
    views: Views = {(view,): scaled(scale) for view, scale in scales.items()}
    caption = (
        "Mean over seeds; bars run from the least seed to the greatest. A run that diverged, or ended above its loss "
        "at initialisation, counts with that; a cross marks a setting in which a run diverged. "
    )
    if axis == "lr":
        caption += "A ring marks the learning rate of least loss, as the next figure has it with its interval."
    elif about.varies("lr"):
        caption += "Each method has its own best learning rate at each point."
    title = f"{about.measure.capitalize()} loss against {_AXIS_WORD[axis]}"
    return Figure(f"loss_by_{axis}", title, caption, {"main": table}, {"view": tuple(scales)}, views)


def _near(best: Sequence[float]) -> tuple[float, float]:
    """Losses of the settings that train well: from the least to some way above the better half of the methods."""
    ordered = sorted(best)
    spread = ordered[len(ordered) // 2] - ordered[0]
    return ordered[0] - 0.05 - spread / 10, ordered[0] + 0.3 + 3 * spread


def _loss_by_view(about: Study, axis: str, panels: Sequence[str]) -> dict[str, Any]:
    looks = looks_of(about)
    scale = alt.Scale(zero=False, nice=True)
    y = alt.Y("loss:Q", title=_loss_title(about), scale=scale, axis=alt.Axis(tickCount=6))
    base = alt.Chart().encode(x=_axis(about, axis), color=looks.colour(), detail=["init:N", "other:N"])
    settings = base.transform_filter("datum.kind == 'setting'")
    formats = {"depth": "d", "width": "d", "lr": "~g", "loss": ".3f", "low": ".3f", "high": ".3f"}
    tips = tooltip(about, **formats, n="d", diverged="d")
    seeds = alt.Y("low:Q", scale=scale)
    whole, broken = settings.transform_filter("datum.diverged == 0"), settings.transform_filter("datum.diverged > 0")
    line = settings.mark_line(strokeWidth=2, clip=True).encode(y=y, strokeDash=looks.dash(), opacity=looks.opacity(1))
    layers = [
        settings.mark_rule(strokeWidth=1.5, clip=True).encode(y=seeds, y2="high:Q", opacity=looks.opacity(0.7)),
        line.properties(name="lines").add_params(*looks.picks),
        whole.mark_point(filled=True, size=55, clip=True).encode(
            y=y, shape=looks.shape(), opacity=looks.opacity(1), tooltip=tips
        ),
        broken.mark_point(shape="cross", angle=45, filled=True, size=110, clip=True).encode(
            y=y, opacity=looks.opacity(1), tooltip=tips
        ),
    ]
    if axis == "lr":
        optima = base.transform_filter("datum.kind == 'optimum'")
        bounds = tooltip(about, lr=".2~e", low=".2~e", high=".2~e", seeds="d")
        ring = optima.mark_point(size=110, strokeWidth=2, filled=False, clip=True)
        layers.append(ring.encode(y=y, opacity=looks.opacity(1), tooltip=bounds))
    return finished(in_panels(layers, panels), f"{about.measure.capitalize()} loss against {_AXIS_WORD[axis]}")


# ---- a number of each method and place --------------------------------------------------------


def lr_optimum(about: Study) -> Figure | None:
    """The learning rate of least loss against depth, else against width, else one line a method."""
    table = frames.optima_table(about)
    lrs = sorted({row.lr for row in about.rows if row.lr > 0})
    scale = alt.Scale(type="log", domain=[lrs[0] / 2, lrs[-1] * 2], nice=False) if lrs else alt.Scale()
    axis = alt.Axis(values=_ticks(lrs), format="~g")
    caption = (
        "Of each seed the minimum of the parabola in log learning rate through the best one and its two neighbours; "
        "the point is the mean over seeds of its logarithm, the bar its 95% t interval (one seed: no bar). A bar "
        "without a point: a neighbour of the best rate failed, and the optimum lies somewhere within. A method is "
        "left out where a seed is best at an end of the range: the optimum is not enclosed there."
    )
    encoding = {"title": "learning rate of least loss", "scale": scale, "axis": axis}
    return _by_place(about, table, "lr_optimum", "Best learning rate", "lr", encoding, ".2~e", caption)


def lr_sensitivity(about: Study) -> Figure | None:
    """Wortsman's sensitivity against depth, else against width, else one line a method."""
    caption = (
        "Wortsman et al. 2023 (arXiv 2309.14322): the mean over learning rates of min(loss, loss at initialisation), "
        "less the best loss; a run that diverged has the loss at initialisation. Over the learning rates that all "
        "methods of a panel share. Mean over seeds and its 95% t interval. Less is steadier."
    )
    encoding = {"title": "sensitivity (nats/token)", "scale": alt.Scale(zero=True, nice=True, domainMin=0)}
    table, title = frames.sensitivity_table(about), "Learning rate sensitivity"
    return _by_place(about, table, "lr_sensitivity", title, "sensitivity", encoding, ".3f", caption)


def _by_place(
    about: Study,
    table: pl.DataFrame,
    name: str,
    title: str,
    column: str,
    encoding: dict[str, Any],
    form: str,
    caption: str,
) -> Figure | None:
    """A column with its interval against depth or width where that varies, else a line for each method."""
    if table.is_empty():
        return None
    axis = next((axis for axis in ("depth", "width") if about.varies(axis)), "")
    looks = looks_of(about)
    tips = tooltip(about, depth="d", width="d", **{column: form}, low=form, high=form, seeds="d")
    base = alt.Chart().encode(color=looks.colour(legend=bool(axis)))
    if axis:
        table, panels = with_panels(table, about, without=[axis])
        table = table.with_columns(_dodged(about, table, axis))
        base = base.encode(x=_axis(about, axis, "at"), detail=["init:N", "other:N"])
        low, middle = alt.Y("low:Q", **encoding), alt.Y(f"{column}:Q", **encoding)
        line = base.mark_line(strokeWidth=2, clip=True).encode(
            y=middle, strokeDash=looks.dash(), opacity=looks.opacity(1)
        )
        layers = [
            base.mark_rule(strokeWidth=1.5, clip=True).encode(y=low, y2="high:Q", opacity=looks.opacity(0.7)),
            line.properties(name="lines").add_params(*looks.picks),
            base.mark_point(filled=True, size=60).encode(
                y=middle, shape=looks.shape(), opacity=looks.opacity(1), tooltip=tips
            ),
        ]
        return Figure(name, title, caption, {"main": table}, {}, {(): finished(in_panels(layers, panels), title)})
    order = [m.label for m in about.methods if m.label in set(table["method"])]
    base = base.encode(y=alt.Y("method:N", sort=order, title=None))
    value = alt.X(f"{column}:Q", **encoding)
    layers = [
        base.mark_rule(strokeWidth=2.5, clip=True).encode(x=alt.X("low:Q", **encoding), x2="high:Q"),
        base.mark_point(filled=True, size=90, opacity=1).encode(x=value, shape=looks.shape(), tooltip=tips),
    ]
    view = finished(in_panels(layers, [""]), title) | {"height": 30 * len(order)}
    return Figure(name, title, caption, {"main": table}, {}, {(): view})


def differences(about: Study) -> Figure | None:
    """A forest: the difference of each method from its baseline with its interval, one panel a depth and width."""
    table = frames.differences_table(about)
    if table.is_empty():
        return None
    looks, several = looks_of(about), about.varies("lr")
    present, panels = set(table["method"]), list(dict.fromkeys(table["panel"]))
    order = [m.label for m in about.methods if m.label in present]
    x: dict[str, Any] = {
        "title": f"difference in {about.measure} loss (nats/token)",
        "scale": alt.Scale(nice=False, padding=12),
    }
    kinds = alt.Scale(domain=[OWN, SHARED], range=[1, 0])
    base = alt.Chart().encode(
        y=alt.Y("method:N", sort=order, title=None, scale=alt.Scale(domain=order), axis=alt.Axis(labelLimit=320)),
        color=looks.colour(legend=False),
    )
    if several:
        base = base.encode(yOffset=alt.YOffset("comparison:N", sort=[OWN, SHARED]))
    bounds = {"difference": "+.3f", "low": "+.3f", "high": "+.3f", "error": "", "seeds": "d"}
    tips = tooltip(about, baseline="", comparison="", **bounds)
    filled = alt.FillOpacity("comparison:N", scale=kinds, legend=alt.Legend(title=None) if several else None)
    layers = [
        alt.Chart().mark_rule(color=GREY, strokeDash=[3, 3]).encode(x=alt.datum(0)),
        base.mark_rule(strokeWidth=2.2, clip=True).encode(x=alt.X("low:Q", **x), x2="high:Q"),
        base.mark_point(size=70, opacity=1, strokeWidth=1.6, clip=True).encode(
            x=alt.X("difference:Q", **x),
            fill=looks.fill(),
            fillOpacity=filled,
            shape=looks.shape(),
            tooltip=tips,
        ),
    ]
    title = "Differences from the baseline"
    first = finished(in_panels(layers, panels), title)
    first.get("spec", first)["height"] = (26 if several else 18) * len(order)
    # Half of the differences lie within it: one method that failed would press the others together.
    near = max(2 * statistics.median(map(abs, table["difference"].to_list())), 1e-3)
    domains: dict[str, dict[str, Any]] = {"all": {}, "near zero": {"domain": [-near, near]}}

    def within(domain: dict[str, Any]) -> dict[str, Any]:
        return with_axes(first, lambda channel, x: x | {"scale": x["scale"] | domain} if channel == "x" else x)

    views: Views = {(view,): within(domain) for view, domain in domains.items()}
    caption = (
        "Method less its baseline, below zero the method is better: the mean over the seeds that both finished, seed "
        "by seed, and its 95% interval with the error pooled over all methods that trained with every seed, or of its "
        f"own seeds where one did not. Baseline: {about.baseline_text}. "
    )
    if several:
        caption += f"Filled: {OWN}; hollow: {SHARED}."
    return Figure("differences", title, caption, {"main": table}, {"view": tuple(domains)}, views)


# ---- stability --------------------------------------------------------------------------------

_LETTER = "datum.label + ' (' + upper(slice(datum.label, 0, 1)) + ')'"


def outcomes(about: Study) -> Figure | None:
    """How runs ended, by learning rate and depth or width, one panel a method; never a hole."""
    placed, by_lr = about.varies("depth") or about.varies("width"), about.varies("lr")
    if not (placed or by_lr):
        return None
    table = frames.outcomes_table(about)
    methods = [m.label for m in about.methods]
    lrs, places = sorted(set(table["lr"])), [about.place_text(place) for place in about.places]
    place_title = " × ".join(_AXIS_TITLE[axis] for axis in ("depth", "width") if about.varies(axis))
    panels = methods if placed and by_lr else [""]
    if by_lr:
        column, values, title = "lr", lrs, _AXIS_TITLE["lr"]
    else:
        column, values, title = "place", places, place_title
    down, rows, down_title = ("place", places[::-1], place_title) if placed and by_lr else ("method", methods, None)
    across = alt.Axis(labelAngle=0 if len(values) <= 6 else -45, format="~g" if by_lr else "")
    outcome_order = list(OUTCOME_ORDER)
    key = alt.Legend(title="outcome", symbolType="square", symbolStrokeWidth=0, symbolSize=220, labelExpr=_LETTER)
    fills = alt.Scale(domain=outcome_order, range=[OUTCOME_COLOURS[o] for o in outcome_order])
    inks = alt.Scale(domain=outcome_order, range=[OUTCOME_INK[o] for o in outcome_order])
    base = alt.Chart().encode(
        x=alt.X(f"{column}:O", sort=values, title=title, axis=across),
        y=alt.Y(f"{down}:O", sort=rows, title=down_title),
        tooltip=tooltip(about, depth="d", width="d", lr="~g", seen=""),
    )
    layers = [
        base.mark_rect(stroke="white", strokeWidth=2).encode(fill=alt.Fill("outcome:N", scale=fills, legend=key)),
        base.mark_text(fontSize=11).encode(text="text:N", color=alt.Color("outcome:N", scale=inks, legend=None)),
    ]
    name = "How runs ended"
    view = finished(in_panels(layers, panels), name)
    several = max(len(seeds) for seeds in about.cells.values()) > 1
    unit = view.get("spec", view)
    unit["width"], unit["height"] = len(values) * (48 if several else 40), max(len(rows) * 28, 96)
    caption = (
        "Colour: the gravest outcome over the seeds (diverged, then collapsed, plateau, unfinished, trained). Letters: "
        "how many of them had each. A dash is a combination that was not run, which counts as unfinished."
    )
    data = {"main": table.with_columns(panel=pl.col("method"))}
    return Figure("outcomes", name, caption, data, {}, {(): view})


def profile(about: Study) -> Figure | None:
    """Share of all runs below a loss; None where neither depth, width nor learning rate varies."""
    table = frames.profile_table(about)
    if not any(map(about.varies, _AXIS_TITLE)) or table.is_empty():
        return None
    table, panels = with_panels(table, about, without=["depth", "width"])
    looks = looks_of(about)
    x = alt.X("loss:Q", title=_loss_title(about), scale=alt.Scale(zero=False, nice=False), axis=alt.Axis(grid=False))
    share = alt.Axis(format="%", tickCount=6)
    y = alt.Y("share:Q", title="share of all runs", axis=share, scale=alt.Scale(domain=[0, 1]))
    base = alt.Chart().encode(x=x, y=y, color=looks.colour(), detail=["init:N", "other:N"])
    lines = base.mark_line(interpolate="step-after", strokeWidth=2.2).encode(
        strokeDash=looks.dash(), opacity=looks.opacity(1)
    )
    met = base.mark_line(interpolate="step-after", strokeWidth=12, opacity=0).encode(tooltip=tooltip(about, runs="d"))
    layers = [lines.properties(name="lines").add_params(*looks.picks), met]
    caption = (
        "Of all runs of a method, over learning rates, depths, widths and seeds, the share that ended at or below a "
        "loss: how often it trains without a choice of learning rate. Runs that diverged or did not finish count in "
        "the whole and are below none."
    )
    title = "Profile: share of all runs at or below a loss"
    return Figure("profile", title, caption, {"main": table}, {}, {(): finished(in_panels(layers, panels), title)})


# Name of the file -> what makes the figure, and why it is left out where it makes none.
FIGURES: dict[str, tuple[Callable[[Study], Figure | None], str]] = {
    "loss": (curve_figures.loss, "Training loss: no run logged a step."),
    "gap": (curve_figures.gap, "Gap against tokens: needs two methods with some twenty steps of one seed."),
    "loss_by_lr": (functools.partial(loss_by, axis="lr"), "Loss against learning rate: needs two learning rates."),
    "lr_optimum": (lr_optimum, "Best learning rate: needs three learning rates with the best one between two others."),
    "lr_sensitivity": (lr_sensitivity, "Learning rate sensitivity: needs three learning rates that all methods share."),
    "loss_by_depth": (functools.partial(loss_by, axis="depth"), "Loss against depth: needs two depths."),
    "loss_by_width": (functools.partial(loss_by, axis="width"), "Loss against width: needs two widths."),
    "differences": (differences, "Differences from the baseline: needs two methods and a seed that both finished."),
    "outcomes": (outcomes, "Outcome map: needs two depths, widths or learning rates."),
    "profile": (profile, "Profile: needs finished runs at two depths, widths or learning rates."),
    "block_grad_norm": (curve_figures.block_grad_norm, "Gradient norm of each block: no run recorded it."),
}
