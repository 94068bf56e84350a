"""Figures of curves: the training loss along a run, and the gradient norm along the blocks."""

import math
from collections.abc import Sequence

import polars as pl

from spannorm_jax.report import curves, frames
from spannorm_jax.report.looks import (
    CROSS,
    Figure,
    Looks,
    Spec,
    alt,
    finished,
    in_panels,
    size_of,
    with_axes,
    with_scale,
)
from spannorm_jax.report.palette import GREY
from spannorm_jax.report.study import Study

_X = {  # in the names of views: column, title, form of numbers
    "steps": ("step", "step", "~s"),
    "tokens": ("tokens", "training tokens", "~s"),
    "FLOPs": ("flops", "training FLOPs", ".1~e"),
}
Domain = tuple[float, float]
_SCALES = ("linear", "log loss", "log x", "log both")


def loss(study: Study) -> Figure | None:
    """Training loss along the run, one panel a depth, width and other key."""
    looks = Looks(study)
    table, panels = looks.with_panels(curves.loss_curves(study))
    if table.is_empty():
        return None
    levels = frames.levels(study)
    late, _ = looks.with_panels(curves.loss_curves(study, late=True))
    lrs = sorted(table["lr"].unique())
    known = [x for x, (column, _, _) in _X.items() if table[column].null_count() == 0]
    domains = {"main": _domain(table, levels["level"].to_list())}
    if not late.is_empty():
        domains["late"] = _late_domain(late)
    first = _loss_view(looks, panels, domains, lrs)
    views = {f"{x}, {scale}": _loss_along(first, x, scale) for x in known for scale in _SCALES}
    caption = (
        "Each curve is the mean over the seeds of a setting that count in the table, smoothed by a running mean over "
        f"{curves.SMOOTHING:.0%} of the logged steps; the band runs from the least to the greatest of them. A thin "
        "line is a seed that the mean leaves out. A cross marks where a run diverged. Dashed grey: "
        f"{looks.study.floors_text}. Curves may leave the top of the figure."
    )
    if "late" in domains:
        caption += (
            f" The last third of the steps stands {'beside' if len(panels) == 1 else 'below'} at a scale of its own, "
            f"for the methods near the best, with a running mean over {curves.LATE_SMOOTHING:.0%}."
        )
    if len(lrs) > 1:
        caption += " In print each method has its best learning rate, that of the least mean loss over seeds."
    return Figure("loss", "Training loss", caption, {"main": table, "late": late, "levels": levels}, views)


def _domain(table: pl.DataFrame, levels: Sequence[float]) -> Domain:
    """From the least loss to where runs start, with some room; a loss that rises far above leaves the figure."""
    lowest = min([*table["low"], *levels])
    start = max([*table.group_by("curve").first()["loss"], *levels])
    room = 0.04 * (start - lowest) or 0.1
    return max(lowest - room, lowest / 1.1), min(max(*table["high"], start) + room, 1.25 * start)


def _late_domain(late: pl.DataFrame) -> Domain:
    """What holds the better two thirds of the late curves, but for those that lie far above the others."""
    shown = late.filter("best_lr", ~pl.col("alone"))
    shown = late if shown.is_empty() else shown
    ends = shown.group_by("curve").agg(pl.col("loss").mean())
    loss = pl.col("loss")
    near = ends.filter(loss <= loss.quantile(2 / 3, "higher"), loss <= loss.min() + 3 * (loss.median() - loss.min()))
    losses = shown.join(near, on="curve", how="semi")["loss"].to_list()
    room = 0.05 * (max(losses) - min(losses)) or 0.1
    return max(min(losses) - room, min(losses) / 1.1), max(losses) + room


