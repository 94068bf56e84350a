"""Rows -> methods, depths and widths, and cells that hold the runs of each by seed.

A method is what sets runs apart beside depth, width, learning rate and seed: placement, initialisation and any other
config key that differs. A cell is a method at a depth, a width and a learning rate. All differences are taken seed by
seed, for the runs of a seed have the same data in the same order and the same random key.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import polars as pl

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


ARM = ("method", "depth", "width", "lr")
Arm = tuple[Any, ...]  # the values of ARM, the method by its index
RUNS: dict[str, Any] = {  # the columns of runs.csv but for those that compare runs
    **dict.fromkeys(("placement", "init", "other"), pl.String),
    **{"depth": pl.Int64, "width": pl.Int64, "lr": pl.Float64, "seed": pl.Int64, "outcome": pl.String},
    **dict.fromkeys(("last_step", "steps", "tokens"), pl.Int64),
    **dict.fromkeys(("flops", "train_loss", "held_out_loss", "bits_per_byte", "loss_at_init"), pl.Float64),
    **{"spikes": pl.Int64, "clipped_share": pl.Float64, "grad_norm_p999": pl.Float64, "tokens_per_s": pl.Float64},
    **{"fingerprint": pl.String, "folder": pl.String},
}


def _line(row: Row, method: Method) -> dict[str, Any]:
    """The run's values of `RUNS`."""
    run, per_step, per_token = row.run, row.run.tokens_per_step, row.run.flops_per_token
    tokens = None if per_step is None else run.last_step * per_step
    known: dict[str, Any] = {name: getattr(run, name) for name in ("last_step", "steps", "fingerprint")}
    known |= {"other": method.other, "outcome": row.outcome.kind, "folder": str(run.folder), "tokens": tokens}
    known["flops"] = None if tokens is None or per_token is None else tokens * per_token
    return {name: known[name] if name in known else getattr(row, name) for name in RUNS}


@dataclass(frozen=True)
class Study:
    rows: list[Row]
    groups: list[Group]  # rows over seeds, in the order of tables
    methods: list[Method]
    measure: str  # "held-out" | "training": whose loss is compared
    baseline: dict[str, str]  # what a method's keys are replaced by to find the method that it is compared with
    confirmed: dict[str, str]  # keys of the methods whose comparison was named before the runs; {}: none was
    cells: dict[tuple[Method, Place, float], dict[int, Row]]  # seed -> row

    @cached_property
    def runs(self) -> pl.DataFrame:
        """One line a run, in the order of tables: what runs.csv holds, and what all that is compared is read from.

        Attributes of lines beside those of `Row`:
          method: its index in `methods`.
          first: whether it is the first run of its seed with this method, depth, width and learning rate.
          loss: the loss that is compared, of a run that finished.
          capped: that, or the loss at initialisation if it is less; a run that diverged has the
            latter, which is infinity where it is not recorded.
        """
        each = [(method_of(group), row) for group in self.groups for row in group.rows]
        index = {method: i for i, method in enumerate(self.methods)}
        loss = "held_out_loss" if self.measure == "held-out" else "train_loss"
        start = pl.col("loss_at_init").fill_null(math.inf)
        return (
            pl.DataFrame([_line(row, method) for method, row in each], schema=RUNS)
            .with_columns(method=pl.Series([index[method] for method, _ in each], dtype=pl.Int64))
            .with_columns(first=pl.struct(*ARM, "seed").is_first_distinct())
            .with_columns(loss=pl.when(pl.col("outcome").is_in(FINISHED)).then(loss))
            .with_columns(
                capped=pl.when(pl.col("outcome") == "diverged")
                .then(start)
                .when(pl.col("loss").is_not_null())
                .then(pl.min_horizontal("loss", start))
            )
        )

    def by_seed(self, column: str, seeds: frozenset[int] | None = None) -> dict[Arm, dict[int, Any]]:
        """arm -> seed -> a value of `runs`, of the runs of `seeds` (None: all) that have it."""
        found: dict[Arm, dict[int, Any]] = {}
        table = self.runs.filter("first", pl.col(column).is_not_null())
        for *arm, seed, value in table.select(*ARM, "seed", column).iter_rows():
            if seeds is None or seed in seeds:
                found.setdefault(tuple(arm), {})[seed] = value
        return found

    @cached_property
    def best(self) -> dict[Arm, float]:
        """Method, depth, width -> the learning rate with the least mean capped loss over the seeds that choose."""
        chosen = self.runs.filter("first", pl.col("seed").is_in(self.choosing), pl.col("capped").is_not_null())
        means = chosen.group_by(ARM).agg(pl.col("capped").mean()).sort("capped", "lr")
        best = means.unique(ARM[:3], keep="first", maintain_order=True)
        return {(method, depth, width): lr for method, depth, width, lr in best.select(ARM).iter_rows()}

    @cached_property
    def lrs(self) -> dict[Arm, list[float]]:
        """Method, depth, width -> the learning rates that were run there."""
        lrs = self.runs.group_by(ARM[:3]).agg(pl.col("lr").unique().sort())
        return {(method, depth, width): rates for method, depth, width, rates in lrs.iter_rows()}

    @cached_property
    def trained(self) -> set[Arm]:
        """The arms that trained with every seed that is reported."""
        outcomes = self.by_seed("outcome", self.reported)
        return {arm for arm, kinds in outcomes.items() if set(kinds.values()) == {"trained"}}

    def at_an_end(self, at: Arm, lr: float) -> bool:
        """Whether a learning rate is the least or greatest that was run there: a better one may lie beyond."""
        return len(self.lrs[at]) > 1 and lr in (self.lrs[at][0], self.lrs[at][-1])

    def partner(self, method: int) -> int | None:
        """Index of the baseline of a method; None if it has no runs."""
        own = _keys(self.methods[method]) | self.baseline
        return next((i for i, other in enumerate(self.methods) if _keys(other) == own), None)

    def confirms(self, method: int) -> bool:
        """Whether the method's comparison with its baseline was named before the runs."""
        return bool(self.confirmed) and self.confirmed.items() <= _keys(self.methods[method]).items()

    @cached_property
    def choosing(self) -> frozenset[int]:
        """The seeds that learning rates are chosen on: half of those that every setting has, if they are enough."""
        shared = sorted(frozenset.intersection(self.seeds, *map(frozenset, self.cells.values())))
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
        beside = {m.init for m in methods if m.placement == first.placement}
        readings = len(inits) > 1 and len({init.partition("-")[0] for init in inits}) == 1
        if readings and beside == inits:  # each is compared with its own
            return {"placement": first.placement}
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
