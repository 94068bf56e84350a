"""Runs -> a study: its methods, its baseline, and one frame of runs from which all else is made.

A method is what sets runs apart beside depth, width, learning rate and seed: placement, initialisation and any other
config key that differs. An arm, or setting, is a method at a depth, a width and a learning rate. All differences are
taken seed by seed, for the runs of a seed have the same data in the same order and the same random key.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import polars as pl

from spannorm_jax.errors import UserError, did_you_mean, one_line
from spannorm_jax.report.differing import AXES, in_words, variants
from spannorm_jax.report.palette import INIT_ORDER, PLACEMENT_ORDER, ranked
from spannorm_jax.report.runs import FINISHED, RunFolder

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
        return ", ".join([f"{self.placement} / {self.init}", *[self.other] * bool(self.others)])

    @property
    def keys(self) -> dict[str, str]:
        return {"placement": self.placement, "init": self.init, **dict(self.others)}


class Size(NamedTuple):
    depth: int
    width: int


ARM = ("method", "depth", "width", "lr")
Arm = tuple[Any, ...]  # the values of ARM, the method by its index
RUNS: dict[str, Any] = {  # the columns of runs.csv
    **dict.fromkeys(("placement", "init", "other"), pl.String),
    **{"depth": pl.Int64, "width": pl.Int64, "lr": pl.Float64, "seed": pl.Int64, "outcome": pl.String},
    **dict.fromkeys(("last_step", "steps", "tokens"), pl.Int64),
    **dict.fromkeys(("flops", "train_loss", "held_out_loss", "bits_per_byte", "loss_at_init"), pl.Float64),
    **{"capped_loss": pl.Float64, "best_lr": pl.Boolean},
    **{"spikes": pl.Int64, "clipped_share": pl.Float64, "grad_norm_p999": pl.Float64, "tokens_per_s": pl.Float64},
    **{"fingerprint": pl.String, "folder": pl.String},
}
_OF_A_RUN = ("placement", "init", "depth", "width", "lr", "seed", "outcome", "last_step", "steps", "fingerprint")
_MORE = {"method": pl.Int64, "also": pl.String, "row": pl.Int64}
_MORE |= dict.fromkeys(("over_fourgram", "accuracy", "over_linear"), pl.Float64)
NUMBERS = (  # of a run, whose mean and deviation a setting has
    *("train_loss", "held_out_loss", "bits_per_byte", "over_fourgram", "accuracy", "over_linear"),
    *("spikes", "clipped_share", "grad_norm_p999", "tokens_per_s"),
)


@dataclass
class Study:
    rows: list[RunFolder]  # in the order read
    methods: list[Method]
    runs: pl.DataFrame
    measure: str  # "held-out" | "training": whose loss is compared
    baseline: dict[str, str]  # what a method's keys are replaced by to find the method that it is compared with
    confirmed: dict[str, str]  # keys of the methods whose comparison was named before the runs; {}: none was
    ladder: Sequence[float] = ()  # the learning rates of a bisection, ascending; (): the runs are of none
    ladder_seeds: int = 0  # with which one of them must train

    def __post_init__(self) -> None:
        runs = self.runs
        self.settings = settings_of(runs)
        self.sizes = sorted({Size(*size) for size in runs.select("depth", "width").iter_rows()})
        self.placements = ranked((method.placement for method in self.methods), PLACEMENT_ORDER)
        self.inits = ranked((method.init for method in self.methods), INIT_ORDER)
        self.seeds = frozenset(runs["seed"])
        # The seeds whose losses are compared: those that chose no learning rate, or all.
        self.reported = self.seeds - choosing(runs) or self.seeds
        # Method, depth, width -> the learning rates that were run there, and the best one, where it has one.
        lrs = runs.group_by(ARM[:3]).agg(pl.col("lr").unique().sort())
        self.lrs: dict[Arm, list[float]] = {tuple(at): rates for *at, rates in lrs.iter_rows()}
        best = runs.filter("best_lr").select(ARM)
        self.best: dict[Arm, float] = {tuple(at): lr for *at, lr in best.iter_rows()}

    def by_seed(self, column: str, seeds: frozenset[int] | None = None) -> dict[Arm, dict[int, Any]]:
        """arm -> seed -> a value of `runs`, of the runs of `seeds` (None: all) that have it."""
        found: dict[Arm, dict[int, Any]] = {}
        table = self.runs.filter("first", pl.col(column).is_not_null())
        for *arm, seed, value in table.select(*ARM, "seed", pl.col(column).alias("value")).iter_rows():
            if seeds is None or seed in seeds:
                found.setdefault(tuple(arm), {})[seed] = value
        return found

    @cached_property
    def unit(self) -> str:
        """Of losses."""
        return f"nats/{self.counted[:-1]}"

    @cached_property
    def counted(self) -> str:
        return "images" if {row.counted for row in self.rows} == {"images"} else "tokens"

    @property
    def entropy_name(self) -> str:
        return "chance" if self.counted == "images" else "unigram entropy"

    @property
    def floors_text(self) -> str:
        """What dashed lines are."""
        if self.counted == "images":
            return "chance, and what a linear classifier of the pixels reaches on the held-out data"
        counted = "what n-grams counted on it and gzip reach on the held-out data"
        return f"the unigram entropy of the training data, and {counted}"

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
        own = self.methods[method].keys | self.baseline
        return next((i for i, other in enumerate(self.methods) if other.keys == own), None)

    def confirms(self, method: int) -> bool:
        """Whether the method's comparison with its baseline was named before the runs."""
        return bool(self.confirmed) and self.confirmed.items() <= self.methods[method].keys.items()

    @property
    def baseline_text(self) -> str:
        return keys_text(self.baseline)

    def varies(self, axis: str) -> bool:
        """Whether `depth`, `width` or `lr` takes more than one value."""
        return self.runs[axis].n_unique() > 1

    def size_text(self, size: Size) -> str:
        """The size's numbers, as far as sizes differ: `24`, `128` or `24 × 128`."""
        return " × ".join(str(getattr(size, axis)) for axis in ("depth", "width") if self.varies(axis))


