"""Colours that are fixed, stand out on white, and stay apart for colour-blind readers."""

import itertools

import numpy as np
import pytest

from spannorm_jax.config import SCALEINIT
from spannorm_jax.model.initialisation import INITS
from spannorm_jax.model.placement import PLACEMENTS
from spannorm_jax.report import palette

# Machado, Oliveira and Fernandes 2009: what eyes without one kind of cone see, in linear RGB.
SIGHT = {
    "all cones": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def linear(colour):
    rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    """CIE L*a*b*, in which a distance of 2 is just seen side by side."""
    xyz = XYZ @ np.clip(rgb, 0, 1) / np.array([0.9505, 1.0, 1.089])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def apart(colours, sight):
    seen = [lab(np.array(SIGHT[sight]) @ linear(colour)) for colour in colours]
    return min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2))


@pytest.mark.parametrize("sight", SIGHT)
def test_colours_stay_apart(sight):
    """The first round of hues plainly, the darker ones of later placements just."""
    assert apart(palette.colours(list(PLACEMENTS)), sight) > 4
    assert apart(palette.colours(list(PLACEMENTS)[:8]), sight) > 10
    assert apart(palette.colours(["pre", "post", "span"]), sight) > 20
    assert apart(list(palette.OUTCOME_COLOURS.values()), sight) > 20


def test_colours_stand_out_on_white():
    for colour in palette.colours(list(PLACEMENTS)):
        assert 1.05 / (0.05 + XYZ[1] @ linear(colour)) >= 3  # WCAG 2.1, 1.4.11: graphical objects


def test_every_placement_and_init_has_a_style_of_its_own():
    """Also those that the tables will have next, and runs of another version have."""
    others = [f"another_{i}" for i in range(3)]
    placements = [*PLACEMENTS, *others]
    assert len(set(palette.colours(placements))) == len(placements)
    assert len({*zip(palette.colours(placements), palette.shapes(placements), strict=True)}) == len(placements)
    assert set(INITS) - set(SCALEINIT) | {"scale-L1", "scale-L0.5-mult", "shrink-L1"} <= set(palette.INIT_ORDER)
    assert len(set(palette.dashes(palette.INIT_ORDER))) == len(palette.INIT_ORDER)
    assert palette.colours(["span"]) == palette.colours(["a", "pre", "span", "z"])[2:3]  # whatever else is drawn
