"""What the figures of a report share: their form, their encodings, their panels, what the mouse shows."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from spannorm_jax.paths import some_home
from spannorm_jax.report import frames
from spannorm_jax.report.palette import GREY, colours, dashes, shapes, theme
from spannorm_jax.report.study import ARM, Study

with some_home():  # which Altair asks for where it is imported, for data that nothing here uses
    import altair as alt

_CROWD = 9  # methods in one panel
_FADED = 0.07  # what the legend's choice leaves out
Spec = dict[str, Any]  # Vega-Lite
CROSS: Spec = {"shape": "cross", "angle": 45, "size": 110, "filled": True, "clip": True}  # where a run diverged


@dataclass(frozen=True)
class Figure:
    """A figure: its data by name, and its views by what the page's list calls them; print has the first."""

    name: str
    title: str
    caption: str
    data: dict[str, pl.DataFrame]
    views: dict[str, Spec]


class Looks:
    """The encodings that all figures of a study share, and the selections of their legends."""

    def __init__(self, study: Study):
        self.study, self.placements, self.inits = study, study.placements, study.inits
        names = ("placement", "init")
        self.picks = [alt.selection_point(name=f"pick_{name}", fields=[name], bind="legend") for name in names]

    def colour(self, channel: Any = alt.Color, legend: bool = True) -> Any:
        scale = alt.Scale(domain=self.placements, range=colours(self.placements))
        look: dict[str, Any] = {"symbolType": "stroke", "symbolStrokeWidth": 3, "symbolOpacity": 1}
        shown = alt.Legend(title="placement", **look) if legend else None
        return channel("placement:N", scale=scale, sort=self.placements, legend=shown)

    def dash(self) -> alt.StrokeDash:
        scale = alt.Scale(domain=self.inits, range=[list(dash) for dash in dashes(self.inits)])
        legend = alt.Legend(title="init", symbolType="stroke", symbolStrokeColor=GREY, symbolStrokeWidth=2.5)
        return alt.StrokeDash("init:N", scale=scale, sort=self.inits, legend=legend)

    def shape(self) -> alt.Shape:
        scale = alt.Scale(domain=self.placements, range=shapes(self.placements))
        return alt.Shape("placement:N", scale=scale, sort=self.placements, legend=alt.Legend(title="placement"))

    def opacity(self, shown: float) -> Any:
        return alt.when(*self.picks).then(alt.value(shown)).otherwise(alt.value(_FADED * shown))

    def base(self, x: alt.X) -> alt.Chart:
        return alt.Chart().encode(x=x, color=self.colour(), detail=["init:N", "other:N"])

    def lines(self, base: alt.Chart, picking: bool = True, **mark: Any) -> alt.Chart:
        """Lines of methods; the legend's choice is theirs if they are `picking`, else another chart's."""
        lines = base.mark_line(**mark).encode(strokeDash=self.dash(), opacity=self.opacity(1))
        return lines.properties(name="lines").add_params(*self.picks) if picking else lines

    def bars(self, base: alt.Chart, low: alt.Y) -> alt.Chart:
        """From `low` to the column `high`."""
        return base.mark_rule(strokeWidth=1.5, clip=True).encode(y=low, y2="high:Q", opacity=self.opacity(0.7))

    def band(self, base: alt.Chart, low: alt.Y, shown: float = 0.15, **mark: Any) -> alt.Chart:
        """From `low` to the column `high`."""
        return base.mark_area(**mark).encode(y=low, y2="high:Q", opacity=self.opacity(shown))

    def with_panels(self, table: pl.DataFrame, without: Sequence[str] = ()) -> tuple[pl.DataFrame, list[str]]:
        """The table with the panel and the names of each line, and the panels in order.

        A panel is set apart by depth and width where they differ, but for the axes `without`, and by other config keys.
        Many methods have a panel an initialisation: no more curves can be told apart in one.
        """
        crowded = len({method[:2] for method in self.study.methods}) > _CROWD
        lines = []
        for size, (i, method) in itertools.product(self.study.sizes, enumerate(self.study.methods)):
            of_init, of_others = [f"init {method.init}"] * crowded, [method.other] * bool(method.others)
            lines.append((i, *size, ", ".join([*frames.size_words(self.study, size, without), *of_init, *of_others])))
        placed = pl.DataFrame(lines, schema=[*ARM[:3], "panel"], orient="row")
        table = table.join(placed, on=ARM[:3], how="left", maintain_order="left")
        present = set(table["panel"])
        order = [panel for panel in dict.fromkeys(placed["panel"]) if panel in present]
        return frames.named(self.study, table).drop("method"), order

    def tooltip(self, **more: str) -> list[alt.Tooltip]:
        """What the mouse shows: the method, then each of `more`, a field with its format ("" for text)."""
        fields = dict.fromkeys(["placement", "init", *["other"] * any(m.others for m in self.study.methods)], "")
        tips = []
        for field, form in (fields | more).items():
            kind: dict[str, Any] = {"shorthand": f"{field}:Q", "format": form} if form else {"shorthand": f"{field}:N"}
            tips.append(alt.Tooltip(title=field.replace("_", " "), **kind))
        return tips


def size_of(panels: int) -> tuple[int, int]:
    return {1: (560, 340), 2: (350, 280)}.get(panels, (270, 220))


def in_panels(layers: Sequence[alt.Chart], panels: Sequence[str], beside: int = 0, data: str = "main") -> Any:
    """The layers in one panel, or in one for each of `panels`; `beside` other charts they are smaller."""
    width, height = size_of(len(panels) + beside)
    chart: Any = alt.layer(*layers, data=alt.NamedData(data)).properties(width=width, height=height)
    if len(panels) == 1:
        return chart
    columns = 2 if len(panels) in (2, 4) else 3
    facet = alt.Facet("panel:N", sort=list(panels), title=None, header=alt.Header(labelPadding=6))
    chart = chart.facet(facet=facet, columns=columns, spacing=28)
    # A last row that is not full would leave axes alone below nothing.
    return chart.resolve_axis(x="independent") if len(panels) % columns else chart


def finished(chart: Any, title: str) -> Spec:
    """The chart's Vega-Lite, without Altair's slow check: tests/report compiles every figure."""
    spec = chart.properties(title=title).to_dict(validate=False)
    return {"config": theme()} | {key: value for key, value in spec.items() if key != "config"}


def with_axes(spec: Any, change: Callable[[str, Spec], Spec]) -> Any:
    """The Vega-Lite with `change("x" or "y", encoding)` for each of its axes: much faster than made anew."""
    if isinstance(spec, list):
        return [with_axes(part, change) for part in spec]
    if not isinstance(spec, dict):
        return spec
    axes = {key for key in ("x", "y") if "field" in spec.get(key, ())}
    return {key: change(key, part) if key in axes else with_axes(part, change) for key, part in spec.items()}


def with_scale(spec: Spec, channel: str, **scale: Any) -> Spec:
    """The Vega-Lite with more of the scale of one of its axes."""

    def change(key: str, axis: Spec) -> Spec:
        return axis | {"scale": axis.get("scale", {}) | scale} if key == channel else axis

    return with_axes(spec, change)