def keys_text(keys: Mapping[str, str]) -> str:
    """`placement=pre,init=plain`"""
    return ",".join(f"{key}={value}" for key, value in keys.items())


def study_of(
    rows: Sequence[RunFolder],
    baseline: Mapping[str, str] | None = None,
    confirmed: Mapping[str, str] | None = None,
    ladder: Sequence[float] = (),
    ladder_seeds: int = 0,
) -> Study:
    """Raises UserError if `baseline` or `confirmed` names what no run has."""
    losses = [row.reached["held_out_loss"] for row in rows if row.outcome in FINISHED]
    held_out = bool(losses) and None not in losses
    measure, loss = ("held-out", "held_out_loss") if held_out else ("training", "train_loss")
    methods, runs = _runs(rows, loss)
    compared = _checked("--baseline", methods, baseline) if baseline else _default_baseline(methods)
    confirms = _checked("--confirm", methods, confirmed or {})
    return Study(list(rows), methods, runs, measure, compared, confirms, ladder, ladder_seeds)


def _runs(rows: Sequence[RunFolder], loss: str) -> tuple[list[Method], pl.DataFrame]:
    """The methods, and one line a run, both in the order of tables.

    Columns beside those of runs.csv:
      method, row: indices of its method and row; `also`: the keys that set its setting apart.
      first: whether it is the first run of its seed in its setting.
      counted: whether means are over it: over finished runs, else unfinished, else diverged ones.
      loss: the loss that is compared, of a run that finished.
      capped: that, or the loss at initialisation if it is less; of a run that diverged the latter,
        infinity where it is not recorded (null as `capped_loss`).
    """
    apart = variants(rows)
    each = [Method(row.placement, row.init, _others(own)) for row, own in zip(rows, apart, strict=True)]
    placements = ranked((row.placement for row in rows), PLACEMENT_ORDER)
    inits = ranked((row.init for row in rows), INIT_ORDER)

    def order(i: int) -> tuple[Any, ...]:
        row, method = rows[i], (placements.index(rows[i].placement), inits.index(rows[i].init), each[i].others)
        return *method, row.depth, row.width, row.lr, row.seed

    ordered = sorted(range(len(rows)), key=order)
    methods = list(dict.fromkeys(each[i] for i in ordered))
    index = {method: i for i, method in enumerate(methods)}
    lines = []
    for i in ordered:
        row, method, also = rows[i], each[i], ", ".join(in_words(key, value) for key, value in apart[i])
        line = {"method": index[method], "other": method.other, "also": also, "row": i, "folder": str(row.folder)}
        lines.append({name: getattr(row, name) for name in _OF_A_RUN} | row.reached | line)
    outcome, start = pl.col("outcome"), pl.col("loss_at_init").fill_null(math.inf)
    finished = outcome.is_in(FINISHED)
    rank = pl.when(finished).then(0).when(outcome == "unfinished").then(1).otherwise(2)
    table = pl.DataFrame(lines, schema=RUNS | _MORE).with_columns(
        first=pl.struct(*ARM, "seed").is_first_distinct(),
        counted=rank == rank.min().over(ARM),
        loss=pl.when(finished).then(loss),
        capped=pl.when(outcome == "diverged")
        .then(start)
        .when(finished & pl.col(loss).is_not_null())
        .then(pl.min_horizontal(loss, start)),
    )
    choose = table.filter("first", pl.col("seed").is_in(choosing(table)), pl.col("capped").is_not_null())
    best = by_loss(choose, *ARM[:3]).unique(ARM[:3], keep="first").select(*ARM[:3], best="lr")
    return methods, table.join(best, on=ARM[:3], how="left", maintain_order="left").with_columns(
        capped_loss=pl.when(pl.col("capped").is_finite()).then("capped"),
        best_lr=(pl.col("lr") == pl.col("best")).fill_null(False),
    ).drop("best")  # fmt: skip