def _loss_along(view: Spec, x: str, scale: str) -> Spec:
    """The view of steps on linear axes, with others."""
    column, title, form = _X[x]
    logs = {"x": scale in ("log x", "log both"), "y": scale in ("log loss", "log both")}

    def change(channel: str, axis: Spec) -> Spec:
        along = {"field": column, "title": title, "axis": axis["axis"] | {"format": form}} if channel == "x" else {}
        return axis | {"scale": axis["scale"] | {"type": "log" if logs[channel] else "linear"}} | along

    return with_axes(view, change)


def _loss_view(looks: Looks, panels: Sequence[str], domains: dict[str, Domain], lrs: Sequence[float]) -> Spec:
    beside = int(len(panels) == 1 < len(domains))
    tips = looks.tooltip(depth="d", width="d", lr="~g", runs="", train_loss=".3f")
    charts = []
    for data, domain in domains.items():
        late = data == "late"
        y_scale = alt.Scale(domain=domain, nice=False)
        title = f"{'loss of the last third' if late else 'training loss'} ({looks.study.unit})"
        at_x = alt.X("step:Q", scale=alt.Scale(nice=False, zero=False), axis=alt.Axis(tickCount=5, grid=False))
        at_y = alt.Y("loss:Q", title=title, scale=y_scale, axis=alt.Axis(tickCount=6, format="~g"))
        base = alt.Chart().encode(x=at_x, color=looks.colour(), detail="curve:N")
        if len(lrs) > 1:
            base = base.transform_filter("chosen_lr == 0 ? datum.best_lr : datum.lr == chosen_lr")
        width = alt.condition("datum.alone", alt.value(1), alt.value(2.2))
        lines = looks.lines(base, picking=False, clip=True).encode(y=at_y, strokeWidth=width)
        bands = looks.band(base, alt.Y("low:Q", scale=y_scale), 0.08 if late else 0.15, clip=True)
        if not late:  # the second chart follows the first one's legend
            bands = bands.properties(name="bands").add_params(*looks.picks)
            if len(lrs) > 1:
                labels = ["each method's best", *(f"{lr:g}" for lr in lrs)]
                chosen = alt.binding_select(options=[0, *lrs], labels=labels, name="learning rate ")
                bands = bands.add_params(alt.param(name="chosen_lr", value=0, bind=chosen))
        crossed = base.transform_filter("datum.crossed").mark_point(**CROSS)
        layers = [
            bands,
            lines,
            base.mark_line(clip=True, strokeWidth=12, opacity=0).encode(y=at_y, tooltip=tips),  # for the mouse to meet
            crossed.encode(y=at_y, opacity=looks.opacity(1)),
            *([] if late else _levels(y_scale, size_of(len(panels) + beside)[0])),
        ]
        charts.append(in_panels(layers, panels, beside, data))
    return finished(alt.hconcat(*charts) if beside else alt.vconcat(*charts), "Training loss")


def _levels(y_scale: alt.Scale, width: int) -> list[alt.Chart]:
    """The unigram entropies, each with its name."""
    level = alt.Chart(alt.NamedData("levels")).encode(y=alt.Y("level:Q", scale=y_scale))
    named = level.encode(x=alt.value(width - 4), text="name:N")
    look: Spec = {"align": "right", "baseline": "bottom", "dy": -4, "fontSize": 11.5}
    return [
        level.mark_rule(strokeDash=[5, 4], stroke=GREY, strokeWidth=1.2),
        named.mark_text(stroke="white", strokeWidth=4, strokeJoin="round", **look),  # to be read on a curve
        named.mark_text(color=GREY, **look),
    ]


