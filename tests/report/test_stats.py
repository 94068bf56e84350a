"""The statistics against SciPy, closed forms and hand counts."""

import math

import numpy as np
import pytest
import scipy.stats

from spannorm_jax.report import stats


@pytest.mark.parametrize("n", [2, 3, 10])
def test_the_t_interval_is_scipys(n):
    values = np.random.default_rng(n).normal(size=n)
    found = stats.t_interval(values.tolist())
    low, high = scipy.stats.t.interval(0.95, n - 1, loc=values.mean(), scale=scipy.stats.sem(values))
    assert (found.mean, found.low, found.high, found.n) == (pytest.approx(values.mean()), pytest.approx(low),
                                                            pytest.approx(high), n)  # fmt: skip


def test_one_value_has_no_interval_and_none_no_mean():
    assert stats.t_interval([2.5]) == stats.Interval(2.5, None, None, 1)
    assert stats.t_interval([]) is None


def test_differences_are_paired_by_seed():
    ours, theirs = {0: 1.0, 1: 2.0, 3: 9.0}, {3: 8.5, 1: 2.25, 2: 7.0}
    assert stats.paired_differences(ours, theirs) == [-0.25, 0.5]
    # What pairing is for: a spread that seeds share is in no difference.
    shared = {seed: 10.0 * seed for seed in range(5)}
    found = stats.t_interval(stats.paired_differences({s: x + 1 for s, x in shared.items()}, shared))
    assert (found.mean, found.low, found.high) == (1.0, 1.0, 1.0)


def test_the_bootstrap_of_one_seed_a_setting_is_scipys():
    values = np.random.default_rng(0).normal(size=30)
    found = stats.bootstrap([[v] for v in values])
    theirs = scipy.stats.bootstrap((values,), np.mean, method="percentile", n_resamples=20_000, rng=1)
    # Quantiles of 10,000 draws are known to about 1% of the interval's width.
    width = theirs.confidence_interval.high - theirs.confidence_interval.low
    assert found.mean == pytest.approx(values.mean())
    assert found.low == pytest.approx(theirs.confidence_interval.low, abs=0.03 * width)
    assert found.high == pytest.approx(theirs.confidence_interval.high, abs=0.03 * width)


def test_the_bootstrap_draws_settings_and_seeds():
    """Its variance is that of settings' means and, on top, of seeds within: (between + within / 3) / settings."""
    random = np.random.default_rng(0)
    settings = random.normal(size=(40, 1)) + 0.5 * random.normal(size=(40, 3))
    found = stats.bootstrap(settings.tolist())
    variance = (settings.mean(axis=1).var() + settings.var(axis=1).mean() / 3) / 40
    assert found.high - found.low == pytest.approx(2 * 1.96 * math.sqrt(variance), rel=0.05)
    assert found.n == 120 and found == stats.bootstrap(settings.tolist())


def test_few_settings_are_never_bootstrapped():
    assert stats.bootstrap([[1.0, 2.0, 3.0]] * (stats.BOOTSTRAP_SETTINGS - 1)) is None
    assert stats.bootstrap([[1.0, 2.0, 3.0]] * stats.BOOTSTRAP_SETTINGS) is not None
    assert stats.bootstrap([[1.0]] * 5 + [[]]) is None


def test_lr_sensitivity_is_the_mean_excess_with_losses_capped_at_initialisation():
    assert stats.lr_sensitivity([2.0, 2.5, 9.0, math.inf], 5.0) == pytest.approx((0 + 0.5 + 3 + 3) / 4)
    assert stats.lr_sensitivity([3.0, 3.0], 5.0) == 0


def test_the_parabola_finds_its_own_minimum_on_any_spacing():
    def parabola(x):
        return 3.0 + 0.7 * (x - 1.2) ** 2

    for x in ([0.0, 1.0, 2.0, 3.0], [-1.0, 0.9, 1.3, 4.0]):
        assert stats.parabola_minimum(x, [parabola(v) for v in x]) == pytest.approx(1.2)
    assert stats.parabola_minimum([0.0, 1.0, 2.0], [1.0, 2.0, 3.0]) is None  # an end is lowest
    assert stats.parabola_minimum([0.0, 1.0, 2.0], [3.0, 1.0, math.inf]) is None
    assert stats.parabola_minimum([0.0, 1.0, 2.0], [1.0, 1.0, 1.0]) is None
    assert stats.parabola_minimum([0.0, 1.0, 2.0], [2.0, 1.0, 1.0]) == pytest.approx(1.5)


