"""The statistics against SciPy, closed forms and hand counts."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats

from spannorm_jax.report import stats


@pytest.mark.parametrize("n", [2, 3, 10])
def test_the_t_interval_is_scipys_and_one_value_has_none(n):
    values = np.random.default_rng(n).normal(size=n)
    found = stats.t_interval(values.tolist())
    low, high = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.mean, found.low, found.high) == pytest.approx((values.mean(), low, high)) and found.n == n
    assert stats.t_interval([2.5]) == stats.Interval(2.5, None, None, 1) and stats.t_interval([]) is None


def test_differences_are_paired_by_seed():
    assert stats.paired_differences({0: 1.0, 1: 2.0, 3: 9.0}, {3: 8.5, 1: 2.25, 2: 7.0}) == [-0.25, 0.5]


def additive(random, effects, seeds, deviation):
    """Losses of arms with these effects, and of seeds, without interaction: arm -> seed -> loss."""
    noise = deviation * random.normal(size=(len(effects), seeds))
    losses = np.asarray(effects)[:, None] + 3 * random.normal(size=seeds) + noise
    return [dict(enumerate(arm)) for arm in losses.tolist()]


def test_the_pooled_error_of_a_full_table_is_the_residual_of_two_way_analysis():
    losses = additive(np.random.default_rng(0), [1.0, 2.0, 1.5, 0.0, 0.2], 3, 0.1)
    table = np.array([list(arm.values()) for arm in losses])
    left = table - table.mean(axis=1, keepdims=True) - table.mean(axis=0) + table.mean()
    found = stats.pooled(losses)
    assert found.df == 8 and found.deviation == pytest.approx(math.sqrt((left**2).sum() / 8))
    # An arm of one seed, one under a second name, and a seed of one arm, tell nothing of the spread.
    assert stats.pooled([*losses, {0: 7.0}, dict(losses[0])]) == found
    more = stats.pooled([losses[0] | {9: 1.0}, *losses[1:]])
    assert (more.df, more.deviation) == (8, pytest.approx(found.deviation))
    assert stats.pooled([{0: 1.0, 1: 2.0}]) is None and stats.pooled([]) is None


def test_the_pooled_interval_holds_the_truth_as_often_as_it_says():
    """Of 2,000 studies with a seed missing in one arm: 95%, and 5% of false claims, within three standard errors."""
    random, held, claimed, n = np.random.default_rng(1), 0, 0, 2000
    for _ in range(n):
        losses = additive(random, [1.0, 1.2, 1.2, 0.9], 3, 0.05)
        del losses[0][2]
        found = stats.pooled(losses)
        interval, _ = stats.pooled_difference(np.mean(stats.paired_differences(losses[1], losses[0])), 2, found, found)
        held += interval.low <= 0.2 <= interval.high
        _, p = stats.pooled_difference(np.mean(stats.paired_differences(losses[2], losses[1])), 3, found, found)
        claimed += p < 0.05
    bound = 3 * math.sqrt(0.05 * 0.95 / n)
    assert held / n == pytest.approx(0.95, abs=bound) and claimed / n == pytest.approx(0.05, abs=bound)


def test_spreads_that_were_estimated_apart_have_welchs_degrees_of_freedom():
    """SciPy's, of two samples whose standard deviations are the spreads and whose sizes are theirs plus one."""
    ours, theirs = stats.Pooled(0.1, 2), stats.Pooled(0.3, 2)
    interval, p = stats.pooled_difference(0.5, 3, ours, theirs)
    found = scipy.stats.ttest_ind_from_stats(0.5, 0.1, 3, 0.0, 0.3, 3, equal_var=False)
    assert p == pytest.approx(found.pvalue)
    half = scipy.stats.t.ppf(0.975, (0.01 + 0.09) ** 2 / (0.01**2 / 2 + 0.09**2 / 2)) * math.sqrt(0.1 / 3)
    assert (interval.low, interval.high) == pytest.approx((0.5 - half, 0.5 + half))


def test_holms_p_values():
    """By hand: the smallest of four is multiplied by 4, the next by 3, and none falls below one before it."""
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.5, 0.9]) == [1.0, 1.0] and stats.holm([]) == []