def gap(study: Study) -> Figure | None:
    """Training loss less the baseline's against tokens, each at its own best learning rate."""
    looks = Looks(study)
    table, panels = looks.with_panels(curves.gap_curves(study))
    if table["step"].n_unique() < 2:
        return None
    column, title = ("step", "step") if table["tokens"].null_count() else ("tokens", f"training {study.counted}")
    log, shown = alt.Scale(type="log", nice=False), alt.Axis(format="~s", grid=False)
    late = table.filter(pl.col("step") >= pl.col("step").max() / 64)
    scale = alt.Scale(domain=_with_zero(late), nice=False)
    y = alt.Y("gap:Q", title=f"loss less the baseline’s ({study.unit})", scale=scale, axis=alt.Axis(tickCount=7))
    base = looks.base(alt.X(f"{column}:Q", title=title, scale=log, axis=shown))
    tips = looks.tooltip(tokens=".3~s", gap="+.3f", low="+.3f", high="+.3f", seeds="d", lr="~g", baseline_lr="~g")
    points = {"filled": True, "size": 22}
    layers = [
        alt.Chart().mark_rule(stroke=GREY).encode(y=alt.datum(0)),
        looks.band(base, alt.Y("low:Q", scale=scale), clip=True),
        looks.lines(base, strokeWidth=2.2, clip=True, point=points).encode(y=y, tooltip=tips),
    ]
    name = "Gap against tokens"
    first = finished(in_panels(layers, panels), name)
    whole = with_scale(first, "y", domain=_with_zero(table), nice=False)
    caption = (
        "Training loss less the baseline’s along the run, below zero the method is better: each at its own best "
        "learning rate, and seed by seed, for runs of a seed see the same batches. A point is the mean over a window "
        f"that ends {curves.WINDOW:.2f} times as far as it begins; over seeds the mean, and a band from the least to "
        f"the greatest. Baseline: {study.baseline_text}. The schedule is the whole run’s: of a shorter run the gap at "
        "its own end may differ."
    )
    return Figure("gap", name, caption, {"main": table}, {"as it ends": first, "all": whole})


def _with_zero(table: pl.DataFrame) -> list[float]:
    """From the least to the greatest gap, zero among them, with some room."""
    low, high = min(0.0, *table["low"]), max(0.0, *table["high"])
    room = 0.1 * (high - low) or 1e-3
    return [low - room, high + room]


def block_grad_norm(study: Study) -> Figure | None:
    """Gradient norm of each block at the initial weights and at the end, at each method's best learning rate."""
    looks, charts = Looks(study), []
    table, panels = looks.with_panels(curves.block_curves(study))
    if table.is_empty():
        return None
    for number, when in enumerate(when for when in curves.WHEN if when in set(table["when"])):
        here = table.filter(when=when)
        bounds = math.floor(math.log10(min(here["low"]))), math.ceil(math.log10(max(here["high"])))
        powers = range(bounds[0], max(bounds[1], bounds[0] + 1) + 1)
        scale = alt.Scale(type="log", domain=[10.0 ** powers[0], 10.0 ** powers[-1]], nice=False)
        ticks = alt.Axis(values=[10.0**power for power in powers[:: -(-len(powers) // 9)]], format="~e")
        x = alt.X("block:Q", title="block (0 is nearest the input)", axis=alt.Axis(tickMinStep=1, grid=False))
        y = alt.Y("norm:Q", title=f"gradient norm {when}", scale=scale, axis=ticks)
        base = looks.base(x).transform_filter(alt.datum.when == when)
        line = looks.lines(base, picking=number == 0, strokeWidth=2.2)  # the second follows the first one's legend
        line = line.encode(y=y, tooltip=looks.tooltip(block="d", norm=".3~e"))
        layers = [line, looks.band(base, alt.Y("low:Q", scale=scale))]
        charts.append(in_panels(layers, panels, beside=int(len(panels) == 1)))
    title = "Gradient norm of each block"
    caption = (
        "Norm of the loss gradient with respect to each block’s weights, at the initial weights and at the last step "
        "that recorded it: each has its own scale. Over seeds: the geometric mean, and a band from the least to the "
        "greatest. Each method at its best learning rate."
    )
    chart = alt.hconcat(*charts) if len(panels) == 1 else alt.vconcat(*charts)
    return Figure("block_grad_norm", title, caption, {"main": table}, {"": finished(chart, title)})