def test_the_optimum_is_the_geometric_mean_over_seeds_with_its_interval():
    lrs = [1e-4, 1e-3, 1e-2, 1e-1]
    centres = [-2.8, -2.6, -2.5]
    losses = [[1 + (math.log10(lr) - c) ** 2 for lr in lrs] for c in centres]
    found = stats.lr_optimum(lrs, losses)
    low, high = scipy.stats.t.interval(0.95, 2, loc=np.mean(centres), scale=scipy.stats.sem(centres))
    assert [math.log10(v) for v in (found.mean, found.low, found.high)] == pytest.approx([np.mean(centres), low, high])
    assert stats.lr_optimum(lrs, losses[:1]).low is None
    assert stats.lr_optimum(lrs, [*losses, [1.0, 2.0, 3.0, 4.0]]) is None
    assert stats.lr_optimum(lrs, []) is None


def test_the_factor_per_doubling_is_the_slope_of_each_seed():
    """Two seeds' slopes by linregress, and its interval for one; sizes without an optimum take no part."""
    sizes = [32, 64, 128, 512]
    optima = [[1e-2, 6e-3, 2e-3, None], [8e-3, None, 4e-3, 1e-3]]
    fits = [
        scipy.stats.linregress(*np.log2([(s, o) for s, o in zip(sizes, own, strict=True) if o]).T) for own in optima
    ]
    slopes = [fit.slope for fit in fits]
    found = stats.factor_per_doubling(sizes, [*optima, [1e-2, None, None, None]])
    low, high = scipy.stats.t.interval(0.95, 1, loc=np.mean(slopes), scale=scipy.stats.sem(slopes))
    assert (found.mean, found.low, found.high) == pytest.approx((2 ** np.mean(slopes), 2**low, 2**high))
    assert found.n == 2
    one = stats.factor_per_doubling(sizes, optima[1:])
    half = scipy.stats.t.ppf(0.975, 1) * fits[1].stderr
    assert (one.mean, one.low, one.high) == pytest.approx(tuple(2 ** (slopes[1] + d) for d in (0, -half, half)))
    two = stats.factor_per_doubling([32, 128], [[1e-2, 4e-2]])
    assert (two.mean, two.low, two.high, two.n) == (pytest.approx(2.0), None, None, 1)
    assert stats.factor_per_doubling(sizes, [[1e-2, None, None, None]]) is None


def test_smoothing_keeps_lines_straight_and_ends_in_place():
    line = stats.smooth(np.arange(300.0), 0.02)
    assert line[:297] == pytest.approx(np.arange(297.0))
    noisy = stats.smooth(np.array([1.0, -1.0] * 150), 0.02)
    assert abs(noisy[10:-10]).max() < 0.2


def test_spikes_are_counted_against_the_median_of_201_steps():
    falling = np.linspace(3.0, 2.0, 600)
    assert stats.spikes(falling) == 0
    for at in (50, 300, 301, 450, 599):
        falling[at] += 0.2
    assert stats.spikes(falling) == 4  # the first 100 steps are none
    falling[400] += 0.09
    assert stats.spikes(falling) == 4
    # By hand on noise, with 100 steps mirrored at the end.
    noisy = np.random.default_rng(0).normal(0, 0.08, 500)
    longer = np.concatenate([noisy, noisy[:-101:-1]])
    by_hand = sum(longer[i] > np.median(longer[i - 100 : i + 101]) + 0.1 for i in range(100, 500))
    assert stats.spikes(noisy) == by_hand > 10


def test_spikes_need_more_than_half_a_window_and_count_steps_between_lines():
    assert stats.spikes(np.ones(100)) is None
    assert stats.spikes(np.ones(101)) == 0
    every_tenth = np.ones(40)
    every_tenth[[5, 20]] = 2.0
    assert stats.spikes(every_tenth, steps_a_line=10) == 1  # 201 steps are 21 lines, and the first 10 are none


def test_the_profile_counts_runs_that_reached_nothing_in_the_whole():
    losses, shares = stats.share_below([2.0, math.inf, 1.0, 3.0])
    assert (losses, shares) == ([1.0, 2.0, 3.0], [0.25, 0.5, 0.75])
    assert stats.share_below([math.inf]) == ([], [])