def test_the_bootstrap_draws_settings_and_seeds():
    """Its variance is that of settings' means and, on top, of seeds within: (between + within / 3) / settings."""
    random = np.random.default_rng(0)
    settings = random.normal(size=(40, 1)) + 0.5 * random.normal(size=(40, 3))
    found = stats.bootstrap(settings.tolist())
    variance = (settings.mean(axis=1).var() + settings.var(axis=1).mean() / 3) / 40
    assert found.mean == pytest.approx(settings.mean()) and found.low < found.mean < found.high
    assert found.high - found.low == pytest.approx(2 * 1.96 * math.sqrt(variance), rel=0.05)
    assert found.n == 120 and found == stats.bootstrap(settings.tolist())
    assert stats.bootstrap([[1.0, 2.0, 3.0]] * 5 + [[]]) is None  # few settings are no sample


def test_the_parabola_finds_its_own_minimum_on_any_spacing():
    def parabola(x):
        return 3.0 + 0.7 * (x - 1.2) ** 2

    for x in ([0.0, 1.0, 2.0, 3.0], [-1.0, 0.9, 1.3, 4.0]):
        assert stats.parabola_minimum(x, [parabola(v) for v in x]) == pytest.approx(1.2)
    assert stats.parabola_minimum([0.0, 1.0, 2.0], [1.0, 2.0, 3.0]) is None  # an end is lowest
    assert stats.parabola_minimum([0.0, 1.0, 2.0], [3.0, 1.0, math.inf]) is None
    assert stats.parabola_minimum([0.0, 1.0, 2.0], [1.0, 1.0, 1.0]) is None
    assert stats.parabola_minimum([0.0, 1.0, 2.0], [2.0, 1.0, 1.0]) == pytest.approx(1.5)


LRS = [1e-4, 1e-3, 1e-2, 1e-1]


def optimum(centre, trained=(True,) * 4, of=None):
    losses = of or [1 + (math.log10(lr) - centre) ** 2 for lr in LRS]
    return stats.optimum_of_seed(LRS, losses, trained)


def test_the_optimum_is_the_geometric_mean_over_seeds_with_its_interval():
    centres = [-2.8, -2.6, -2.5]
    found = stats.lr_optimum([optimum(centre) for centre in centres])
    low, high = scipy.stats.t.interval(0.95, 2, loc=np.mean(centres), scale=scipy.stats.sem(centres))
    assert [math.log10(v) for v in (found.at, found.low, found.high)] == pytest.approx([np.mean(centres), low, high])
    assert (found.kind, found.n) == ("inside", 3)
    assert stats.lr_optimum([optimum(-2.8)]).low is None
    assert stats.lr_optimum([]) is None


@pytest.mark.parametrize("cliff", [1.01e-2, 1.5e-2, 2.99e-2])
def test_an_optimum_at_a_cliff_is_the_cell_whatever_lies_within(cliff):
    """Losses fall with the rate up to a cliff between 1e-2 and 3e-2: the parabola gives one number for all of them."""
    lrs = [1e-3, 3e-3, 1e-2, 3e-2]
    losses = [2.0 + 0.3 * math.log10(cliff / lr) if lr < cliff else 3.3 for lr in lrs]
    assert math.exp(stats.parabola_minimum(np.log(lrs), losses)) == pytest.approx(0.006, rel=0.05)
    found = stats.optimum_of_seed(lrs, losses, [lr < cliff for lr in lrs])
    assert found == stats.Optimum("cliff", None, 3e-3, 3e-2, 1) and found.low < cliff < found.high


def test_an_optimum_at_an_end_has_one_bound():
    falling, rising = optimum(0, of=[4.0, 3.0, 2.0, 1.0]), optimum(0, of=[1.0, 2.0, 3.0, 4.0])
    assert (falling, rising) == (stats.Optimum("end", None, 1e-2, None, 1), stats.Optimum("end", None, None, 1e-3, 1))
    mixed = stats.lr_optimum([optimum(-2.6), falling])
    assert (mixed.kind, mixed.low, mixed.high, mixed.n) == ("end", pytest.approx(10**-2.6), None, 2)
    cell = optimum(-2.1, trained=(True, True, True, False))
    mixed = stats.lr_optimum([optimum(-2.6), cell])
    assert (mixed.kind, mixed.low, mixed.high) == ("cliff", 1e-3, 1e-1)


