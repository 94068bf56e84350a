"""Rows -> methods, depths and widths, and cells that hold the runs of each by seed.

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
from spannorm_jax.report.rows import AXES, FINISHED, Group, Row, in_words, over_seeds

_FEWEST_TO_SPLIT = 6  # seeds of every setting, from which on some choose learning rates and others are reported


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
    confirmed: dict[str, str]  # keys of the methods whose comparison was named before the runs; {}: none was
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

    def by_seed(
        self, cell: tuple[Method, Place, float], number: Callable[[Row], float | None], seeds: frozenset[int]
    ) -> dict[int, float]:
        """seed -> number, of the runs of `seeds` that have it."""
        found = {seed: number(row) for seed, row in self.cells.get(cell, {}).items() if seed in seeds}
        return {seed: value for seed, value in found.items() if value is not None}

    def partner(self, method: Method) -> Method:
        others = tuple((key, self.baseline.get(key, value)) for key, value in method.others)
        return Method(self.baseline.get("placement", method.placement), self.baseline.get("init", method.init), others)

    def confirms(self, method: Method) -> bool:
        """Whether the method's comparison with its baseline was named before the runs."""
        own = _keys(method)
        return bool(self.confirmed) and all(own.get(key) == value for key, value in self.confirmed.items())

    @cached_property
    def choosing(self) -> frozenset[int]:
        """The seeds that learning rates are chosen on: half of those that every setting has, if they are enough."""
        shared = sorted(frozenset.intersection(*(frozenset(seeds) for seeds in self.cells.values())))
        chosen = shared[: len(shared) // 2] if len(shared) >= _FEWEST_TO_SPLIT and self.varies("lr") else self.seeds
        return frozenset(chosen)

    @cached_property
    def reported(self) -> frozenset[int]:
        """The seeds whose losses are compared: those that chose no learning rate, or all."""
        return self.seeds - self.choosing or self.seeds

    @cached_property
    def seeds(self) -> frozenset[int]:
        return frozenset(row.seed for row in self.rows)

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


def _keys(method: Method) -> dict[str, str]:
    return {"placement": method.placement, "init": method.init, **dict(method.others)}


def study(
    rows: Sequence[Row], baseline: Mapping[str, str] | None = None, confirmed: Mapping[str, str] | None = None
) -> Study:
    """Raises UserError if `baseline` or `confirmed` names what no run has."""
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
        confirmed=_checked("--confirm", methods, confirmed or {}),
        cells=cells,
    )


def _baseline(methods: Sequence[Method], asked: Mapping[str, str] | None) -> dict[str, str]:
    if not methods and not asked:
        return {}
    if not asked:
        first = next((m for m in methods if (m.placement, m.init) == ("pre", "plain")), methods[0])
        inits = {m.init for m in methods}
        if len(inits) > 1 and len({init.partition("-")[0] for init in inits}) == 1:  # readings of one initialisation
            return {"placement": first.placement}  # each is compared with its own
        return {"placement": first.placement, "init": first.init}
    return _checked("--baseline", methods, asked)


def _checked(flag: str, methods: Sequence[Method], asked: Mapping[str, str]) -> dict[str, str]:
    """Keys and values of methods, as they were asked for. Raises UserError if no run has one of them."""
    values: dict[str, set[str]] = {}
    for method in methods:
        for key, value in _keys(method).items():
            values.setdefault(key, set()).add(value)
    for key, value in asked.items():
        if key not in values:
            raise UserError(f"{flag} names {one_line(key)}, which tells no runs apart; {did_you_mean(key, values)}")
        if value not in values[key]:
            raise UserError(f"{flag} {one_line(f'{key}={value}')}: no run has it; {did_you_mean(value, values[key])}")
    return dict(asked)
