"""The statistics that a report's page states: intervals, paired differences, learning rates, spikes."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import median_filter
from scipy.stats import linregress, median_abs_deviation, sem, t

CONFIDENCE = 0.95
SPIKE_WINDOW = 201  # steps, centred
SPIKE_HEIGHT = 0.1  # nats/token above the median, at least
SPIKE_NOISE = 5  # of the noise's standard deviations above it, at least
GRAD_NORM_QUANTILE = 0.999
BOOTSTRAP_SETTINGS = 6  # fewer settings are no sample to draw from
_DRAWS = 10_000


@dataclass(frozen=True)
class Interval:
    """A mean with its 95% interval; one value has no bounds."""

    mean: float
    low: float | None
    high: float | None
    n: int


def t_interval(values: Sequence[float]) -> Interval | None:
    """Student's t interval of the mean; None without values."""
    n = len(values)
    if n < 2:
        return Interval(values[0], None, None, 1) if n else None
    return _around(math.fsum(values) / n, float(sem(values)), n - 1, n)


def _around(mean: float, error: float, df: float, n: int) -> Interval:
    half = float(t.ppf((1 + CONFIDENCE) / 2, df)) * error
    return Interval(mean, mean - half, mean + half, n)


def paired_differences(ours: Mapping[int, float], theirs: Mapping[int, float]) -> list[float]:
    """ours - theirs of each seed that both have, by seed."""
    return [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]


@dataclass(frozen=True)
class Pooled:
    """The spread of one loss about its arm and its seed, estimated from all arms together."""

    deviation: float  # standard deviation
    df: int  # degrees of freedom


def pooled_difference(mean: float, n: int, ours: Pooled, theirs: Pooled) -> tuple[Interval, float]:
    """Interval of the mean of n paired differences, and p; with Welch's degrees of freedom."""
    variance, df = ours.deviation**2 + theirs.deviation**2, float(ours.df)
    if theirs != ours and variance:
        df = variance**2 / (ours.deviation**4 / ours.df + theirs.deviation**4 / theirs.df)
    error = math.sqrt(variance / n)
    p = 2 * float(t.sf(abs(mean) / error, df)) if error else float(mean == 0)
    return _around(mean, error, df, n), p


def pooled(losses: Sequence[Mapping[int, float]]) -> Pooled | None:
    """The residual of loss = arm + seed by least squares, over arms of seed -> loss; None if nothing is free.

    Three seeds tell an arm's own spread badly. Arms of one study share data and order, and so their
    spread. Arms with equal losses are one, run under several names.
    """
    arms = list({tuple(sorted(arm.items())): arm for arm in losses if len(arm) > 1}.values())
    if not arms:
        return None
    seeds = sorted(set().union(*arms))
    runs = [(i, len(arms) + seeds.index(seed), arm[seed]) for i, arm in enumerate(arms) for seed in sorted(arm)]
    *columns, y = np.array(runs, np.float64).T
    design = sum(np.eye(len(arms) + len(seeds))[column.astype(int)] for column in columns)
    fitted, _, rank, _ = np.linalg.lstsq(design, y, rcond=None)
    df, residual = len(y) - int(rank), y - design @ fitted
    return Pooled(math.sqrt(float(residual @ residual) / df), df) if df else None


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's (1979) adjusted p-values, which bound the chance of one false claim among all of them."""
    order, n = np.argsort(p_values, kind="stable"), len(p_values)
    adjusted = np.ones(n)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(np.sort(p_values) * (n - np.arange(n))))
    return adjusted.tolist()


def bootstrap(differences: Sequence[Sequence[float]]) -> Interval | None:
    """Interval of the mean over settings by drawing settings and, in each, its seeds; None for few settings.

    `differences` holds one sequence a setting, one number a seed. Seeds of a setting share its effect,
    so settings are what is drawn first.
    """
    settings = [np.asarray(d, np.float64) for d in differences if len(d)]
    if len(settings) < BOOTSTRAP_SETTINGS:
        return None
    random = np.random.default_rng(0)
    # Of each setting as many means of redrawn seeds as there are draws; a draw of settings then picks among them.
    means = np.stack([d[random.integers(len(d), size=(_DRAWS, len(d)))].mean(axis=1) for d in settings])
    drawn = random.integers(len(settings), size=(_DRAWS, len(settings)))
    totals = means[drawn, np.arange(_DRAWS)[:, None]].mean(axis=1)
    low, high = np.quantile(totals, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(np.mean([d.mean() for d in settings])), float(low), float(high), sum(map(len, settings)))


