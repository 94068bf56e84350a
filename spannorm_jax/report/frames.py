"""The tables that figures are drawn from: what a study says, in columns."""

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import polars as pl

from spannorm_jax.report.comparisons import differences
from spannorm_jax.report.palette import OUTCOME_ORDER
from spannorm_jax.report.rates import rates
from spannorm_jax.report.study import ARM, Size, Study

_APART = 0.15  # nats: of levels whose names can stand beside each other
GRAVEST = ("diverged", "collapsed", "plateau", "unfinished", "trained")
FLOOR_NAMES = {"trigram": "3-gram", "fourgram": "4-gram", "gzip": "gzip", "linear": "linear classifier"}


def size_words(study: Study, size: Size, without: Sequence[str] = ()) -> list[str]:
    words = {"depth": f"{size.depth} blocks", "width": f"width {size.width}"}
    return [text for axis, text in words.items() if study.varies(axis) and axis not in without]


def named(study: Study, table: pl.DataFrame) -> pl.DataFrame:
    """The table with the names of its methods in place of their indices: `method` is the label."""
    names = [(m.label, m.placement, m.init, m.other) for m in study.methods]
    methods = pl.DataFrame(
        names, schema=dict.fromkeys(("label", "placement", "init", "other"), pl.String), orient="row"
    )
    methods = methods.with_columns(method=pl.int_range(pl.len()))
    return table.join(methods, on="method", maintain_order="left").with_columns(method="label").drop("label")


def levels(study: Study) -> pl.DataFrame:
    """What losses are to be read against: the training data's unigram entropy, and floors of the held-out split.

    The entropy of images' classes is chance.
    """
    runs = [row.unigram_entropy for row in study.rows]
    found = {(study.entropy_name, round(entropy, 3)) for entropy in runs if entropy is not None}
    floors = [(name, level) for row in study.rows for name, level in row.floors.items()]
    found |= {(FLOOR_NAMES[name], round(level, 3)) for name, level in floors if name in FLOOR_NAMES}
    lines: list[dict[str, Any]] = []
    for name, level in sorted(found, key=lambda pair: -pair[1]):
        near = lines and lines[-1]["level"] - level < _APART  # its name would stand on the other's
        if near:
            lines[-1]["name"] += f", {name} {level}"
        lines.append({"level": level, "name": "" if near else f"{name} {level}"})
    return pl.DataFrame(lines, schema={"level": pl.Float64, "name": pl.String})


def optima(study: Study) -> pl.DataFrame:
    """Of each method and size the learning rate of least loss with its interval, where the sweep encloses it.

    `lr` is null where a neighbour of the best rate failed: it then lies somewhere between `low` and `high`.
    """
    return rates(study).filter(pl.col("kind") != "end").select(*ARM[:3], "low", "high", seeds="n", lr="at")


def forest(study: Study) -> pl.DataFrame:
    """Differences from the baseline, with bounds of the pooled error, or else of their own seeds."""
    table, pooled = differences(study).drop_nulls("difference"), pl.col("pooled_low").is_not_null()
    labels = [method.label for method in study.methods]
    panel = [", ".join(size_words(study, Size(*size))) for size in table.select("depth", "width").iter_rows()]
    table = table.with_columns(panel=pl.Series(panel, dtype=pl.String))
    return table.sort("depth", "width", "method", maintain_order=True).select(
        *(*ARM[:3], "difference", "comparison", "panel"),
        low=pl.coalesce("pooled_low", "low"),
        high=pl.coalesce("pooled_high", "high"),
        seeds="n",
        baseline=pl.col("baseline").map_elements(labels.__getitem__, pl.String),
        error=pl.when(pooled).then(pl.lit("pooled")).otherwise(pl.lit("its own seeds'")),
    )


def endings(study: Study) -> pl.DataFrame:
    """A line for each method, size and rate, run or not: gravest outcome, letters of all, counts."""
    outcomes, lines = study.by_seed("outcome"), []
    arms = itertools.product(range(len(study.methods)), study.sizes, sorted({lr for *_, lr in outcomes}))
    for i, size, lr in arms:
        counts = Counter(outcomes.get((i, *size, lr), {}).values())
        gravest = next((kind for kind in GRAVEST if counts[kind]), "unfinished")
        text = " ".join(f"{counts[kind]}{kind[0].upper()}" for kind in GRAVEST if counts[kind]) or "–"
        seen = ", ".join(f"{counts[kind]} {kind}" for kind in OUTCOME_ORDER if counts[kind]) or "not run"
        lines.append((i, *size, lr, study.size_text(size), gravest, text, seen))
    return pl.DataFrame(lines, schema=[*ARM, "place", "outcome", "text", "seen"], orient="row")


def profiles(study: Study) -> pl.DataFrame:
    """Of each method the share of all its runs at or below a loss: those that did not finish reach none."""
    runs = study.runs.filter("first").select(*ARM[:3], "loss", runs=pl.len().over("method"))
    least, greatest = runs["loss"].min(), runs["loss"].max()  # each method has both of these
    steps = []
    for _, own in runs.group_by("method", maintain_order=True) if least is not None else ():
        ended = own.drop_nulls("loss").sort("loss", maintain_order=True)
        shares = [0.0, *((i + 1) / len(own) for i in range(len(ended))), len(ended) / len(own)]
        first, last = (own.head(1).with_columns(loss=pl.lit(loss, pl.Float64)) for loss in (least, greatest))
        steps.append(pl.concat([first, ended, last]).with_columns(share=pl.Series(shares)))
    return pl.concat(steps).select(*ARM[:3], "loss", "share", "runs") if steps else runs.clear()
