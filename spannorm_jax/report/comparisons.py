"""Methods against their baselines: paired differences, the error of a study, and what is the same under two names."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from spannorm_jax.report import stats
from spannorm_jax.report.rates import best_lr
from spannorm_jax.report.stats import Interval, Pooled
from spannorm_jax.report.study import Method, Place, Study


@dataclass(frozen=True)
class Difference:
    """A method less its baseline at a place, in the loss that is compared, over seeds that both finished.

    Attributes:
      interval: that of the arm's own differences; None without a seed that both finished.
      pooled: that with the spread pooled over arms (`family`); None where an arm did not train with
        every seed, whose losses spread otherwise.
      p: Holm's p-value of it, among the comparisons of one kind that were named before the runs, or
        among the others of that kind.
      pairs: seeds that either has.
    """

    method: Method
    partner: Method
    place: Place
    lr: float
    partner_lr: float
    interval: Interval | None
    pairs: int
    pooled: Interval | None = None
    p: float | None = None


Arm = tuple[Method, Place, float]  # and its learning rate
Family = tuple[Place, str]


def _difference(about: Study, ours: Arm, theirs: Arm) -> Difference:
    each = [about.by_seed(arm, about.loss, about.reported) for arm in (ours, theirs)]
    interval = stats.t_interval(stats.paired_differences(*each))
    pairs = len(about.reported & (about.cells.get(ours, {}).keys() | about.cells.get(theirs, {}).keys()))
    return Difference(ours[0], theirs[0], ours[1], ours[2], theirs[2], interval, pairs)


@dataclass(frozen=True)
class Compared:
    """The differences of one kind, and what they were judged with."""

    found: list[Difference]
    spreads: dict[Family, Pooled]


def at_own_rates(about: Study) -> Compared:
    """Each method and its baseline at its own best learning rate, for each method and place."""
    return _compared(about, shared=False)


def at_shared_rates(about: Study) -> Compared:
    """Both at the baseline's best learning rate, where the method was run at it."""
    return _compared(about, shared=True)


def _compared(about: Study, shared: bool) -> Compared:
    found = []
    for place in about.places:
        for method in about.methods:
            partner = about.partner(method)
            best, theirs = best_lr(about, method, place), best_lr(about, partner, place)
            if method == partner or best is None or theirs is None:
                continue
            ours = (method, place, theirs if shared else best)
            if ours in about.cells:
                found.append(_difference(about, ours, (partner, place, theirs)))
    found_spreads = spreads(about, (arm for d in found for arm in _arms(d)))
    return Compared(_judged(about, found, found_spreads), found_spreads)


def _arms(d: Difference) -> tuple[Arm, Arm]:
    return (d.method, d.place, d.lr), (d.partner, d.place, d.partner_lr)


def family(place: Place, init: str) -> Family:
    """What the spread of a loss is pooled over: arms of one depth, width and initialisation, in whatever reading.

    An initialisation with which some arms hardly train spreads losses more than one with which all do.
    """
    return place, init.partition("-")[0]


def spreads(about: Study, arms: Iterable[Arm]) -> dict[Family, Pooled]:
    """The spread of a loss in each family, of its arms that trained with every seed that is reported."""
    members: dict[Family, list[Arm]] = {}
    for arm in sorted(set(arms)):
        if trains(about, arm):
            members.setdefault(family(arm[1], arm[0].init), []).append(arm)
    found = {
        key: stats.pooled([about.by_seed(arm, about.loss, about.reported) for arm in own])
        for key, own in members.items()
    }
    return {key: spread for key, spread in found.items() if spread is not None}


def trains(about: Study, arm: Arm) -> bool:
    rows = [row for seed, row in about.cells.get(arm, {}).items() if seed in about.reported]
    return bool(rows) and all(row.outcome.kind == "trained" for row in rows)


def _judged(about: Study, found: Sequence[Difference], known: dict[Family, Pooled]) -> list[Difference]:
    """The same with the pooled spreads' intervals and p-values."""
    made, families = list(found), dict[bool, list[tuple[int, float]]]()
    for i, d in enumerate(found):
        ours, theirs = (known.get(family(arm[1], arm[0].init)) if trains(about, arm) else None for arm in _arms(d))
        if d.interval is None or ours is None or theirs is None:
            continue
        interval, p = stats.pooled_difference(d.interval.mean, d.interval.n, ours, theirs)
        made[i] = replace(d, pooled=interval)
        families.setdefault(about.confirms(d.method), []).append((i, p))
    for tested in families.values():
        for (i, _), p in zip(tested, stats.holm([p for _, p in tested]), strict=True):
            made[i] = replace(made[i], p=p)
    return made


def replicates(about: Study) -> list[tuple[Method, Method, int]]:
    """Methods of which runs have equal losses at every step, and how many: one method under two names."""
    found: dict[tuple[Method, Method], int] = {}
    for place in about.places:
        for lr in sorted({lr for _, at, lr in about.cells if at == place}):
            for seed in sorted(about.seeds):
                curves: dict[bytes, Method] = {}
                for method in about.methods:
                    row = about.cells.get((method, place, lr), {}).get(seed)
                    if row is not None and len(row.run.metrics.loss) > 1:
                        first = curves.setdefault(row.run.metrics.loss.tobytes(), method)
                        if first != method:
                            found[first, method] = found.get((first, method), 0) + 1
    return [(one, other, count) for (one, other), count in found.items()]


def replicate_notices(about: Study) -> list[tuple[str, str]]:
    """A warning for each pair of `replicates`."""
    return [
        ("warning", f"Equal losses at every step under two names, in {count} run{'s'[: count != 1]}: {one.label} and "
         f"{other.label}. They are one method: it has two lines, and enters the pooled error once.")
        for one, other, count in replicates(about)
    ]  # fmt: skip


@dataclass(frozen=True)
class Overall:
    """A method less its baseline over all depths, widths and learning rates that both were run at, capped losses."""

    method: Method
    partner: Method
    interval: Interval
    settings: int
    lower: int  # settings in which the method's mean is the lower


def overall(about: Study) -> list[Overall]:
    """For methods with enough settings in common with their baseline."""
    found = []
    for method in about.methods:
        partner = about.partner(method)
        if method == partner:
            continue
        each = []
        for m, place, lr in sorted(about.cells, key=lambda cell: cell[1:]):
            if m == method:
                ours = about.by_seed((method, place, lr), about.capped, about.seeds)
                theirs = about.by_seed((partner, place, lr), about.capped, about.seeds)
                each.append([d for d in stats.paired_differences(ours, theirs) if math.isfinite(d)])
        each = [d for d in each if d]
        interval = stats.bootstrap(each)
        if interval is not None:
            lower = sum(sum(d) < 0 for d in each)
            found.append(Overall(method, partner, interval, len(each), lower))
    return found
