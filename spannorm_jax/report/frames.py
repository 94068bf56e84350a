"""The tables that figures are drawn from, and runs.csv: what a study says, in columns."""

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import polars as pl

from spannorm_jax.report import stats
from spannorm_jax.report.comparisons import differences
from spannorm_jax.report.palette import OUTCOME_ORDER
from spannorm_jax.report.rates import rates
from spannorm_jax.report.study import ARM, RUNS, Method, Place, Study

_CROWD = 9  # methods in one panel
GRAVEST = ("diverged", "collapsed", "plateau", "unfinished", "trained")


def panel(about: Study, method: Method, place: Place, without: Sequence[str] = ()) -> str:
    """What sets a panel apart: depth and width where they differ, but for the axes `without`, and other config keys.

    Many methods have a panel an initialisation: no more curves can be told apart in one.
    """
    parts = _place_words(about, place, without)
    if len({m[:2] for m in about.methods}) > _CROWD:
        parts.append(f"init {method.init}")
    return ", ".join([*parts, *([method.other] if method.others else [])])


def _place_words(about: Study, place: Place, without: Sequence[str] = ()) -> list[str]:
    words = {"depth": f"{place.depth} blocks", "width": f"width {place.width}"}
    return [text for axis, text in words.items() if about.varies(axis) and axis not in without]


def _names(method: Method, place: Place) -> dict[str, Any]:
    return {"placement": method.placement, "init": method.init, "other": method.other} | place._asdict()


def runs_table(about: Study) -> pl.DataFrame:
    """One line a run: what runs.csv holds. `capped_loss` is the loss that figures over learning rates show."""
    at_best = [lr == about.best.get(tuple(at)) for *at, lr in about.runs.select(ARM).iter_rows()]
    best = pl.Series(at_best, dtype=pl.Boolean)
    table = about.runs.with_columns(capped_loss=pl.when(pl.col("capped").is_finite()).then("capped"), best_lr=best)
    names, more = list(RUNS), list(RUNS).index("spikes")
    return table.select(*names[:more], "capped_loss", "best_lr", *names[more:])


_APART = 0.15  # nats: of levels whose names can stand beside each other
FLOOR_NAMES = {"trigram": "3-gram", "fourgram": "4-gram", "gzip": "gzip"}


def levels_table(about: Study) -> pl.DataFrame:
    """What losses are to be read against: the training data's unigram entropy, and floors of the held-out text."""
    found = {("unigram entropy", round(e, 3)) for row in about.rows if (e := row.run.unigram_entropy) is not None}
    found |= {
        (shown, round(row.floors[name], 3))
        for row in about.rows
        for name, shown in FLOOR_NAMES.items()
        if name in row.floors
    }
    lines: list[dict[str, Any]] = []
    for name, level in sorted(found, key=lambda pair: -pair[1]):
        near = lines and lines[-1]["level"] - level < _APART  # its name would stand on the other's
        if near:
            lines[-1]["name"] += f", {name} {level}"
        lines.append({"level": level, "name": "" if near else f"{name} {level}"})
    return pl.DataFrame(lines, schema={"level": pl.Float64, "name": pl.String})


_CELL = ("placement", "init", "other", "depth", "width", "lr")


def settings_table(runs: pl.DataFrame) -> pl.DataFrame:
    """Over the seeds of each setting: mean, least and greatest capped loss, and how many runs it is of."""
    loss = pl.col("capped_loss")
    table = runs.group_by(_CELL, maintain_order=True).agg(
        loss.mean().alias("loss"),
        loss.min().alias("low"),
        loss.max().alias("high"),
        loss.count().alias("n"),
        pl.len().alias("runs"),
        (pl.col("outcome") == "diverged").sum().alias("diverged"),
        pl.col("best_lr").first(),
    )
    return table.filter(pl.col("n") > 0)


