"""What every figure looks like: one colour and point per placement, one line style per init, and the outcomes' colours.

Looks go by the order of the tables of placements and of initialisations, never by a name. The first eight placements
have a hue each, the next eight the same hues darker; all stand out on white (tests/report/test_palette.py). Where two
come near each other, points, panels and legends tell them apart.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from spannorm_jax.model.initialisation import INITS, reading
from spannorm_jax.model.placement import PLACEMENTS

PLACEMENT_ORDER = tuple(PLACEMENTS)  # then by alphabet
_READINGS = [(power, place) for place in ("weight", "multiplier") for power in (1.0, 0.0, 0.5)]
INIT_ORDER = tuple(dict.fromkeys(reading(init, *of) for init in INITS for of in _READINGS))
OUTCOME_ORDER = ("trained", "plateau", "collapsed", "diverged", "unfinished")

_HUES = ("#1459b0", "#b8450a", "#008a5c", "#a88400", "#d63aa8", "#965a3c", "#7800d2", "#f000f0")
_LIGHT = (1.0, 0.45, 0.22)  # of the hues in each round, over the full one
_SHAPES = (
    *("circle", "square", "triangle-up", "triangle-down", "diamond", "triangle-right", "triangle-left", "wedge"),
    "M-1,-0.7L-0.2,-0.7L-0.2,0.7L-1,0.7ZM0.2,-0.7L1,-0.7L1,0.7L0.2,0.7Z",  # a pair
    "M-1,-1L1,-1L-1,1L1,1Z",  # an hourglass
    "M0,-1L0.25,-0.25L1,0L0.25,0.25L0,1L-0.25,0.25L-1,0L-0.25,-0.25Z",  # a star
    "M-0.5,-1L0.5,-1L1,0L0.5,1L-0.5,1L-1,0Z",  # a hexagon
    "M-1,-1L0,-1L0,0L1,0L1,1L-1,1Z",  # an L
)
_DASHES = (  # on, off, in pixels
    *((2, 2), (7, 3), (1, 0), (10, 4), (6, 2, 1, 2), (9, 2, 1, 2, 1, 2), (2, 4), (3, 2), (8, 2, 2, 2), (12, 3)),
    *((4, 2, 1, 2, 1, 2), (1, 4), (14, 2, 2, 2, 2, 2), (5, 5), (6, 6), (3, 5), (4, 6), (10, 6), (2, 6), (16, 4, 4, 4)),
    (20, 4),
)
OUTCOME_COLOURS = dict(zip(OUTCOME_ORDER, ("#7fb8dc", "#f0c808", "#e07a1f", "#8f1d0c", "#d9dde2"), strict=True))
OUTCOME_INK = dict.fromkeys(OUTCOME_ORDER, "#10222e") | {"diverged": "#ffffff"}
INK, GREY, RULE = "#1f2328", "#59636e", "#e3e7eb"


def ranked(names: Iterable[str], order: Sequence[str]) -> list[str]:
    """Distinct names: those of `order` first, in its order, then the others alphabetically."""
    return sorted(set(names), key=lambda n: (order.index(n) if n in order else len(order), n))


def _places(names: Sequence[str], order: Sequence[str]) -> list[int]:
    """Of each name its place in `order`, and after that in `names`."""
    others = [name for name in names if name not in order]
    return [order.index(n) if n in order else len(order) + others.index(n) for n in names]


def colours(placements: Sequence[str]) -> list[str]:
    found = []
    for i in _places(placements, PLACEMENT_ORDER):
        hue, light = _HUES[i % len(_HUES)], _LIGHT[i // len(_HUES) % len(_LIGHT)]
        found.append("#" + "".join(f"{round(int(hue[at : at + 2], 16) * light):02x}" for at in (1, 3, 5)))
    return found


def shapes(placements: Sequence[str]) -> list[str]:
    return [_SHAPES[i % len(_SHAPES)] for i in _places(placements, PLACEMENT_ORDER)]


def dashes(inits: Sequence[str]) -> list[tuple[int, ...]]:
    return [_DASHES[i % len(_DASHES)] for i in _places(inits, INIT_ORDER)]


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
