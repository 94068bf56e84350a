"""Rows -> what they say of each other: each method's learning rates, differences from a baseline, stability.

A method is what sets runs apart beside depth, width, learning rate and seed: placement, initialisation and any other
config key that differs. A cell is a method at a depth, a width and a learning rate. All differences are taken seed by
seed, for the runs of a seed have the same data in the same order and the same random key.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from spannorm_jax.errors import UserError, did_you_mean, one_line
from spannorm_jax.report import stats
from spannorm_jax.report.rows import AXES, Group, Row, in_words, over_seeds
from spannorm_jax.report.stats import Interval

FINISHED = ("trained", "stalled")


class Method(NamedTuple):
    placement: str
    init: str
    others: tuple[tuple[str, str], ...]  # other config keys that differ, but for the axes

    @property
    def other(self) -> str:
        """The other keys in short: `init_targets=ffn_out`."""
        return ", ".join(in_words(key, value, short=True) for key, value in self.others)

    @property
    def label(self) -> str:
        return ", ".join([f"{self.placement} / {self.init}", *([self.other] if self.others else [])])


class Place(NamedTuple):
    depth: int
    width: int


@dataclass(frozen=True)
class Study:
    rows: list[Row]
    groups: list[Group]  # rows over seeds, in the order of tables
    methods: list[Method]
    measure: str  # "held-out" | "training": whose loss is compared
    baseline: dict[str, str]  # what a method's keys are replaced by to find the method that it is compared with
    cells: dict[tuple[Method, Place, float], dict[int, Row]]  # seed -> row

    def loss(self, row: Row) -> float | None:
        """The loss that is compared, of a run that finished."""
        if row.outcome.kind not in FINISHED:
            return None
        return row.held_out_loss if self.measure == "held-out" else row.train_loss

    def capped(self, row: Row) -> float | None:
        """The loss, or that at initialisation if that is less; a run that diverged has the latter. Unfinished: None.

        Infinity stands where a run diverged and its first loss is not recorded.
        """
        start = math.inf if row.loss_at_init is None else row.loss_at_init
        if row.outcome.kind == "diverged":
            return start
        loss = self.loss(row)
        return None if loss is None else min(loss, start)

    def partner(self, method: Method) -> Method:
        others = tuple((key, self.baseline.get(key, value)) for key, value in method.others)
        return Method(self.baseline.get("placement", method.placement), self.baseline.get("init", method.init), others)

    @property
    def baseline_text(self) -> str:
        return ",".join(f"{key}={value}" for key, value in self.baseline.items())

    @cached_property
    def places(self) -> list[Place]:
        return sorted({place for _, place, _ in self.cells})

    @cached_property
    def _lrs(self) -> dict[tuple[Method, Place], list[float]]:
        found: dict[tuple[Method, Place], list[float]] = {}
        for method, place, lr in sorted(self.cells):
            found.setdefault((method, place), []).append(lr)
        return found

    def lrs(self, method: Method, place: Place) -> list[float]:
        return self._lrs.get((method, place), [])

    @cached_property
    def _varying(self) -> set[str]:
        return {axis for axis in ("depth", "width", "lr") if len({getattr(row, axis) for row in self.rows}) > 1}

    def varies(self, axis: str) -> bool:
        """Whether `depth`, `width` or `lr` takes more than one value."""
        return axis in self._varying

    def place_text(self, place: Place) -> str:
        """The place's numbers, as far as places differ: `24`, `128` or `24 × 128`."""
        return " × ".join(str(getattr(place, axis)) for axis in ("depth", "width") if self.varies(axis))


def method_of(group: Group) -> Method:
    others = ((key, value) for key, value in group.variant if key not in AXES)
    plain = tuple((key, value.strip("[]").replace('"', "").replace(", ", ",")) for key, value in others)
    return Method(group.placement, group.init, plain)


def study(rows: Sequence[Row], baseline: Mapping[str, str] | None = None) -> Study:
    """Raises UserError if `baseline` names what no run has."""
    groups = over_seeds(rows)
    methods = list(dict.fromkeys(map(method_of, groups)))
    cells: dict[tuple[Method, Place, float], dict[int, Row]] = {}
    for group in groups:
        for row in group.rows:
            cell = (method_of(group), Place(row.depth, row.width), row.lr)
            cells.setdefault(cell, {}).setdefault(row.seed, row)
    finished = [row for row in rows if row.outcome.kind in FINISHED]
    held_out = bool(finished) and all(row.held_out_loss is not None for row in finished)
    return Study(
        rows=list(rows),
        groups=groups,
        methods=methods,
        measure="held-out" if held_out else "training",
        baseline=_baseline(methods, baseline),
        cells=cells,
    )


def _baseline(methods: Sequence[Method], asked: Mapping[str, str] | None) -> dict[str, str]:
    if not asked:
        first = next((m for m in methods if (m.placement, m.init) == ("pre", "plain")), methods[0])
        return {"placement": first.placement, "init": first.init}
    values: dict[str, set[str]] = {"placement": {m.placement for m in methods}, "init": {m.init for m in methods}}
    for method in methods:
        for key, value in method.others:
            values.setdefault(key, set()).add(value)
    for key, value in asked.items():
        if key not in values:
            raise UserError(f"--baseline names {one_line(key)}, which tells no runs apart; {did_you_mean(key, values)}")
        if value not in values[key]:
            raise UserError(
                f"--baseline {one_line(f'{key}={value}')}: no run has it; {did_you_mean(value, values[key])}"
            )
    return dict(asked)


