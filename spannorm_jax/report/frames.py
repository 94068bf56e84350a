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

_CROWD = 9  # methods in one panel
_APART = 0.15  # nats: of levels whose names can stand beside each other
GRAVEST = ("diverged", "collapsed", "plateau", "unfinished", "trained")
FLOOR_NAMES = {"trigram": "3-gram", "fourgram": "4-gram", "gzip": "gzip"}


def panels(study: Study, without: Sequence[str] = ()) -> pl.DataFrame:
    """Of each size and method the panel that it stands in, in their order.

    A panel is set apart by depth and width where they differ, but for the axes `without`, and by other config keys.
    Many methods have a panel an initialisation: no more curves can be told apart in one.
    """
    crowded = len({method[:2] for method in study.methods}) > _CROWD
    lines = []
    for size, (i, method) in itertools.product(study.sizes, enumerate(study.methods)):
        of_init, of_others = [f"init {method.init}"] * crowded, [method.other] * bool(method.others)
        lines.append((i, *size, ", ".join([*size_words(study, size, without), *of_init, *of_others])))
    return pl.DataFrame(lines, schema=[*ARM[:3], "panel"], orient="row")


def size_words(study: Study, size: Size, without: Sequence[str] = ()) -> list[str]:
    words = {"depth": f"{size.depth} blocks", "width": f"width {size.width}"}
    return [text for axis, text in words.items() if study.varies(axis) and axis not in without]


def named(study: Study, table: pl.DataFrame) -> pl.DataFrame:
    """The table with the names of its methods in place of their indices: `method` is the label."""
    names = [(i, m.placement, m.init, m.other, m.label) for i, m in enumerate(study.methods)]
    schema = {"method": pl.Int64, **dict.fromkeys(("placement", "init", "other", "label"), pl.String)}
    methods = pl.DataFrame(names, schema=schema, orient="row")
    return table.join(methods, on="method", maintain_order="left").with_columns(method="label").drop("label")


def levels(study: Study) -> pl.DataFrame:
    """What losses are to be read against: the training data's unigram entropy, and floors of the held-out text."""
    runs = [row.unigram_entropy for row in study.rows]
    found = {("unigram entropy", round(entropy, 3)) for entropy in runs if entropy is not None}
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
    table = rates(study).filter(pl.col("kind") != "end")
    return table.select(*ARM[:3], "low", "high", seeds="n", lr="at")


def forest(study: Study) -> pl.DataFrame:
    """Of each method and size its difference from the baseline, of both comparisons where the learning rate varies.

    Its bounds are those of the pooled error, or where there is none those of its own seeds.
    """
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
    """One line for each method, size and learning rate of the study, whether it was run or not.

    `outcome` is the gravest over seeds, `text` the letters of all, `seen` how many had each.
    """
    outcomes, lines = study.by_seed("outcome"), []
    arms = itertools.product(range(len(study.methods)), study.sizes, sorted({lr for *_, lr in outcomes}))
    for i, size, lr in arms:
        counts = Counter(outcomes.get((i, *size, lr), {}).values())
        line = {
            "place": study.size_text(size),
            "outcome": next((kind for kind in GRAVEST if counts[kind]), "unfinished"),
            "text": " ".join(f"{counts[kind]}{kind[0].upper()}" for kind in GRAVEST if counts[kind]) or "–",
            "seen": ", ".join(f"{counts[kind]} {kind}" for kind in OUTCOME_ORDER if counts[kind]) or "not run",
        }
        lines.append({"method": i, **size._asdict(), "lr": lr} | line)
    return pl.DataFrame(lines, infer_schema_length=None)


def profiles(study: Study) -> pl.DataFrame:
    """Of each method the share of all its runs at or below a loss: those that did not finish reach none."""
    runs = study.runs.filter("first").select(*ARM[:3], "loss", runs=pl.len().over("method"))
    ended = runs.drop_nulls("loss").sort("method", "loss", maintain_order=True)
    share = pl.int_range(1, pl.len() + 1).over("method") / pl.col("runs")
    steps = ended.with_columns(share=share)
    if steps.is_empty():
        return steps
    every = runs.unique("method", maintain_order=True)  # each from the least loss of all to the greatest
    reached = every.join(steps.group_by("method").agg(pl.col("share").max()), on="method", how="left")
    first = every.with_columns(loss=steps["loss"].min(), share=0.0)
    last = reached.with_columns(loss=steps["loss"].max(), share=pl.col("share").fill_null(0.0))
    parts = [part.select(*ARM[:3], "loss", "share", "runs") for part in (first, steps, last)]
    return pl.concat(parts).sort("method", maintain_order=True)