def at(rate):
    return None if rate is None else stats.Optimum("inside", rate, None, None, 1)


def test_the_factor_per_doubling_is_the_slope_of_each_seed():
    """Two seeds' slopes by linregress; sizes without an optimum, and those at an end, take no part."""
    sizes = [32, 64, 128, 512]
    optima = [[1e-2, 6e-3, 2e-3, None], [8e-3, None, 4e-3, 1e-3]]
    slopes = [
        scipy.stats.linregress(*np.log2([(s, o) for s, o in zip(sizes, own, strict=True) if o]).T).slope
        for own in optima
    ]
    end = stats.Optimum("end", None, 1e-2, None, 1)
    by_seed = [*([at(rate) for rate in own] for own in optima), [at(1e-2), end, None, None]]
    found = stats.factor_per_doubling(sizes, by_seed)
    low, high = scipy.stats.t.interval(0.95, 1, loc=np.mean(slopes), scale=scipy.stats.sem(slopes))
    assert (found.at, found.low, found.high) == pytest.approx((2 ** np.mean(slopes), 2**low, 2**high))
    assert found.n == 2
    one = stats.factor_per_doubling([32, 128], [[at(1e-2), at(4e-2)]])
    assert (one.at, one.low, one.high, one.n) == (pytest.approx(2.0), None, None, 1)
    assert stats.factor_per_doubling(sizes, [[at(1e-2), None, None, None]]) is None


def test_the_factor_of_optima_at_cliffs_is_all_that_their_cells_allow():
    """By trying every corner of the cells."""
    sizes, cells = [32, 64, 128], [(3e-3, 3e-2), (3e-3, 3e-3), (1e-3, 1e-2)]
    optima = [stats.Optimum("cliff", None, low, high, 1) if low < high else at(low) for low, high in cells]
    found = stats.factor_per_doubling(sizes, [optima])
    corners = [scipy.stats.linregress(np.log2(sizes), np.log2(rates)).slope for rates in itertools.product(*cells)]
    assert (found.low, found.high) == pytest.approx((2 ** min(corners), 2 ** max(corners)))
    assert (found.kind, found.at) == ("cliff", None)


def test_smoothing_keeps_lines_straight_and_ends_in_place():
    assert stats.smooth(np.arange(300.0), 0.02)[:297] == pytest.approx(np.arange(297.0))
    noisy = stats.smooth(np.array([1.0, -1.0] * 150), 0.02)
    assert abs(noisy[10:-10]).max() < 0.2


def test_spikes_stand_out_of_the_median_of_201_steps_and_of_the_noise():
    falling = np.linspace(3.0, 2.0, 600)
    assert stats.spikes(falling) == 0
    for at in (50, 300, 301, 450, 599):
        falling[at] += 0.2
    assert stats.spikes(falling) == 4  # the first 100 steps are none
    falling[400] += 0.09
    assert stats.spikes(falling) == 4
    # By hand on noise, with 100 steps mirrored at the end.
    noisy = np.random.default_rng(0).normal(0, 0.08, 500)
    noisy[[200, 333, 450]] += (0.39, 0.5, 1.0)
    longer = np.concatenate([noisy, noisy[:-101:-1]])
    above = np.array([longer[i] - np.median(longer[i - 100 : i + 101]) for i in range(100, 500)])
    deviation = 1.4826 * np.median(np.abs(above - np.median(above)))
    assert deviation == pytest.approx(0.08, rel=0.15)
    assert stats.spikes(noisy) == sum(above > 5 * deviation) == 2


def test_spikes_need_more_than_half_a_window_and_count_steps_between_lines():
    assert stats.spikes(np.random.default_rng(3).normal(2.0, 0.25, 5000)) == 0  # of noise, often above 0.1 nats
    assert stats.spikes(np.ones(100)) is None
    assert stats.spikes(np.ones(101)) == 0
    every_tenth = np.ones(40)
    every_tenth[[5, 20]] = 2.0
    assert stats.spikes(every_tenth, steps_a_line=10) == 1  # 201 steps are 21 lines, and the first 10 are none
