"""Verdicts on claims: from intervals and endings with known answers."""

import pytest
from run_folders import write_run

from experiments import claims
from experiments.claims import FAILS, HOLDS, NOT_TESTED, NOT_TOLD
from experiments.results_page import Results, read
from spannorm_jax.report.stats import Interval

PRE, POST, SPAN = ({"placement": name} for name in ("pre", "post", "span"))
PLATEAU = [4.0] * 20  # no better than the frequencies of tokens


def sweep(root, *runs):
    for i, (placement, changes) in enumerate(runs):
        write_run(root / str(i), placement, "plain", **changes)
    return Results("made", read(root), root, "")


def seeds(placement, bits, **changes):
    return [(placement, {"bits": b, "seed": i, **changes}) for i, b in enumerate(bits)]


@pytest.mark.parametrize(
    ("verdict", "low", "high", "word"),
    [
        *(("below_zero", *case) for case in [(-0.2, -0.1, HOLDS), (-0.1, 0.1, NOT_TOLD), (0.1, 0.2, FAILS)]),
        ("below_zero", None, None, NOT_TOLD),  # of one pair
        *(("stays", *case) for case in [(0.9, 1.1, HOLDS), (0.5, 1.5, NOT_TOLD), (0.3, 0.7, FAILS), (1.5, 2.0, FAILS)]),
    ],
)
def test_a_difference_holds_below_zero_and_a_rate_stays_where_all_its_factors_are_near_one(verdict, low, high, word):
    if verdict == "stays":
        assert claims.stays(low, high).word == word
    else:
        assert claims.below_zero(Interval(-0.1, low, high, 1 if low is None else 3), "").word == word


def test_less_compares_at_the_rates_that_are_asked_for(tmp_path):
    made = sweep(
        tmp_path,
        *seeds("pre", [2.2, 2.21, 2.19], optim__lr=0.01),
        *seeds("pre", [2.5, 2.51, 2.49], optim__lr=0.003),
        *seeds("span", [2.3, 2.32, 2.29], optim__lr=0.003),
        *seeds("span", [4.9, 4.9, 4.9], optim__lr=0.01, losses=PLATEAU),
    )
    assert claims.less(made, SPAN, PRE, lr=0.003).word == HOLDS
    assert claims.less(made, SPAN, PRE, own_best=True).word == FAILS
    failed = claims.less(made, SPAN, PRE, lr=0.01)
    assert failed.word == FAILS and failed.effect == "it trained with 0 of 3 seeds"
    assert claims.less(made, POST, PRE).word == claims.less(made, SPAN, PRE, lr=0.1).word == NOT_TESTED


@pytest.mark.parametrize(
    ("span", "post", "word"),
    [([None] * 2, [PLATEAU] * 2, HOLDS), ([None, PLATEAU], [PLATEAU] * 2, FAILS), ([None] * 2, [None] * 2, NOT_TOLD),
     ([None] * 2, [], NOT_TESTED)],
)  # fmt: skip
def test_it_trains_where_another_fails(span, post, word, tmp_path):
    both = {"span": span, "post": post}
    runs = [(n, {"bits": 2.0, "losses": own, "seed": i}) for n, each in both.items() for i, own in enumerate(each)]
    assert claims.trains_where(sweep(tmp_path, *runs), SPAN, POST).word == word


def test_it_trains_too_where_another_does_and_else_nothing_is_told(tmp_path):
    made = sweep(
        tmp_path,
        *seeds("pre", [2.0, 2.1], optim__lr=0.01),
        *seeds("span", [2.0, 2.4], optim__lr=0.01),
        *seeds("post", [4.9, 4.9], optim__lr=0.01, losses=PLATEAU),
    )
    assert claims.trains_too(made, SPAN, PRE).word == HOLDS
    assert claims.trains_too(made, POST, PRE).word == FAILS
    assert claims.trains_too(made, SPAN, POST).word == NOT_TOLD
    assert claims.trains_too(made, SPAN, PRE, lr=0.1).word == NOT_TESTED


@pytest.mark.parametrize(("deep", "word"), [([0.0, 0.02, 0.01], FAILS), ([-0.2, -0.21, -0.22], HOLDS)])
def test_a_lead_falls_where_the_gap_grows_seed_by_seed(deep, word, tmp_path):
    gaps = {3: [-0.1, -0.11, -0.1], 6: deep}
    runs = [
        (name, {"bits": 2.5 + 0.3 * i + gap, "seed": i, "model__depth": depth})
        for depth, each in gaps.items()
        for i, own in enumerate(each)
        for name, gap in (("pre", 0.0), ("span", own))
    ]
    made = sweep(tmp_path, *runs)
    assert claims.change(made, {"depth": 3}, {"depth": 6}, SPAN, PRE).word == word


def test_a_gradient_vanishes_by_the_first_block_over_the_last_at_the_start(tmp_path):
    made = sweep(tmp_path, *seeds("span", [2.0, 2.1]), *seeds("post", [2.0, 2.1]))  # 0.1 and 0.3 in every such folder
    found = claims.gradient(made, SPAN, POST)
    assert found.word == FAILS and found.effect == "0.33 of the last block's (the other's 0.33)"
    assert claims.gradient(made, SPAN, PRE).word == NOT_TESTED


def test_one_seed_and_unequal_rates_tell_nothing(tmp_path):
    failed = {"optim__lr": 0.01, "losses": PLATEAU}
    made = sweep(tmp_path, *seeds("pre", [2.2], optim__lr=0.01), *seeds("span", [4.9], **failed),
                 *seeds("post", [2.1, 2.11], optim__lr=0.003), *seeds("post", [2.3, 2.31], optim__lr=0.01))  # fmt: skip
    assert claims.less(made, SPAN, PRE).word == claims.trains_where(made, PRE, SPAN).word == NOT_TOLD
    assert claims.less(made, POST, PRE, own_best=True).effect == "they were not run at the same rates"


def test_the_regime_is_of_the_best_run_and_one_that_was_not_run_has_none(tmp_path):
    made = sweep(tmp_path, *seeds("span", [2.0, 2.25]))
    tokens = made.study.rows[0].tokens_per_step * 20
    assert claims.regime(made.study.rows, floor=1.75) == f"{tokens / 1234:.2g}; +0.25"
    assert claims.regime((), floor=1.75) == ""
