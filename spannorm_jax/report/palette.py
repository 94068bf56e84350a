"""What every figure looks like: one colour and point per placement, one line style per init, and the outcomes' colours.

Colours are at least 3:1 on white and stay apart for colour-blind readers (tests/report/test_palette.py); where two come
near each other, as eight must, points and legends tell them apart.
"""

from collections.abc import Iterable, Sequence
from typing import Any

PLACEMENT_ORDER = ("pre", "post", "span", "span_raw", "peri", "hybrid", "layerscale", "siamese")  # then by alphabet
INIT_ORDER = ("plain", "gpt2", "scale")
OUTCOME_ORDER = ("trained", "stalled", "diverged", "unfinished")

_COLOURS = {
    "pre": "#1459b0",
    "post": "#b8450a",
    "span": "#008a5c",
    "span_raw": "#a88400",
    "peri": "#d63aa8",
    "hybrid": "#4a1508",
    "layerscale": "#2b95e8",
    "siamese": "#5a3070",
}
_MORE_COLOURS = ("#6d5bb3", "#8c2d2d", "#8a7f6d", "#1a1a1a")
_SHAPES = {
    "pre": "circle",
    "post": "square",
    "span": "triangle-up",
    "span_raw": "triangle-down",
    "peri": "diamond",
    "hybrid": "triangle-right",
    "layerscale": "triangle-left",
    "siamese": "stroke",
}
_DASHES = {"plain": (2, 2), "gpt2": (7, 3), "scale": (1, 0)}  # on, off, in pixels
_MORE_DASHES = ((8, 2, 2, 2), (12, 3), (4, 2, 1, 2, 1, 2))
OUTCOME_COLOURS = {"trained": "#7fb8dc", "stalled": "#f0c808", "diverged": "#b5361c", "unfinished": "#d9dde2"}
OUTCOME_INK = {"trained": "#10222e", "stalled": "#10222e", "diverged": "#ffffff", "unfinished": "#10222e"}
INK, GREY, RULE = "#1f2328", "#59636e", "#e3e7eb"


def ranked(names: Iterable[str], order: Sequence[str]) -> list[str]:
    """Distinct names: those of `order` first, in its order, then the others alphabetically."""
    return sorted(set(names), key=lambda n: (order.index(n) if n in order else len(order), n))


def _styles(names: Sequence[str], known: dict[str, Any], more: Sequence[Any]) -> list[Any]:
    """One style a name: its own, or for names that are not ours the next of `more`."""
    others = [name for name in names if name not in known]
    return [known[n] if n in known else more[others.index(n) % len(more)] for n in names]


def colours(placements: Sequence[str]) -> list[str]:
    return _styles(placements, _COLOURS, _MORE_COLOURS)


def shapes(placements: Sequence[str]) -> list[str]:
    return _styles(placements, _SHAPES, ("cross",))


def dashes(inits: Sequence[str]) -> list[tuple[int, ...]]:
    return _styles(inits, _DASHES, _MORE_DASHES)


def theme() -> dict[str, Any]:
    """Vega-Lite's config for all figures."""
    font = "Liberation Sans, Arial, Helvetica, sans-serif"
    text = {"labelColor": INK, "titleColor": INK, "labelFontSize": 12, "titleFontSize": 13, "titleFontWeight": "normal"}
    return {
        "font": font,
        "background": "white",
        "padding": 10,
        "view": {"stroke": None},
        "axis": text | {"gridColor": RULE, "domainColor": "#9aa4ae", "tickColor": "#9aa4ae", "titlePadding": 10},
        "legend": text | {"symbolSize": 110, "symbolStrokeWidth": 2.5, "labelLimit": 260, "titleLimit": 260},
        "header": text | {"labelLimit": 420, "labelFontSize": 13, "labelFontWeight": "bold", "labelAnchor": "start"},
        "title": {"anchor": "start", "fontSize": 15, "color": INK, "subtitleColor": GREY, "subtitleFontSize": 12},
    }
