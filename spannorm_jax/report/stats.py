"""The statistics of a report: intervals, paired differences, learning rates, spikes. Functions of arrays alone.

They are those that are stated on the page; tests/report/test_stats.py compares each with SciPy or a closed form.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import median_filter
from scipy.special import stdtrit

CONFIDENCE = 0.95
SPIKE_WINDOW = 201  # steps, centred
SPIKE_HEIGHT = 0.1  # nats/token above the median
GRAD_NORM_QUANTILE = 0.999
BOOTSTRAP_SETTINGS = 6  # fewer settings are no sample to draw from
_DRAWS = 10_000


@dataclass(frozen=True)
class Interval:
    """A mean with its 95% interval; no bounds where one value says nothing about the spread."""

    mean: float
    low: float | None
    high: float | None
    n: int


def t_interval(values: Sequence[float]) -> Interval | None:
    """Student's t interval of the mean; None without values."""
    n = len(values)
    if n == 0:
        return None
    mean = math.fsum(values) / n
    if n == 1:
        return Interval(mean, None, None, 1)
    half = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def paired_differences(ours: Mapping[int, float], theirs: Mapping[int, float]) -> list[float]:
    """ours - theirs of each seed that both have, by seed."""
    return [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]


def bootstrap(differences: Sequence[Sequence[float]]) -> Interval | None:
    """Interval of the mean over settings by drawing settings and, in each, its seeds; None for few settings.

    `differences` holds one sequence a setting, one number a seed. Settings weigh the same. Seeds of
    a setting share its effect, so settings are what is drawn first. Draws are the same every time.
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


# ---- learning rates ---------------------------------------------------------------------------


def lr_sensitivity(losses: Sequence[float], loss_at_init: float) -> float:
    """Mean over learning rates of min(loss, loss at initialisation), less the least loss (Wortsman et al. 2023).

    A run that diverged has the loss infinity.
    """
    capped = np.minimum(losses, loss_at_init)
    return float(capped.mean() - capped.min())


def parabola_minimum(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Where the parabola through the lowest point and its neighbours is lowest; None if an end is lowest.

    `x` ascends. It lies between the midpoints to both neighbours, so it is never extrapolated.
    """
    i = int(np.argmin(y))
    if not 0 < i < len(x) - 1 or not np.isfinite(y[i - 1 : i + 2]).all():
        return None
    left, right = x[i] - x[i - 1], x[i + 1] - x[i]
    rise_left, rise_right = y[i - 1] - y[i], y[i + 1] - y[i]
    bend = rise_left * right + rise_right * left
    return x[i] + (rise_left * right**2 - rise_right * left**2) / (2 * bend) if bend else x[i]


def log_minima(lrs: Sequence[float], losses_by_seed: Iterable[Sequence[float]]) -> list[float | None]:
    """Of each seed the log of its learning rate of least loss; None where an end of the range is best."""
    logs = [math.log(lr) for lr in lrs]
    return [parabola_minimum(logs, losses) for losses in losses_by_seed]


def lr_optimum(lrs: Sequence[float], losses_by_seed: Sequence[Sequence[float]]) -> Interval | None:
    """The learning rate of least loss: the mean over seeds of each seed's parabola in log(lr), and its t interval.

    None if a seed has its least loss at an end of the range, or no seed has all of them.
    """
    minima = log_minima(lrs, losses_by_seed)
    if None in minima:
        return None
    of_logs = t_interval([m for m in minima if m is not None])
    if of_logs is None:
        return None
    low, high = (None if bound is None else math.exp(bound) for bound in (of_logs.low, of_logs.high))
    return Interval(math.exp(of_logs.mean), low, high, of_logs.n)


def factor_per_doubling(sizes: Sequence[float], optima_by_seed: Sequence[Sequence[float | None]]) -> Interval | None:
    """What the optimum is multiplied by where the size doubles: 2^s.

    s is the slope of log(optimum) over log(size), by least squares. `optima_by_seed` has a sequence
    a seed, one number a size, None where a seed has no optimum. Each seed with optima at two sizes
    or more has a slope, and the interval is Student's over seeds. With one seed it is that of the
    regression, with as many degrees of freedom as the seed has sizes beyond two.
    """
    slopes, of_one = [], None
    for optima in optima_by_seed:
        points = [(math.log2(size), math.log2(at)) for size, at in zip(sizes, optima, strict=True) if at is not None]
        if len(points) > 1:
            of_one = _slope(*map(np.array, zip(*points, strict=True)))
            slopes.append(of_one.mean)
    found = of_one if len(slopes) == 1 else t_interval(slopes)
    if found is None:
        return None
    low, high = (None if bound is None else 2.0**bound for bound in (found.low, found.high))
    return Interval(2.0**found.mean, low, high, len(slopes))


def _slope(x: np.ndarray, y: np.ndarray) -> Interval:
    """Of y over x by least squares, with its t interval; no bounds for two points."""
    around, free = x - x.mean(), len(x) - 2
    slope = float(around @ y / (around @ around))
    if not free:
        return Interval(slope, None, None, 2)
    left = y - y.mean() - slope * around
    half = float(stdtrit(free, (1 + CONFIDENCE) / 2)) * math.sqrt(left @ left / free / (around @ around))
    return Interval(slope, slope - half, slope + half, len(x))


# ---- one run's curve --------------------------------------------------------------------------


def smooth(values: np.ndarray, fraction: float) -> np.ndarray:
    """Centred running mean over `fraction` of the points.

    Near the start the window shrinks but stays centred, for the loss falls fast there; near the end
    it loses its right part only.
    """
    n = len(values)
    index, half = np.arange(n), round(fraction * n / 2)
    first = index - np.minimum(half, index)
    after = np.minimum(2 * index - first, n - 1) + 1
    sums = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    return (sums[after] - sums[first]) / (after - first)


def spikes(loss: np.ndarray, steps_a_line: int = 1) -> int | None:
    """Logged steps whose loss is more than 0.1 above the running median of 201 steps around them.

    The first 100 steps, where the loss falls fast and the window is not whole, are no spikes; at the
    end the window is filled by reflection. None for a run of no more steps.
    """
    half = SPIKE_WINDOW // 2 // steps_a_line
    if half < 1 or len(loss) <= half:
        return None
    median = median_filter(loss, size=2 * half + 1, mode="reflect")
    return int((loss - median > SPIKE_HEIGHT)[half:].sum())


def share_below(values: Sequence[float]) -> tuple[list[float], list[float]]:
    """(losses, share of all runs at or below each): infinity, a run that reached nothing, counts in the whole."""
    reached = sorted(v for v in values if math.isfinite(v))
    return reached, [(i + 1) / len(values) for i in range(len(reached))]
