"""Ceilings: the bisection over a ladder of rates, and what a report makes of it."""

import math
import random

import pytest
from run_folders import STEPS, study_in, write_run

from spannorm_jax.report.ceilings import bracket, ceilings, holds, interval_text, middles, odd, tries
from spannorm_jax.report.contents import _ceilings
from spannorm_jax.report.figures import ceiling

RISING = [5.0 + 0.1 * step for step in range(STEPS)]  # never below token frequencies: a plateau


def test_one_seed_settles_that_a_rate_fails_and_all_that_it_holds():
    assert holds(["trained", None, "collapsed"], 3) is False
    assert holds(["trained", "trained", "trained"], 3) is True
    for outcomes in (["trained", "trained", None], ["trained", "unfinished", "trained"], []):
        assert holds(outcomes, 3) is None


@pytest.mark.parametrize("rungs", [1, 2, 7, 26])
def test_a_bisection_finds_every_ceiling_in_as_few_rates_as_can_be(rungs):
    for limit in range(rungs + 1):
        asked = []

        def held(rung, asked=asked, limit=limit):
            asked.append(rung)
            return rung < limit

        assert bracket(rungs, held) == (limit - 1, limit)
        assert len(asked) == len(set(asked)) <= math.ceil(math.log2(rungs + 1))


def test_an_unknown_rate_leaves_the_bracket_open_and_is_tried_first():
    known = {3: True, 5: False}
    assert bracket(7, known.get) == (3, 5)
    assert list(tries(7, known.get)) == [4]
    assert list(tries(7, {}.get)) == [3, 1, 5, 0, 2, 4, 6]  # and then what either outcome would ask for
    assert list(tries(7, (known | {4: True}).get)) == []


def test_what_was_tried_besides_moves_no_ceiling():
    """Also where outcomes are not monotone: the bisection's own way decides, whatever else is known."""
    draw = random.Random(0)
    for _ in range(200):
        truth = [draw.random() < 0.6 for _ in range(draw.randint(1, 30))]
        whole = bracket(len(truth), truth.__getitem__)
        known = {}
        while (high_low := bracket(len(truth), known.get))[1] - high_low[0] > 1:
            for rung in list(tries(len(truth), known.get))[: draw.randint(1, 5)]:
                known[rung] = truth[rung]
        assert high_low == whole
        assert odd(len(truth), truth.__getitem__) == [i for i, held in enumerate(truth) if not held and any(truth[i:])]


def test_a_report_has_each_methods_ceiling(tmp_path):
    """PreNorm trains up to 2e-2, PostNorm at none, SpanNorm at all; one seed of PreNorm's 1e-2 is not there yet."""
    rates = [5e-3, 1e-2, 2e-2, 4e-2]
    for i, lr in enumerate(rates):
        for seed in (0, 1):
            for placement, trains in (("pre", i < 3), ("post", False), ("span", True)):
                losses = None if trains or (seed == 0 and placement == "pre") else RISING
                folder = tmp_path / f"{placement}-{i}-{seed}"
                write_run(folder, placement, "plain", losses=losses, optim__lr=lr, seed=seed)
    study = study_in(tmp_path, None, None, rates, 2)
    found = [line[3:6] for line in ceilings(study).iter_rows()]
    assert found == [(2e-2, 4e-2, True), (None, 5e-3, True), (4e-2, None, True)]
    _, lines = _ceilings(study)
    assert [line[-3] for line in lines] == ["[0.02, 0.04]", "below 0.005", "above 0.04"]
    assert middles(study)["ceiling"].to_list() == [pytest.approx(math.sqrt(8e-4))]
    assert ceiling(study, "depth") is not None and ceiling(study, "width") is None
    assert ceilings(study_in(tmp_path)).is_empty() and _ceilings(study_in(tmp_path))[1] == []

    three = study_in(tmp_path, None, None, rates, 3)
    assert ceilings(three)["settled"].to_list() == [False, True, False]
    assert "so far" in _ceilings(three)[1][0][-3]


def test_intervals_beyond_the_ladder_are_words():
    assert [interval_text(*ends) for ends in ((1e-3, 1.2e-3), (None, 1e-3), (0.1, None), (None, None))] == [
        "[0.001, 0.0012]", "below 0.001", "above 0.1", "not known",
    ]  # fmt: skip
