"""Ceilings: the bisection over a ladder of rates, and what a report makes of it."""

import itertools
import math
import random

import pytest
from run_folders import STEPS, study_in, write_run

from spannorm_jax.report.ceilings import bracket, ceilings, interval_text, middles, odd, trains, tries
from spannorm_jax.report.contents import _ceilings
from spannorm_jax.report.figures import ceiling

RISING = [5.0 + 0.1 * step for step in range(STEPS)]  # never below token frequencies: a plateau


def test_a_run_trained_or_not_or_is_not_known():
    assert [trains(o) for o in ("trained", "plateau", "collapsed", "diverged")] == [True, False, False, False]
    assert trains("unfinished") is None and trains(None) is None


@pytest.mark.parametrize("rungs", [1, 2, 7, 26])
def test_a_bisection_finds_every_ceiling_in_few_runs(rungs):
    """The first seed's takes as few as can be, and one for the top; what bears all rates is found at the second."""
    for limits in (
        itertools.product(range(rungs + 1), repeat=3) if rungs < 8 else [(9, 9, 9), (26, 26, 26), (20, 17, 19)]
    ):
        asked = set()

        def trained(rung, seed, asked=asked, limits=limits):
            asked.add((rung, seed))
            return rung < limits[seed]

        limit = min(limits)
        assert bracket(rungs, 3, trained)[:2] == (limit - 1, limit)
        first = [rung for rung, seed in asked if seed == 0]
        lower = limits[0] - limit  # each costs three runs at most
        assert len(first) <= math.ceil(math.log2(rungs + 1)) + 1 + lower and len(asked) <= len(first) + 2 + 2 * lower
        if limit == rungs:
            assert len(asked) <= 4
        if limit:
            assert {(limit - 1, seed) for seed in range(3)} <= asked


def test_an_unknown_run_leaves_the_bracket_open_and_is_tried_first():
    known = {(3, 0): True, (6, 0): False}
    at = lambda known: lambda *run: known.get(run)  # noqa: E731
    assert bracket(7, 2, at(known)) == (3, 6, ((4, 0),))
    assert bracket(7, 2, at(known | {(4, 0): False})) == (3, 4, ((3, 1),))
    assert bracket(7, 2, at(known | {(4, 0): False, (3, 1): False})) == (2, 3, ((2, 0), (2, 1)))
    assert bracket(7, 2, at(known | {(4, 0): False, (3, 1): True})) == (3, 4, ())
    assert bracket(7, 3, at({(3, 0): True, (6, 0): True})) == (6, 7, ((6, 1), (6, 2)))
    assert list(tries(7, 2, at(known | {(4, 0): False, (3, 1): True}))) == []
    # What either outcome would ask for, that of success first.
    assert list(itertools.islice(tries(7, 2, at({})), 6)) == [((r, 0),) for r in (3, 6, 1)] + [
        ((6, 1),),
        ((4, 0),),
        ((2, 0),),
    ]


def test_what_was_tried_besides_moves_no_ceiling():
    """Also where outcomes are not monotone: the bisection's own way decides, whatever else is known."""
    draw = random.Random(0)
    for _ in range(200):
        rungs, seeds = draw.randint(1, 30), draw.randint(1, 4)
        truth = {run: draw.random() < 0.7 for run in itertools.product(range(rungs), range(seeds))}
        whole = bracket(rungs, seeds, lambda *run, truth=truth: truth[run])
        known = {}
        of = rungs, seeds, lambda *run, known=known: known.get(run)
        while bracket(*of).wanted:
            for wanted in list(itertools.islice(tries(*of), draw.randint(1, 5))):
                known |= {run: truth[run] for run in wanted[: draw.randint(1, seeds)]}
        assert bracket(*of) == whole and not whole.wanted
        assert whole.low < 0 or all(truth[whole.low, seed] for seed in range(seeds))


def test_a_seed_that_fails_below_a_rate_at_which_it_trains_is_named():
    known = {(1, 0): False, (2, 0): True, (3, 0): False, (0, 1): True, (2, 1): False}
    assert odd(4, 2, lambda *run: known.get(run)) == [1]


def test_a_report_has_each_methods_ceiling(tmp_path):
    """PreNorm trains up to 2e-2, PostNorm at none, SpanNorm at all; one seed of PreNorm's 1e-2 is not there yet."""
    rates = [5e-3, 1e-2, 2e-2, 4e-2]
    for i, lr in enumerate(rates):
        for seed in (0, 1):
            for placement, good in (("pre", i < 3), ("post", False), ("span", True)):
                losses = None if good or (seed == 0 and placement == "pre") else RISING
                folder = tmp_path / f"{placement}-{i}-{seed}"
                write_run(folder, placement, "plain", losses=losses, optim__lr=lr, seed=seed)
    study = study_in(tmp_path, None, None, rates, 2)
    found = [line[3:6] for line in ceilings(study).iter_rows()]
    assert found == [(2e-2, 4e-2, True), (None, 5e-3, True), (4e-2, None, True)]
    _, lines = _ceilings(study)
    assert [line[-3] for line in lines] == ["[0.02, 0.04]", "below 0.005", "above 0.04"]
    drawn = middles(study).select("ceiling", "beyond").rows()
    assert drawn == [(pytest.approx(math.sqrt(8e-4)), None), (5e-3, "below"), (4e-2, "above")]
    assert ceiling(study, "depth") is not None and ceiling(study, "width") is None
    assert ceilings(study_in(tmp_path)).is_empty() and _ceilings(study_in(tmp_path))[1] == []

    three = study_in(tmp_path, None, None, rates, 3)
    assert ceilings(three)["settled"].to_list() == [False, True, False]
    assert "so far" in _ceilings(three)[1][0][-3]
    assert middles(three)["beyond"].to_list() == [None, "below"]  # SpanNorm's may be anywhere yet


def test_intervals_beyond_the_ladder_are_words():
    assert [interval_text(*ends) for ends in ((1e-3, 1.2e-3), (None, 1e-3), (0.1, None), (None, None))] == [
        "[0.001, 0.0012]", "below 0.001", "above 0.1", "not known",
    ]  # fmt: skip