def parabola_minimum(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Minimum of the parabola through the lowest point and its neighbours; None if it is an end."""
    i = int(np.argmin(y))
    if not 0 < i < len(x) - 1 or not np.isfinite(y[i - 1 : i + 2]).all():
        return None
    left, right = x[i] - x[i - 1], x[i + 1] - x[i]
    rise_left, rise_right = y[i - 1] - y[i], y[i + 1] - y[i]
    bend = rise_left * right + rise_right * left
    return x[i] + (rise_left * right**2 - rise_right * left**2) / (2 * bend) if bend else x[i]


@dataclass(frozen=True)
class Optimum:
    """The learning rate of least loss, or what a size that doubles multiplies it by: an estimate, or bounds."""

    kind: str  # inside: both neighbours of the best rate trained | cliff: one did not | end: it is an end of the range
    at: float | None  # the estimate, `inside` alone: a parabola through a cliff says where the grid is
    low: float | None  # `inside`, of its 95% interval (None of one seed); else the neighbour of the best rate, if any
    high: float | None
    n: int  # seeds

    @property
    def between(self) -> tuple[float | None, float | None]:
        """The rates between which it lies, which are one where it is estimated."""
        return (self.low, self.high) if self.at is None else (self.at, self.at)


def optimum_of_seed(lrs: Sequence[float], losses: Sequence[float], trained: Sequence[bool]) -> Optimum:
    """One seed's. `losses` are capped; `trained`: whether all seeds trained at each of `lrs`."""
    i = int(np.argmin(losses))
    below, above = lrs[i - 1] if i else None, lrs[i + 1] if i + 1 < len(lrs) else None
    if below is None or above is None:
        return Optimum("end", None, below, above, 1)
    at = parabola_minimum([math.log(lr) for lr in lrs], losses) if all(trained[i - 1 : i + 2]) else None
    if at is None:
        return Optimum("cliff", None, below, above, 1)
    return Optimum("inside", math.exp(at), None, None, 1)


def _estimated(logs: Sequence[float], power: Callable[[float], float]) -> Optimum:
    found = t_interval(logs)
    assert found is not None
    at, low, high = (None if log is None else power(log) for log in (found.mean, found.low, found.high))
    return Optimum("inside", at, low, high, found.n)


def lr_optimum(each: Sequence[Optimum]) -> Optimum | None:
    """That of all seeds: the geometric mean of theirs with its t interval, or all rates between which one lies."""
    logs = [math.log(found.at) for found in each if found.at is not None]
    if each and len(logs) == len(each):
        return _estimated(logs, math.exp)
    if not each:
        return None
    kind = "end" if any(found.kind == "end" for found in each) else "cliff"
    lows, highs = zip(*(found.between for found in each), strict=True)
    return Optimum(kind, None, None if None in lows else min(lows), None if None in highs else max(highs), len(each))


def factor_per_doubling(sizes: Sequence[float], optima_by_seed: Sequence[Sequence[Optimum | None]]) -> Optimum | None:
    """2^s, with s the slope of log(optimum) over log(size) by least squares; None without two sizes that have one.

    `optima_by_seed` has a sequence a seed, one optimum a size; None, or one at an end of the range,
    takes no part. The interval is Student's over the seeds' slopes. Of optima at a cliff the least and
    greatest factor that they allow are all that is known.
    """
    slopes: list[tuple[float, float]] = []
    for optima in optima_by_seed:
        pairs = zip(sizes, optima, strict=True)
        known = [(math.log2(size), found) for size, found in pairs if found is not None and found.kind != "end"]
        if len(known) > 1:
            x = np.array([size for size, _ in known])
            low, high = np.log2(np.array([found.between for _, found in known], np.float64)).T
            right = x > x.mean()  # a slope is a sum of y times (x - its mean)
            least, most = np.where(right, low, high), np.where(right, high, low)
            slopes.append((linregress(x, least).slope, linregress(x, most).slope))
    if any(low < high for low, high in slopes):
        lows, highs = zip(*slopes, strict=True)
        return Optimum("cliff", None, 2.0 ** min(lows), 2.0 ** max(highs), len(slopes))
    return _estimated([slope for slope, _ in slopes], (2.0).__pow__) if slopes else None


def smooth(values: np.ndarray, fraction: float) -> np.ndarray:
    """Centred running mean over `fraction` of the points.

    The window stays centred near the start, where the loss falls fast; near the end it loses its right part.
    """
    n = len(values)
    index, half = np.arange(n), round(fraction * n / 2)
    first = index - np.minimum(half, index)
    after = np.minimum(2 * index - first, n - 1) + 1
    sums = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    return (sums[after] - sums[first]) / (after - first)


def spikes(loss: np.ndarray, steps_a_line: int = 1) -> int | None:
    """Logged steps whose loss is far above the running median of 201 steps around them.

    Far is more than 0.1 nats and more than 5 standard deviations of the run's own noise. The first 100
    steps, where the loss falls fast, are no spikes, and a run of no more steps has None.
    """
    half = SPIKE_WINDOW // 2 // steps_a_line
    if half < 1 or len(loss) <= half:
        return None
    above = (loss - median_filter(loss, size=2 * half + 1, mode="reflect"))[half:]
    noise = float(median_abs_deviation(above, scale="normal"))
    return int((above > max(SPIKE_HEIGHT, SPIKE_NOISE * noise)).sum())
