"""The highest learning rate at which every seed trains, between two neighbours on a ladder of rates.

A rate holds if all its seeds train. The first seed alone finds where its own ceiling is, and the others are asked
there: a rate that one seed fails at has no need of them. Each step replays from the whole ladder what is known: where
it stands depends on how runs have ended, and not on their order nor on how many there are.
"""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import polars as pl

from spannorm_jax.report.runs import FAILED
from spannorm_jax.report.study import ARM, Study

Try = tuple[int, int]  # a rung of the ladder, and a place among the seeds
Trained = Callable[[int, int], bool | None]  # whether a try trained; None: not known yet
_CEILINGS: dict[str, Any] = {
    **dict.fromkeys(ARM[:3], pl.Int64),
    **{"low": pl.Float64, "high": pl.Float64, "settled": pl.Boolean, "runs": pl.Int64, "below": pl.String},
}


class Bracket(NamedTuple):
    """A rung that holds and one that fails, as far as is known; -1 and the number of rungs are beyond the ends."""

    low: int
    high: int
    wanted: tuple[Try, ...]  # what decides next, each of them needed as long as none of them fails; (): settled


def trains(outcome: str | None) -> bool | None:
    """Whether a run trained, by its outcome so far (`RunFolder.outcome`)."""
    return False if outcome in FAILED else True if outcome == "trained" else None


def bracket(rungs: int, seeds: int, trained: Trained) -> Bracket:
    """Where the ceiling is, as far as is known.

    The first seed is bisected. If it trains in the ladder's middle, the top comes next: what bears every rate is then
    found at once, and a rate far above a ceiling fails at the cost of one run. Where the first seed's ceiling is all
    other seeds must train too, else one rung lower all, and so on.
    """
    low, high = -1, rungs
    while high - low > 1:
        rung = rungs - 1 if high == rungs and low >= 0 else (low + high) // 2
        known = trained(rung, 0)
        if known is None:
            return Bracket(low, high, ((rung, 0),))
        low, high = (rung, high) if known else (low, rung)
    while low >= 0 and False in (known_of := [trained(low, seed) for seed in range(seeds)]):
        low, high = low - 1, low
    return Bracket(low, high, tuple((low, seed) for seed in range(seeds) if known_of[seed] is None) if low >= 0 else ())


def tries(rungs: int, seeds: int, trained: Trained) -> Iterator[tuple[Try, ...]]:
    """What decides next, then what would after either outcome, and so on."""
    assumptions: deque[dict[Try, bool]] = deque([{}])
    while assumptions:
        assumed = assumptions.popleft()

        def either(rung: int, seed: int, assumed: dict[Try, bool] = assumed) -> bool | None:
            return assumed.get((rung, seed), trained(rung, seed))

        if wanted := bracket(rungs, seeds, either).wanted:
            yield wanted
            assumptions += [assumed | dict.fromkeys(wanted, True), assumed | {wanted[0]: False}]


def odd(rungs: int, seeds: int, trained: Trained) -> list[int]:
    """Rungs at which a seed fails that trains at a higher one: there the ceiling is that of the bisection's own way."""
    of_each = [[trained(rung, seed) for rung in range(rungs)] for seed in range(seeds)]
    return [rung for rung in range(rungs) if any(of[rung] is False and True in of[rung:] for of in of_each)]


def interval_text(low: float | None, high: float | None) -> str:
    """Of rates that hold and fail; None: there was none."""
    if low is None or high is None:
        return f"below {high:g}" if high is not None else f"above {low:g}" if low is not None else "not known"
    return f"[{low:g}, {high:g}]"


def ceilings(study: Study) -> pl.DataFrame:
    """Of each method and size the highest rate that holds and the next that fails, null beyond the ladder's ends.

    They are of the first `ladder_seeds` seeds. `settled`: they are neighbours on the ladder, and all seeds are known at
    the lower one. `below`: rates at which a seed fails that trains at a higher one.
    """
    outcomes, lines = study.by_seed("outcome"), []
    for size in study.sizes if study.ladder else ():
        for i in range(len(study.methods)):
            if (i, *size) not in study.lrs:
                continue
            each = [outcomes.get((i, *size, lr), {}) for lr in study.ladder]
            known = sorted(set().union(*each)) + [None] * study.ladder_seeds

            def trained(
                rung: int, seed: int, each: list[dict[int, str]] = each, known: list[Any] = known
            ) -> bool | None:
                return trains(each[rung].get(known[seed]))

            of = len(each), study.ladder_seeds, trained
            low, high, wanted = bracket(*of)
            rates = (study.ladder[rung] if 0 <= rung < len(each) else None for rung in (low, high))
            below = ", ".join(f"{study.ladder[rung]:g}" for rung in odd(*of))
            lines.append((i, *size, *rates, not wanted, sum(map(len, each)), below))
    return pl.DataFrame(lines, schema=_CEILINGS, orient="row")


def middles(study: Study) -> pl.DataFrame:
    """What figures draw: ceilings at their two rates' geometric mean, or at the ladder's end if `beyond`."""
    table = ceilings(study).filter(pl.col("settled") | pl.all_horizontal(pl.col("low", "high").is_not_null()))
    low, high = pl.coalesce("low", "high"), pl.coalesce("high", "low")
    beyond = pl.when(pl.col("high").is_null()).then(pl.lit("above")).when(pl.col("low").is_null()).then(pl.lit("below"))
    return table.with_columns(
        low=low, high=high, ceiling=(low * high).sqrt(), beyond=beyond, seeds=pl.lit(study.ladder_seeds)
    )
