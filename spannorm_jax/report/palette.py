"""What every figure looks like: one colour and point per placement, one line style per init, and the outcomes' colours.

Colours are at least 3:1 on white and stay apart for colour-blind readers (tests/report/test_palette.py); where two come
near each other, as so many must, points and legends tell them apart.
"""

from collections.abc import Iterable, Sequence
from typing import Any

PLACEMENT_ORDER = (  # then by alphabet
    *("pre", "post", "span", "span_raw", "peri", "hybrid", "layerscale", "siamese"),
    *("deepnorm", "olmo2", "b2t", "residual", "mix", "lns", "keel", "rezero", "subln"),
    *("deepscale", "pre_embnorm"),
)
INIT_ORDER = (
    *("plain", "gpt2", "scale-L1", "scale-L0.5", "scale-L0.75", "scale-L1-mult", "scale-L0.5-mult", "scale-L0.75-mult"),
    *("normal", "xavier", "megatron", "deepnorm", "subln", "shrink-L1", "shrink-L0.5", "zero_out", "ds"),
)
OUTCOME_ORDER = ("trained", "plateau", "collapsed", "diverged", "unfinished")

_COLOURS = {
    "pre": "#1459b0",
    "post": "#b8450a",
    "span": "#008a5c",
    "span_raw": "#a88400",
    "peri": "#d63aa8",
    "hybrid": "#4a1508",
    "layerscale": "#2b95e8",
    "siamese": "#5a3070",
    "deepnorm": "#5a00ff",
    "olmo2": "#e10f4b",
    "b2t": "#001e78",
    "residual": "#783c5a",
    "mix": "#964bff",
    "lns": "#782d00",
    "keel": "#5a00b4",
    "rezero": "#00002d",
    "subln": "#2d0f1e",
    "deepscale": "#729c90",
    "pre_embnorm": "#fc3c78",
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
    "siamese": "M-1,-0.7L-0.2,-0.7L-0.2,0.7L-1,0.7ZM0.2,-0.7L1,-0.7L1,0.7L0.2,0.7Z",  # a pair
    "deepnorm": "wedge",
    "olmo2": "arrow",
    "b2t": "M-1,-1L1,-1L-1,1L1,1Z",  # an hourglass
    "residual": "M-1,-1L-1,1L1,-1L1,1Z",  # a bow tie
    "mix": "M0,-1L1,-0.2L0.6,1L-0.6,1L-1,-0.2Z",  # a pentagon
    "lns": "M0,-1L0.25,-0.25L1,0L0.25,0.25L0,1L-0.25,0.25L-1,0L-0.25,-0.25Z",  # a star
    "keel": "M-0.5,-1L0.5,-1L1,0L0.5,1L-0.5,1L-1,0Z",  # a hexagon
    "rezero": "M-0.25,-1L0.25,-1L0.25,1L-0.25,1Z",  # a bar
    "subln": "M-1,-1L0,-1L0,0L1,0L1,1L-1,1Z",  # an L
    "deepscale": "M-0.5,-0.8L0.5,-0.8L1,0.8L-1,0.8Z",  # a trapezium
    "pre_embnorm": "M-1,-1L1,-1L1,1L0.4,1L0.4,-0.4L-0.4,-0.4L-0.4,1L-1,1Z",  # an arch
}
_DASHES = {  # on, off, in pixels
    **{"plain": (2, 2), "gpt2": (7, 3), "scale-L1": (1, 0), "normal": (8, 2, 2, 2), "xavier": (12, 3)},
    **{"megatron": (4, 2, 1, 2, 1, 2), "deepnorm": (1, 4), "subln": (14, 2, 2, 2, 2, 2), "shrink-L1": (5, 5)},
    **{"scale-L0.5": (10, 4), "scale-L0.75": (6, 2, 1, 2), "scale-L1-mult": (3, 2), "scale-L0.5-mult": (2, 4)},
    **{"scale-L0.75-mult": (9, 2, 1, 2, 1, 2), "shrink-L0.5": (6, 6), "zero_out": (3, 5), "ds": (4, 6)},
}
_MORE_DASHES = ((10, 6), (2, 6), (16, 4, 4, 4))
OUTCOME_COLOURS = {
    **{"trained": "#7fb8dc", "plateau": "#f0c808", "collapsed": "#e07a1f", "diverged": "#8f1d0c"},
    "unfinished": "#d9dde2",
}
OUTCOME_INK = dict.fromkeys(OUTCOME_ORDER, "#10222e") | {"diverged": "#ffffff"}
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