# ---- learning rates ---------------------------------------------------------------------------


def _by_seed(
    about: Study, cell: tuple[Method, Place, float], number: Callable[[Row], float | None]
) -> dict[int, float]:
    """seed -> number, of the runs that have it."""
    found = {seed: number(row) for seed, row in about.cells.get(cell, {}).items()}
    return {seed: value for seed, value in found.items() if value is not None}


def best_lr(about: Study, method: Method, place: Place) -> float | None:
    """The learning rate with the least mean capped loss over seeds; None if none has any."""
    means = {}
    for lr in about.lrs(method, place):
        losses = _by_seed(about, (method, place, lr), about.capped)
        if losses:
            means[lr] = sum(losses.values()) / len(losses)
    return min(means, key=lambda lr: means[lr], default=None)


def _complete(about: Study, method: Method, place: Place, lrs: Sequence[float]) -> dict[int, list[float]]:
    """seed -> its capped losses at `lrs`, of the seeds that have all of them."""
    each = [_by_seed(about, (method, place, lr), about.capped) for lr in lrs]
    seeds = set.intersection(*(set(losses) for losses in each)) if each else set()
    return {seed: [losses[seed] for losses in each] for seed in sorted(seeds)}


def optimum(about: Study, method: Method, place: Place) -> Interval | None:
    """The learning rate of least loss, between those that were run, with its interval over seeds."""
    lrs = [lr for lr in about.lrs(method, place) if lr > 0]
    return stats.lr_optimum(lrs, list(_complete(about, method, place, lrs).values())) if len(lrs) > 2 else None


@dataclass(frozen=True)
class Drift:
    """What a method's best learning rate is multiplied by where its depth or width doubles, the other one fixed."""

    method: Method
    axis: str  # "depth" | "width"
    fixed: int  # the other one
    sizes: list[int]  # at which some seed has an optimum
    factor: Interval


def drifts(about: Study) -> list[Drift]:
    """Of each method with optima at two sizes or more."""
    found = []
    for axis, other in (("width", "depth"), ("depth", "width")):
        for fixed in sorted({getattr(place, other) for place in about.places}) if about.varies(axis) else []:
            places = [place for place in about.places if getattr(place, other) == fixed]
            for method in about.methods:
                optima = [_optima(about, method, place) for place in places]
                seeds = sorted(set().union(*optima))
                sizes = [getattr(place, axis) for place in places]
                factor = stats.factor_per_doubling(sizes, [[each.get(seed) for each in optima] for seed in seeds])
                if factor is not None:
                    used = [size for size, each in zip(sizes, optima, strict=True) if each]
                    found.append(Drift(method, axis, fixed, used, factor))
    return found


def _optima(about: Study, method: Method, place: Place) -> dict[int, float]:
    """seed -> its learning rate of least loss, of seeds that have it between two others."""
    lrs = [lr for lr in about.lrs(method, place) if lr > 0]
    by_seed = _complete(about, method, place, lrs)
    minima = zip(by_seed, stats.log_minima(lrs, by_seed.values()), strict=True)
    return {seed: math.exp(log) for seed, log in minima if log is not None}


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


# ---- against the baseline ---------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """A method less its baseline at a place, in the loss that is compared, over seeds that both finished."""

    method: Method
    partner: Method
    place: Place
    lr: float
    partner_lr: float
    interval: Interval | None
    pairs: int  # seeds that either has


def _difference(about: Study, method: Method, place: Place, lr: float, partner_lr: float) -> Difference:
    ours, theirs = (method, place, lr), (about.partner(method), place, partner_lr)
    found = stats.paired_differences(_by_seed(about, ours, about.loss), _by_seed(about, theirs, about.loss))
    pairs = len(about.cells.get(ours, {}).keys() | about.cells.get(theirs, {}).keys())
    return Difference(method, theirs[0], place, lr, partner_lr, stats.t_interval(found), pairs)


def differences(about: Study) -> list[tuple[Difference, Difference | None]]:
    """(each at its own best learning rate, both at the baseline's best), for each method and place.

    The second is None where the method was not run at the baseline's best learning rate.
    """
    found = []
    for place in about.places:
        for method in about.methods:
            partner = about.partner(method)
            own, shared = best_lr(about, method, place), best_lr(about, partner, place)
            if method == partner or own is None or shared is None:
                continue
            at_shared = None
            if (method, place, shared) in about.cells:
                at_shared = _difference(about, method, place, shared, shared)
            found.append((_difference(about, method, place, own, shared), at_shared))
    return found


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
                ours = _by_seed(about, (method, place, lr), about.capped)
                theirs = _by_seed(about, (partner, place, lr), about.capped)
                each.append([d for d in stats.paired_differences(ours, theirs) if math.isfinite(d)])
        each = [d for d in each if d]
        interval = stats.bootstrap(each)
        if interval is not None:
            lower = sum(sum(d) < 0 for d in each)
            found.append(Overall(method, partner, interval, len(each), lower))
    return found