def _named(about: Study, table: pl.DataFrame) -> pl.DataFrame:
    """The table with the names of its methods, instead of their indices."""
    names = [(i, m.placement, m.init, m.other, m.label) for i, m in enumerate(about.methods)]
    schema = {"method": pl.Int64, **dict.fromkeys(("placement", "init", "other", "label"), pl.String)}
    methods = pl.DataFrame(names, schema=schema, orient="row")
    return table.join(methods, on="method", maintain_order="left").select(
        *_CELL[:-1], pl.col("label").alias("method"), pl.exclude("method", "label", *_CELL[:-1])
    )


def optima_table(about: Study) -> pl.DataFrame:
    """Of each method and place the learning rate of least loss with its interval, where the sweep encloses it.

    `lr` is null where a neighbour of the best rate failed: it then lies somewhere between `low` and `high`.
    """
    table = rates(about).filter(pl.col("kind") != "end")
    return _named(about, table.select(*ARM[:3], "low", "high", seeds="n", lr="at"))


def sensitivity_table(about: Study) -> pl.DataFrame:
    low, high = pl.col("least").alias("low"), pl.col("most").alias("high")
    return _named(about, rates(about).drop_nulls("sensitivity").select(*ARM[:3], low, high, "seeds", "sensitivity"))


def differences_table(about: Study) -> pl.DataFrame:
    """Of each method and place its difference from the baseline, of both comparisons where the learning rate varies.

    Its bounds are those of the pooled error, or where there is none those of its own seeds.
    """
    table, pooled = differences(about).drop_nulls("difference"), pl.col("pooled_low").is_not_null()
    table = table.sort("depth", "width", "method", maintain_order=True).select(
        *(*ARM[:3], pl.coalesce("pooled_low", "low").alias("low"), pl.coalesce("pooled_high", "high").alias("high")),
        *(pl.col("n").alias("seeds"), "difference"),
        pl.col("baseline").map_elements(lambda i: about.methods[i].label, pl.String),
        "comparison",
        panel=pl.struct("depth", "width").map_elements(
            lambda at: ", ".join(_place_words(about, Place(**at))), pl.String
        ),
        error=pl.when(pooled).then(pl.lit("pooled")).otherwise(pl.lit("its own seeds'")),
    )
    return _named(about, table)


def outcomes_table(about: Study) -> pl.DataFrame:
    """One line for each method, place and learning rate of the study, whether it was run or not.

    `outcome` is the gravest over seeds, `text` the letters of all, and how many had each where they differ.
    """
    outcomes, lines = about.by_seed("outcome"), []
    arms = itertools.product(range(len(about.methods)), about.places, sorted({lr for *_, lr in outcomes}))
    for i, place, lr in arms:
        counts = Counter(outcomes.get((i, *place, lr), {}).values())
        said = {
            "lr": lr,
            "method": about.methods[i].label,
            "place": about.place_text(place),
            "outcome": next((kind for kind in GRAVEST if counts[kind]), "unfinished"),
            "text": " ".join(f"{counts[kind]}{kind[0].upper()}" for kind in GRAVEST if counts[kind]) or "–",
            "seen": ", ".join(f"{counts[kind]} {kind}" for kind in OUTCOME_ORDER if counts[kind]) or "not run",
        }
        lines.append(_names(about.methods[i], place) | said)
    return pl.DataFrame(lines, infer_schema_length=None)


def profile_table(about: Study) -> pl.DataFrame:
    """Of each method the share of all its runs at or below a loss: those that did not finish reach none."""
    runs = about.runs.filter("first").select("method", pl.col("loss").fill_null(math.inf))
    each = [stats.share_below(runs.filter(method=i)["loss"].to_list()) for i in range(len(about.methods))]
    everywhere = [loss for losses, _ in each for loss in losses]
    lines = []
    for i, (losses, shares) in enumerate(each) if everywhere else ():
        first, last = (min(everywhere), 0.0), (max(everywhere), shares[-1] if shares else 0.0)
        names = _names(about.methods[i], about.places[0])
        for loss, share in [first, *zip(losses, shares, strict=True), last]:
            lines.append(names | {"loss": loss, "share": share, "runs": runs.filter(method=i).height})
    return pl.DataFrame(lines, infer_schema_length=None)
