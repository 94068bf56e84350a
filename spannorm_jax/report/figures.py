"""The figures of a report over depth, width and learning rate; curve_figures.py has training curves."""

import functools
import statistics
from collections.abc import Callable, Sequence

import polars as pl

from spannorm_jax.report import curve_figures, frames
from spannorm_jax.report.ceilings import ceilings, middles
from spannorm_jax.report.comparisons import OWN, SHARED
from spannorm_jax.report.looks import CROSS, Figure, Looks, Spec, alt, finished, in_panels, with_scale
from spannorm_jax.report.palette import GREY, OUTCOME_COLOURS, OUTCOME_INK, OUTCOME_ORDER
from spannorm_jax.report.rates import rates
from spannorm_jax.report.study import ARM, Study, settings_of

_AXIS_TITLE = {"depth": "depth (blocks)", "width": "width", "lr": "peak learning rate"}
_AXIS_WORD = {"depth": "depth", "width": "width", "lr": "learning rate"}


def _ticks(values: list[float]) -> list[float]:
    """At most eight of the values."""
    return values[:: -(-len(values) // 8)]


def _axis(study: Study, axis: str, column: str = "") -> alt.X:
    """A log axis with the values that were run as its ticks."""
    values = study.runs[axis].unique().sort().to_list()
    shown = alt.Axis(values=_ticks(values), format="~g", grid=False, labelOverlap="greedy")
    # A learning rate of zero trains nothing, but may be asked for.
    scale = alt.Scale(type="linear" if values[0] == 0 else "log", nice=False, padding=14)
    return alt.X(f"{column or axis}:Q", title=_AXIS_TITLE[axis], scale=scale, axis=shown)


def _loss_title(study: Study) -> str:
    return f"{study.measure} loss ({study.unit})"


def loss_by(study: Study, axis: str) -> Figure | None:
    """Final loss against depth, width or lr; None where it does not vary or nothing ended."""
    if not study.varies(axis):
        return None
    settings = study.settings
    if axis != "lr":  # at best rates, of the seeds that did not choose them
        settings = settings_of(study.runs.filter("best_lr", pl.col("seed").is_in(study.reported)))
    columns = (*ARM, "loss", "low", "high", "n", "diverged")
    table = settings.filter(pl.col("n") > 0).select(*columns, kind=pl.lit("setting"))
    if table.is_empty():
        return None
    best = table.group_by(ARM[:3]).agg(pl.col("loss").min())
    near = _near(best["loss"].to_list())
    if axis == "lr":
        optima = frames.optima(study).drop_nulls("lr").join(best, on=ARM[:3], maintain_order="left")
        table = pl.concat([table, optima.with_columns(kind=pl.lit("optimum"))], how="diagonal")
    looks = Looks(study)
    table, panels = looks.with_panels(table, without=[axis])
    title = f"{study.measure.capitalize()} loss against {_AXIS_WORD[axis]}"
    first = _loss_by_view(study, looks, axis, panels, title)
    scales: dict[str, Spec] = {"all": {}, "log loss": {"type": "log"}}
    scales["near the best"] = {"domain": near, "zero": False, "nice": False}
    caption = (
        "Mean over seeds; bars run from the least seed to the greatest. A run that diverged, or ended above its loss "
        "at initialisation, counts with that; a cross marks a setting in which a run diverged. "
    )
    if axis == "lr":
        caption += "A ring marks the learning rate of least loss, as the next figure has it with its interval."
    elif study.varies("lr"):
        caption += "Each method has its own best learning rate at each point."
    views = {view: with_scale(first, "y", **scale) for view, scale in scales.items()}
    return Figure(f"loss_by_{axis}", title, caption, {"main": table}, views)


def _near(best: Sequence[float]) -> tuple[float, float]:
    """Losses of the settings that train well: from the least to some way above the better half of the methods."""
    ordered = sorted(best)
    spread = ordered[len(ordered) // 2] - ordered[0]
    return ordered[0] - 0.05 - spread / 10, ordered[0] + 0.3 + 3 * spread


def _loss_by_view(study: Study, looks: Looks, axis: str, panels: Sequence[str], title: str) -> Spec:
    scale = alt.Scale(zero=False, nice=True)
    y = alt.Y("loss:Q", title=_loss_title(study), scale=scale, axis=alt.Axis(tickCount=6))
    base = looks.base(_axis(study, axis))
    settings = base.transform_filter("datum.kind == 'setting'")
    formats = {"depth": "d", "width": "d", "lr": "~g", "loss": ".3f", "low": ".3f", "high": ".3f"}
    shown = {"y": y, "opacity": looks.opacity(1)}
    met = shown | {"tooltip": looks.tooltip(**formats, n="d", diverged="d")}
    whole, broken = settings.transform_filter("datum.diverged == 0"), settings.transform_filter("datum.diverged > 0")
    layers = [
        looks.bars(settings, alt.Y("low:Q", scale=scale)),
        looks.lines(settings, strokeWidth=2, clip=True).encode(y=y),
        whole.mark_point(filled=True, size=55, clip=True).encode(**met, shape=looks.shape()),
        broken.mark_point(**CROSS).encode(**met),
    ]
    if axis == "lr":
        bounds = looks.tooltip(lr=".2~e", low=".2~e", high=".2~e", seeds="d")
        rings = base.transform_filter("datum.kind == 'optimum'")
        rings = rings.mark_point(size=110, strokeWidth=2, filled=False, clip=True)
        layers.append(rings.encode(**shown, tooltip=bounds))
    return finished(in_panels(layers, panels), title)


def lr_optimum(study: Study) -> Figure | None:
    """The learning rate of least loss against depth, else against width, else one line a method."""
    lrs = study.runs.filter(pl.col("lr") > 0)["lr"].unique().sort().to_list()
    scale = alt.Scale(type="log", domain=[lrs[0] / 2, lrs[-1] * 2], nice=False) if lrs else alt.Scale()
    caption = (
        "Of each seed the minimum of the parabola in log learning rate through the best one and its two neighbours; "
        "the point is the mean over seeds of its logarithm, the bar its 95% t interval (one seed: no bar). A bar "
        "without a point: a neighbour of the best rate failed, and the optimum lies somewhere within. A method is "
        "left out where a seed is best at an end of the range: the optimum is not enclosed there."
    )
    axis = alt.Axis(values=_ticks(lrs), format="~g")
    encoding = {"title": "learning rate of least loss", "scale": scale, "axis": axis}
    table = frames.optima(study)
    return _by_size(study, table, "lr_optimum", "Best learning rate", "lr", encoding, ".2~e", caption)


def lr_sensitivity(study: Study) -> Figure | None:
    """Wortsman's sensitivity against depth, else against width, else one line a method."""
    caption = (
        "Wortsman et al. 2023 (arXiv 2309.14322): the mean over learning rates of min(loss, loss at initialisation), "
        "less the best loss; a run that diverged has the loss at initialisation. Over the learning rates that all "
        "methods of a panel share. Mean over seeds and its 95% t interval. Less is steadier."
    )
    encoding = {"title": f"sensitivity ({study.unit})", "scale": alt.Scale(zero=True, nice=True, domainMin=0)}
    table, title = rates(study).drop_nulls("sensitivity"), "Learning rate sensitivity"
    table = table.select(*ARM[:3], "seeds", "sensitivity", low="least", high="most")
    return _by_size(study, table, "lr_sensitivity", title, "sensitivity", encoding, ".3f", caption)


def ceiling(study: Study, axis: str) -> Figure | None:
    """The highest learning rate at which every seed trains, against depth or width; a line a method if none varies."""
    either = study.varies("depth") or study.varies("width")
    table = middles(study) if study.varies(axis) or (axis == "depth" and not either) else ceilings(study).clear()
    caption = (
        "The bar goes from the highest learning rate of the ladder at which every seed trains to the next, at which "
        "one does not, or as far as the bisection has come; the point is its middle. An arrow stands beside a ceiling "
        "that is beyond the ladder's end."
    )
    encoding = {"title": "highest learning rate that trains", "scale": alt.Scale(type="log", nice=False, padding=12)}
    title = f"Ceiling against {axis}" if either else "Ceilings"
    return _by_size(study, table, f"ceiling_by_{axis}", title, "ceiling", encoding, ".2~e", caption, axis)


def _by_size(
    study: Study,
    table: pl.DataFrame,
    name: str,
    title: str,
    column: str,
    encoding: Spec,
    form: str,
    caption: str,
    axis: str = "",
) -> Figure | None:
    """A column with its interval against depth or width where that varies, else a line for each method."""
    if table.is_empty():
        return None
    axis = next((axis for axis in (axis, "depth", "width") if axis and study.varies(axis)), "")
    looks = Looks(study)
    tips = looks.tooltip(depth="d", width="d", **{column: form}, low=form, high=form, seeds="d")
    if axis:
        # Methods stand beside one another, so that their intervals can be told apart.
        shift = (2 * pl.col("method") + 1) / len(study.methods) - 1  # within -1 and 1
        table, panels = looks.with_panels(table.with_columns(at=pl.col(axis) * 1.08**shift), without=[axis])
        base = looks.base(_axis(study, axis, "at"))
        low, middle = alt.Y("low:Q", **encoding), alt.Y(f"{column}:Q", **encoding)
        points = base.mark_point(filled=True, size=60).encode(y=middle, shape=looks.shape())
        layers = [
            looks.bars(base, low),
            looks.lines(base, strokeWidth=2, clip=True).encode(y=middle),
            points.encode(opacity=looks.opacity(1), tooltip=tips),
            *([_arrows(base, "↑", "↓", dx=11).encode(y=middle)] if "beyond" in table.columns else []),
        ]
        return Figure(name, title, caption, {"main": table}, {"": finished(in_panels(layers, panels), title)})
    table = frames.named(study, table)
    order = _methods_of(study, table)
    base = alt.Chart().encode(color=looks.colour(legend=False), y=alt.Y("method:N", sort=order, title=None))
    value = alt.X(f"{column}:Q", **encoding)
    layers = [
        base.mark_rule(strokeWidth=2.5, clip=True).encode(x=alt.X("low:Q", **encoding), x2="high:Q"),
        base.mark_point(filled=True, size=90, opacity=1).encode(x=value, shape=looks.shape(), tooltip=tips),
        *([_arrows(base, "→", "←", dy=-11).encode(x=value)] if "beyond" in table.columns else []),
    ]
    view = finished(in_panels(layers, [""]), title) | {"height": 30 * len(order)}
    return Figure(name, title, caption, {"main": table}, {"": view})


def _arrows(base: alt.Chart, above: str, below: str, dx: int = 0, dy: int = 0) -> alt.Chart:
    """Beside each point whose value is `beyond` what was looked at."""
    text = f"datum.beyond == 'above' ? '{above}' : datum.beyond == 'below' ? '{below}' : ''"
    return base.transform_calculate(arrow=text).mark_text(fontSize=15, dx=dx, dy=dy).encode(text="arrow:N")


def _methods_of(study: Study, table: pl.DataFrame) -> list[str]:
    return [method.label for method in study.methods if method.label in set(table["method"])]


def differences(study: Study) -> Figure | None:
    """A forest: the difference of each method from its baseline with its interval, one panel a depth and width."""
    table = frames.named(study, frames.forest(study))
    if table.is_empty():
        return None
    looks, several = Looks(study), study.varies("lr")
    panels, order = list(dict.fromkeys(table["panel"])), _methods_of(study, table)
    scale = alt.Scale(nice=False, padding=12)
    x: Spec = {"title": f"difference in {study.measure} loss ({study.unit})", "scale": scale}
    base = alt.Chart().encode(
        y=alt.Y("method:N", sort=order, title=None, scale=alt.Scale(domain=order), axis=alt.Axis(labelLimit=320)),
        color=looks.colour(legend=False),
    )
    if several:
        base = base.encode(yOffset=alt.YOffset("comparison:N", sort=[OWN, SHARED]))
    bounds = {"difference": "+.3f", "low": "+.3f", "high": "+.3f", "error": "", "seeds": "d"}
    tips = looks.tooltip(baseline="", comparison="", **bounds)
    kinds = alt.Scale(domain=[OWN, SHARED], range=[1, 0])
    filled = alt.FillOpacity("comparison:N", scale=kinds, legend=alt.Legend(title=None) if several else None)
    points = base.mark_point(size=70, opacity=1, strokeWidth=1.6, clip=True).encode(x=alt.X("difference:Q", **x))
    layers = [
        alt.Chart().mark_rule(color=GREY, strokeDash=[3, 3]).encode(x=alt.datum(0)),
        base.mark_rule(strokeWidth=2.2, clip=True).encode(x=alt.X("low:Q", **x), x2="high:Q"),
        points.encode(fill=looks.colour(alt.Fill, legend=False), fillOpacity=filled, shape=looks.shape(), tooltip=tips),
    ]
    title = "Differences from the baseline"
    first = finished(in_panels(layers, panels), title)
    first.get("spec", first)["height"] = (26 if several else 18) * len(order)
    # Half of the differences lie within it: one method that failed would press the others together.
    near = max(2 * statistics.median(map(abs, table["difference"].to_list())), 1e-3)
    views = {"all": first, "near zero": with_scale(first, "x", domain=[-near, near])}
    caption = (
        "Method less its baseline, below zero the method is better: the mean over the seeds that both finished, seed "
        "by seed, and its 95% interval with the error pooled over all methods that trained with every seed, or of its "
        f"own seeds where one did not. Baseline: {study.baseline_text}. "
    )
    if several:
        caption += f"Filled: {OWN}; hollow: {SHARED}."
    return Figure("differences", title, caption, {"main": table}, views)


_LETTER = "datum.label + ' (' + upper(slice(datum.label, 0, 1)) + ')'"


def outcomes(study: Study) -> Figure | None:
    """How runs ended, by learning rate and depth or width, one panel a method; never a hole."""
    placed, by_lr = study.varies("depth") or study.varies("width"), study.varies("lr")
    if not (placed or by_lr):
        return None
    table = frames.named(study, frames.endings(study))
    methods = [m.label for m in study.methods]
    lrs, places = sorted(set(table["lr"])), [study.size_text(size) for size in study.sizes]
    place_title = " × ".join(_AXIS_TITLE[axis] for axis in ("depth", "width") if study.varies(axis))
    column, values, title = ("lr", lrs, _AXIS_TITLE["lr"]) if by_lr else ("place", places, place_title)
    both = placed and by_lr
    down, rows, down_title = ("place", places[::-1], place_title) if both else ("method", methods, None)
    across = alt.Axis(labelAngle=0 if len(values) <= 6 else -45, format="~g" if by_lr else "")
    order = list(OUTCOME_ORDER)
    key = alt.Legend(title="outcome", symbolType="square", symbolStrokeWidth=0, symbolSize=220, labelExpr=_LETTER)
    fills = alt.Scale(domain=order, range=[OUTCOME_COLOURS[kind] for kind in order])
    inks = alt.Scale(domain=order, range=[OUTCOME_INK[kind] for kind in order])
    base = alt.Chart().encode(
        x=alt.X(f"{column}:O", sort=values, title=title, axis=across),
        y=alt.Y(f"{down}:O", sort=rows, title=down_title),
        tooltip=Looks(study).tooltip(depth="d", width="d", lr="~g", seen=""),
    )
    layers = [
        base.mark_rect(stroke="white", strokeWidth=2).encode(fill=alt.Fill("outcome:N", scale=fills, legend=key)),
        base.mark_text(fontSize=11).encode(text="text:N", color=alt.Color("outcome:N", scale=inks, legend=None)),
    ]
    name = "How runs ended"
    view = finished(in_panels(layers, methods if both else [""]), name)
    several = any(len(rows) > 1 for rows in study.settings["rows"])
    unit = view.get("spec", view)
    unit["width"], unit["height"] = len(values) * (48 if several else 40), max(len(rows) * 28, 96)
    caption = (
        "Colour: the gravest outcome over the seeds (diverged, then collapsed, plateau, unfinished, trained). Letters: "
        "how many of them had each. A dash is a combination that was not run, which counts as unfinished."
    )
    return Figure("outcomes", name, caption, {"main": table.with_columns(panel="method")}, {"": view})


def profile(study: Study) -> Figure | None:
    """Share of all runs below a loss; None where neither depth, width nor learning rate varies."""
    table = frames.profiles(study)
    if not any(map(study.varies, _AXIS_TITLE)) or table.is_empty():
        return None
    looks = Looks(study)
    table, panels = looks.with_panels(table, without=["depth", "width"])
    x = alt.X("loss:Q", title=_loss_title(study), scale=alt.Scale(zero=False, nice=False), axis=alt.Axis(grid=False))
    share = alt.Axis(format="%", tickCount=6)
    y = alt.Y("share:Q", title="share of all runs", axis=share, scale=alt.Scale(domain=[0, 1]))
    base = looks.base(x).encode(y=y)
    met = base.mark_line(interpolate="step-after", strokeWidth=12, opacity=0).encode(tooltip=looks.tooltip(runs="d"))
    layers = [looks.lines(base, interpolate="step-after", strokeWidth=2.2), met]
    caption = (
        "Of all runs of a method, over learning rates, depths, widths and seeds, the share that ended at or below a "
        "loss: how often it trains without a choice of learning rate. Runs that diverged or did not finish count in "
        "the whole and are below none."
    )
    title = "Profile: share of all runs at or below a loss"
    return Figure("profile", title, caption, {"main": table}, {"": finished(in_panels(layers, panels), title)})


# Name of the file -> what makes the figure, and why it is left out where it makes none.
FIGURES: dict[str, tuple[Callable[[Study], Figure | None], str]] = {
    "loss": (curve_figures.loss, "Training loss: no run logged a step."),
    "gap": (curve_figures.gap, "Gap against tokens: needs two methods with some twenty steps of one seed."),
    "loss_by_lr": (functools.partial(loss_by, axis="lr"), "Loss against learning rate: needs two learning rates."),
    "lr_optimum": (lr_optimum, "Best learning rate: needs three learning rates with the best one between two others."),
    "lr_sensitivity": (lr_sensitivity, "Learning rate sensitivity: needs three learning rates that all methods share."),
    "ceiling_by_depth": (functools.partial(ceiling, axis="depth"), "Ceiling against depth: needs a bisecting sweep."),
    "ceiling_by_width": (
        functools.partial(ceiling, axis="width"),
        "Ceiling against width: needs a bisecting sweep of two widths.",
    ),
    "loss_by_depth": (functools.partial(loss_by, axis="depth"), "Loss against depth: needs two depths."),
    "loss_by_width": (functools.partial(loss_by, axis="width"), "Loss against width: needs two widths."),
    "differences": (differences, "Differences from the baseline: needs two methods and a seed that both finished."),
    "outcomes": (outcomes, "Outcome map: needs two depths, widths or learning rates."),
    "profile": (profile, "Profile: needs finished runs at two depths, widths or learning rates."),
    "block_grad_norm": (curve_figures.block_grad_norm, "Gradient norm of each block: no run recorded it."),
}