def _others(variant: Sequence[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """A run's own keys but for the axes, with lists as they are typed."""
    others = ((key, value) for key, value in variant if key not in AXES)
    return tuple((key, value.strip("[]").replace('"', "").replace(", ", ",")) for key, value in others)


def choosing(runs: pl.DataFrame) -> frozenset[int]:
    """The seeds that rates are chosen on: half of those that every setting has, if they are enough; else all."""
    every = runs.group_by(ARM).agg("seed")["seed"].to_list()
    shared = sorted(set.intersection(*map(set, every))) if every else []
    split = len(shared) >= _FEWEST_TO_SPLIT and runs["lr"].n_unique() > 1
    return frozenset(shared[: len(shared) // 2] if split else runs["seed"])


def by_loss(runs: pl.DataFrame, *keys: str) -> pl.DataFrame:
    """Learning rates (for each value of `keys`) by their mean capped loss, the best first."""
    means = runs.group_by(*keys, "lr").agg(pl.col("capped").mean())
    return means.sort("capped", "lr", nulls_last=True, maintain_order=True)


def settings_of(runs: pl.DataFrame) -> pl.DataFrame:
    """One line a setting, in the order of its runs.

    Columns:
      rows, counted: its rows, and those of them that its means are over.
      of `NUMBERS`: the mean; `NAME_sd`: the sample deviation; `NAME_n`: how many of `counted` have it.
      loss, low, high, n: mean, least and greatest capped loss, and of how many runs.
    """
    loss = pl.col("capped_loss")
    own = {name: pl.col(name).filter("counted") for name in NUMBERS}
    return runs.group_by(ARM, maintain_order=True).agg(
        pl.first("placement", "init", "other", "also", "best_lr"),
        pl.col("row").alias("rows"),
        pl.col("row").filter("counted").alias("counted"),
        *(values.mean() for values in own.values()),
        *(values.std().alias(f"{name}_sd") for name, values in own.items()),
        *(values.count().alias(f"{name}_n") for name, values in own.items()),
        loss=loss.mean(),
        low=loss.min(),
        high=loss.max(),
        n=loss.count(),
        runs=pl.len(),
        diverged=(pl.col("outcome") == "diverged").sum(),
    )


def _default_baseline(methods: Sequence[Method]) -> dict[str, str]:
    if not methods:
        return {}
    first = next((m for m in methods if (m.placement, m.init) == ("pre", "plain")), methods[0])
    inits = {m.init for m in methods}
    beside = {m.init for m in methods if m.placement == first.placement}
    readings = len(inits) > 1 and len({init.partition("-")[0] for init in inits}) == 1
    if readings and beside == inits:  # each is compared with its own
        return {"placement": first.placement}
    return {"placement": first.placement, "init": first.init}


def _checked(flag: str, methods: Sequence[Method], asked: Mapping[str, str]) -> dict[str, str]:
    """Keys and values of methods, as they were asked for. Raises UserError if no run has one of them."""
    values: dict[str, set[str]] = {}
    for method in methods:
        for key, value in method.keys.items():
            values.setdefault(key, set()).add(value)
    for key, value in asked.items():
        if key not in values:
            raise UserError(f"{flag} names {one_line(key)}, which tells no runs apart; {did_you_mean(key, values)}")
        if value not in values[key]:
            raise UserError(f"{flag} {one_line(f'{key}={value}')}: no run has it; {did_you_mean(value, values[key])}")
    return dict(asked)
