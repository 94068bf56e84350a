"""The figures of the signal, in the looks of a report."""

from pathlib import Path
from typing import Any

import polars as pl
import vl_convert

from spannorm_jax.analysis.quantities import QUANTITIES
from spannorm_jax.errors import UserError
from spannorm_jax.report.looks import Figure, alt, finished, in_panels
from spannorm_jax.report.page import print_svg
from spannorm_jax.report.palette import GREY, PLACEMENT_ORDER, colours, ranked

_KINDS = {"measured": [1, 0], "predicted": [5, 4]}  # dashes
_PNG_SCALE = 2
# What the title of a panel says of the settings that vary.
_PANEL = dict(init="{}", ffn="{}", depth="{} blocks", width="width {}", tokens="{} tokens", step="step {}")


def draw(records: list[dict[str, Any]], out: Path) -> list[Path]:
    """Writes a figure for each quantity that a record has, as SVG and PNG; returns the SVGs' paths.

    Raises:
      UserError: `out` cannot be written, or no record has a number to draw.
    """
    written = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        for key in QUANTITIES:
            table = lines_of(records, key)
            if table.is_empty():
                continue
            svg = print_svg(_figure(key, table))
            path = out / f"{key}.svg"
            path.write_text(svg, encoding="utf-8")
            path.with_suffix(".png").write_bytes(vl_convert.svg_to_png(svg, scale=_PNG_SCALE))
            written.append(path)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}; choose another") from error
    if not written:
        raise UserError("there is nothing to draw: no record holds a finite number of a block")
    return written


def lines_of(records: list[dict[str, Any]], key: str) -> pl.DataFrame:
    """Block (from 1), value, placement, kind and panel of what the records say of a quantity; several seeds' mean."""
    abouts = [record["about"] for record in records if key in record]
    varying = {name for about in abouts for name in about if about[name] != abouts[0][name]}
    rows = []
    for record in records:
        about = record["about"]
        shown = [text.format(about[name]) for name, text in _PANEL.items() if name in varying]
        for block, value in enumerate(record.get(key, ()), 1):
            # What is not above zero has no place on a logarithmic axis.
            if value is not None and (value > 0 or not QUANTITIES[key][1]):
                rows.append(
                    {"block": block, "value": float(value), "placement": about["placement"], "kind": about["kind"]}
                    | {"panel": ", ".join(shown)}
                )
    if not rows:
        return pl.DataFrame()
    return (
        pl.DataFrame(rows)
        .group_by("block", "placement", "kind", "panel", maintain_order=True)
        .agg(pl.col("value").mean())
    )


def _figure(key: str, table: pl.DataFrame) -> Figure:
    title, log = QUANTITIES[key]
    placements = ranked(table["placement"], PLACEMENT_ORDER)
    kinds = [kind for kind in _KINDS if kind in set(table["kind"])]
    scale = alt.Scale(domain=placements, range=colours(placements))
    dashes = alt.Scale(domain=kinds, range=[_KINDS[kind] for kind in kinds])
    stroke: dict[str, Any] = {"symbolType": "stroke", "symbolStrokeWidth": 2.5, "symbolOpacity": 1}
    base = alt.Chart().encode(
        x=alt.X("block:Q", title="block", axis=alt.Axis(grid=False, tickMinStep=1), scale=alt.Scale(nice=False)),
        y=alt.Y("value:Q", title=title, scale=alt.Scale(type="log" if log else "linear", zero=False, nice=not log)),
        color=alt.Color("placement:N", scale=scale, sort=placements, legend=alt.Legend(title="placement", **stroke)),
    )
    legend = alt.Legend(title=None, symbolStrokeColor=GREY, **stroke)
    lines = base.mark_line(strokeWidth=2).encode(
        strokeDash=alt.StrokeDash("kind:N", scale=dashes, sort=kinds, legend=legend)
    )
    # Blocks that were measured, which may be few; a prediction has all of them.
    points = base.transform_filter("datum.kind == 'measured'").mark_point(filled=True, size=14, opacity=1)
    panels = table["panel"].unique(maintain_order=True).to_list()
    layers = [lines, points]
    heading = title[:1].upper() + title[1:]
    return Figure(key, heading, "", {"main": table}, {"": finished(in_panels(layers, panels), heading)})
