"""The learning rates of a study: the best one, where the least loss lies, how it moves, how much it matters."""

from collections.abc import Sequence
from dataclasses import dataclass

from spannorm_jax.report import stats
from spannorm_jax.report.stats import Factor, Interval, Optimum
from spannorm_jax.report.study import Method, Place, Study


def best_lr(about: Study, method: Method, place: Place) -> float | None:
    """The learning rate with the least mean capped loss over the seeds that choose; None if none has any."""
    means = {}
    for lr in about.lrs(method, place):
        losses = about.by_seed((method, place, lr), about.capped, about.choosing)
        if losses:
            means[lr] = sum(losses.values()) / len(losses)
    return min(means, key=lambda lr: means[lr], default=None)


def at_an_end(about: Study, method: Method, place: Place, lr: float) -> bool:
    """Whether a learning rate is the least or greatest that a method was run at there: a better one may lie beyond."""
    lrs = about.lrs(method, place)
    return len(lrs) > 1 and lr in (lrs[0], lrs[-1])


def _complete(about: Study, method: Method, place: Place, lrs: Sequence[float]) -> dict[int, list[float]]:
    """seed -> its capped losses at `lrs`, of the seeds that have all of them."""
    each = [about.by_seed((method, place, lr), about.capped, about.seeds) for lr in lrs]
    seeds = set.intersection(*(set(losses) for losses in each)) if each else set()
    return {seed: [losses[seed] for losses in each] for seed in sorted(seeds)}


def _optima(about: Study, method: Method, place: Place) -> dict[int, Optimum]:
    """seed -> its learning rate of least loss, of the seeds that were run at all of three or more.

    A method that trains at no rate with every seed has none.
    """
    lrs = [lr for lr in about.lrs(method, place) if lr > 0]
    if len(lrs) < 3:
        return {}
    by_seed = _complete(about, method, place, lrs)
    trained = [all(about.cells[method, place, lr][s].outcome.kind == "trained" for s in by_seed) for lr in lrs]
    if not any(trained):
        return {}
    return {seed: stats.optimum_of_seed(lrs, losses, trained) for seed, losses in by_seed.items()}


def optimum(about: Study, method: Method, place: Place) -> Optimum | None:
    """The learning rate of least loss, with its interval over seeds or the rates between which it lies."""
    return stats.lr_optimum(list(_optima(about, method, place).values()))


def _enclosed(about: Study, method: Method, place: Place) -> dict[int, Optimum]:
    """`_optima`, or none if a seed's is at an end of the range: the others alone would say too little."""
    found = _optima(about, method, place)
    return {} if any(optimum.kind == "end" for optimum in found.values()) else found


@dataclass(frozen=True)
class Drift:
    """What a method's best learning rate is multiplied by where its depth or width doubles, the other one fixed."""

    method: Method
    axis: str  # "depth" | "width"
    fixed: int  # the other one
    sizes: list[int]  # at which no seed's best rate is an end of the range
    factor: Factor


def drifts(about: Study) -> list[Drift]:
    """Of each method with optima at two sizes or more."""
    found = []
    for axis, other in (("width", "depth"), ("depth", "width")):
        for fixed in sorted({getattr(place, other) for place in about.places}) if about.varies(axis) else []:
            places = [place for place in about.places if getattr(place, other) == fixed]
            for method in about.methods:
                optima = [_enclosed(about, method, place) for place in places]
                seeds = sorted(set().union(*optima))
                sizes = [getattr(place, axis) for place in places]
                factor = stats.factor_per_doubling(sizes, [[each.get(seed) for each in optima] for seed in seeds])
                if factor is not None:
                    used = [size for size, each in zip(sizes, optima, strict=True) if each]
                    found.append(Drift(method, axis, fixed, used, factor))
    return found


def sensitivities(about: Study) -> list[tuple[Method, Place, Interval]]:
    """LR sensitivity over the learning rates that all methods of a place share, if they are three or more."""
    found = []
    for place in about.places:
        here = [m for m in about.methods if about.lrs(m, place)]
        shared = sorted(set.intersection(*(set(about.lrs(m, place)) for m in here)))
        for method in here if len(shared) > 2 else []:
            values = [
                stats.lr_sensitivity(losses, start)
                for seed, losses in _complete(about, method, place, shared).items()
                if (start := _loss_at_init(about, method, place, shared, seed)) is not None
            ]
            interval = stats.t_interval(values)
            if interval is not None:
                found.append((method, place, interval))
    return found


def _loss_at_init(about: Study, method: Method, place: Place, lrs: Sequence[float], seed: int) -> float | None:
    """The first loss does not depend on the learning rate, so any of them has it."""
    starts = (about.cells[method, place, lr][seed].loss_at_init for lr in lrs)
    return next((start for start in starts if start is not None), None)
