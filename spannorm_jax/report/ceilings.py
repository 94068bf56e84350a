"""The highest learning rate at which every seed trains, between two neighbours on a ladder of rates.

A rate holds if all its seeds train. One seed that does not settles that it fails. The bisection replays from the whole
ladder what is known: where it stands depends on how runs have ended, and not on their order nor on how many there are.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import polars as pl

from spannorm_jax.report.runs import FAILED
from spannorm_jax.report.study import ARM, Study

Held = Callable[[int], bool | None]  # whether a rung of the ladder holds; None: not known yet
_CEILINGS: dict[str, Any] = {
    **dict.fromkeys(ARM[:3], pl.Int64),
    **{"low": pl.Float64, "high": pl.Float64, "settled": pl.Boolean, "runs": pl.Int64, "below": pl.String},
}


def holds(outcomes: Iterable[str | None], seeds: int) -> bool | None:
    """Whether a rate holds, by the outcomes of its runs so far (`RunFolder.outcome`)."""
    kinds = list(outcomes)
    if any(kind in FAILED for kind in kinds):
        return False
    return True if kinds.count("trained") >= seeds else None


def bracket(rungs: int, held: Held) -> tuple[int, int]:
    """The rung that holds and the one that fails next to the ceiling, as far as is known.

    -1 and `rungs` are beyond the ladder's ends. The ceiling is settled once they are neighbours; else the rung between
    them decides.
    """
    low, high = -1, rungs
    while high - low > 1 and (known := held(middle := (low + high) // 2)) is not None:
        low, high = (middle, high) if known else (low, middle)
    return low, high


def tries(rungs: int, held: Held) -> Iterator[int]:
    """The rung that decides next, then those that would after either outcome, and so on."""
    brackets = deque([bracket(rungs, held)])
    while brackets:
        low, high = brackets.popleft()
        if high - low > 1:
            middle = (low + high) // 2
            yield middle
            brackets += [(low, middle), (middle, high)]


def odd(rungs: int, held: Held) -> list[int]:
    """Rungs that fail below one that holds: there the ceiling is that of the bisection's own way."""
    known = [held(rung) for rung in range(rungs)]
    return [rung for rung in range(rungs) if known[rung] is False and True in known[rung:]]


def interval_text(low: float | None, high: float | None) -> str:
    """Of rates that hold and fail; None: there was none."""
    if low is None or high is None:
        return f"below {high:g}" if high is not None else f"above {low:g}" if low is not None else "not known"
    return f"[{low:g}, {high:g}]"


def ceilings(study: Study) -> pl.DataFrame:
    """Of each method and size the highest rate that holds and the next that fails, null beyond the ladder's ends.

    `settled`: they are neighbours on the ladder. `below`: rates that fail below one that holds.
    """
    outcomes, lines = study.by_seed("outcome"), []
    for size in study.sizes if study.ladder else ():
        for i in range(len(study.methods)):
            if (i, *size) not in study.lrs:
                continue
            each = [outcomes.get((i, *size, lr), {}) for lr in study.ladder]

            def held(rung: int, each: list[dict[int, str]] = each) -> bool | None:
                return holds(each[rung].values(), study.ladder_seeds)

            low, high = bracket(len(each), held)
            rates = (study.ladder[rung] if 0 <= rung < len(each) else None for rung in (low, high))
            below = ", ".join(f"{study.ladder[rung]:g}" for rung in odd(len(each), held))
            lines.append((i, *size, *rates, high - low == 1, sum(map(len, each)), below))
    return pl.DataFrame(lines, schema=_CEILINGS, orient="row")


def middles(study: Study) -> pl.DataFrame:
    """What figures draw: ceilings between two rates of the ladder, at their geometric mean."""
    table = ceilings(study).drop_nulls(["low", "high"])
    middle = [math.sqrt(low * high) for low, high in table.select("low", "high").iter_rows()]
    return table.with_columns(ceiling=pl.Series(middle, dtype=pl.Float64), seeds=pl.lit(study.ladder_seeds))
