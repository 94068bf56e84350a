"""Runs -> rows: what each run reached, and the seeds of one setting taken together.

Numbers that a folder does not hold are None, never guessed.
"""

import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from spannorm_jax.config import NAMES_OF_DATA, is_runtime
from spannorm_jax.report.folders import Run, finite

# What a report compares; a difference in any other config key is said aloud.
COMPARED_KEYS = ("model.placement", "model.init", "seed")
# A finished run has stalled unless its train loss is this far below the unigram entropy.
STALL_MARGIN = 0.05  # at least, as a fraction of the entropy
FINAL_FRACTION = 0.1  # of the steps taken, over which the train loss is averaged
WARMUP_STEPS = 5  # left out of tokens/s: they hold compilation

PLACEMENT_ORDER = ("pre", "post", "span")  # others follow in alphabetical order
INIT_ORDER = ("plain", "gpt2", "scale")


# ---- one run ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    kind: str  # diverged | unfinished | stalled | trained
    step: int  # where it diverged, or the last step logged
    steps: int  # asked for

    def __str__(self) -> str:
        notes = {
            "diverged": f" (step {self.step})",
            "unfinished": f" (step {self.step} of {self.steps})",
        }
        return self.kind + notes.get(self.kind, "")


@dataclass(frozen=True)
class Row:
    """What one run reached; None stands for a number that its folder does not hold."""

    placement: str
    init: str
    seed: int
    train_loss: float | None  # nats/token, mean over the last 10% of steps; None when diverged
    bits_per_byte: float | None  # held out, of the newest evaluation of the highest step
    tokens_per_s: float | None  # median over the steps after the first 5
    outcome: Outcome
    run: Run = field(repr=False)


def train_loss(run: Run) -> float | None:
    """Mean loss over the last 10% of the steps taken (at least the last one), in nats per token."""
    first = (1 - FINAL_FRACTION) * run.last_step
    losses = [finite(line.get("loss")) for line in run.metrics if line["step"] > first + 1e-6]
    numbers = [loss for loss in losses if loss is not None]
    return math.fsum(numbers) / len(numbers) if numbers and len(numbers) == len(losses) else None


def held_out(run: Run) -> dict[str, Any] | None:
    """The evaluation that counts: newest of the highest step, on the config's held-out split.

    Other splits count only when that one was never evaluated, the training split never.
    """
    options = run.options
    lines = [e for e in run.evals if e.get("split") in (None, options.get("data.eval_split"))]
    if not lines:
        lines = [e for e in run.evals if e.get("split") != options.get("data.train_split")]
    return max(reversed(lines), key=lambda e: e["step"], default=None)  # the first of equals wins


def outcome(run: Run) -> Outcome:
    """How the run ended.

    diverged    a loss or gradient became non-finite.
    unfinished  neither diverged nor done: still running, or stopped.
    stalled     done, but its train loss is not at least 5% (`STALL_MARGIN`) below the unigram
                entropy of the training data: it has learnt little more than token frequencies.
    trained     done, and not stalled (or the entropy was not recorded).
    """
    last = run.last_step
    if run.diverged is not None:
        step = run.diverged.get("step")
        return Outcome("diverged", step if isinstance(step, int) else last, run.steps)
    if run.metrics and finite(run.metrics[-1].get("loss")) is None:
        return Outcome("diverged", last, run.steps)
    if run.done is None:
        return Outcome("unfinished", last, run.steps)
    loss, entropy = train_loss(run), run.unigram_entropy
    stalled = loss is not None and entropy is not None and loss > (1 - STALL_MARGIN) * entropy
    return Outcome("stalled" if stalled else "trained", last, run.steps)


def summarise(run: Run) -> Row:
    """The run's numbers, as `Row` defines them."""
    ended = outcome(run)
    recorded = [finite(m.get("tokens_per_s")) for m in run.metrics if m["step"] > WARMUP_STEPS]
    speeds = [s for s in recorded if s is not None]
    evaluation = held_out(run)
    return Row(
        placement=run.placement,
        init=run.init,
        seed=run.seed,
        train_loss=None if ended.kind == "diverged" else train_loss(run),
        bits_per_byte=None if evaluation is None else finite(evaluation.get("bits_per_byte")),
        tokens_per_s=statistics.median(speeds) if speeds else None,
        outcome=ended,
        run=run,
    )


def fact(run: Run, key: str) -> str:
    """What each start recorded under `key`, told again wherever it changed between starts."""
    told = [_words(start[key]) for start in run.starts if start.get(key)]
    return ", then ".join(dict.fromkeys(told)) or "not recorded"


def _words(value: Any) -> str:
    """`value` in words: a dictionary as `name value, name value`, a large number with commas."""
    if value is None:
        return "not recorded"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_words(value[name])}" for name in sorted(value))
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() else f"{value:.6g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


# ---- several runs -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Spread:
    mean: float
    deviation: float | None  # sample standard deviation (n - 1); None for one run
    n: int


@dataclass(frozen=True)
class Group:
    """Rows that differ in nothing but the seed."""

    placement: str
    init: str
    variant: tuple[tuple[str, str], ...]  # other config keys in which the rows of the report differ
    rows: tuple[Row, ...]

    @property
    def counted(self) -> tuple[Row, ...]:
        """The rows that means are taken over: finished ones, else unfinished, else diverged."""
        for kinds in (("trained", "stalled"), ("unfinished",), ("diverged",)):
            rows = tuple(r for r in self.rows if r.outcome.kind in kinds)
            if rows:
                return rows
        return ()

    def over_seeds(self, number: Callable[[Row], float | None]) -> Spread | None:
        values = [v for v in map(number, self.counted) if v is not None]
        if not values:
            return None
        deviation = statistics.stdev(values) if len(values) > 1 else None
        return Spread(math.fsum(values) / len(values), deviation, len(values))

    @property
    def ending(self) -> str:
        """The outcomes of all the seeds, in words."""
        if len(self.rows) == 1:
            return str(self.rows[0].outcome)
        kinds: dict[str, list[int]] = {}
        for row in self.rows:
            kinds.setdefault(row.outcome.kind, []).append(row.outcome.step)
        if set(kinds) <= {"trained", "stalled"} and len(kinds) == 1:
            return next(iter(kinds))
        parts = []
        for kind, steps in kinds.items():
            at = f" (step{'s'[: len(steps) > 1]} {', '.join(map(str, sorted(steps)))})"
            parts.append(f"{len(steps)} {kind}{at if kind in ('diverged', 'unfinished') else ''}")
        return ", ".join(parts)


def ranked(names: Iterable[str], order: Sequence[str]) -> list[str]:
    """Distinct names: those of `order` first, in its order, then the others alphabetically."""
    return sorted(set(names), key=lambda n: (order.index(n) if n in order else len(order), n))


def differing_keys(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Config keys that differ, but for those compared -> each run's value as JSON.

    What names the data is left out where they are the same.
    """
    all_options = [run.options | {"data.fingerprint": run.fingerprint} for run in runs]
    same_data = len({run.fingerprint for run in runs}) == 1 and runs[0].fingerprint
    left_out = COMPARED_KEYS + (NAMES_OF_DATA if same_data else ())
    keys = list(dict.fromkeys(key for options in all_options for key in options))
    values = {
        key: [json.dumps(o[key]) if key in o else "absent" for o in all_options] for key in keys if key not in left_out
    }
    return {key: texts for key, texts in values.items() if len(set(texts)) > 1}


def over_seeds(rows: Sequence[Row]) -> list[Group]:
    """Groups rows that differ in nothing but the seed, ordered by placement and initialisation."""
    differing = differing_keys([row.run for row in rows])
    differing = {key: texts for key, texts in differing.items() if not is_runtime(key)}
    groups: dict[tuple[str, str, tuple[tuple[str, str], ...]], list[Row]] = {}
    for i, row in enumerate(rows):
        variant = tuple((key, texts[i].strip('"')) for key, texts in differing.items())
        groups.setdefault((row.placement, row.init, variant), []).append(row)
    placements = ranked((row.placement for row in rows), PLACEMENT_ORDER)
    inits = ranked((row.init for row in rows), INIT_ORDER)
    made = [
        Group(placement, init, variant, tuple(sorted(members, key=lambda r: r.seed)))
        for (placement, init, variant), members in groups.items()
    ]
    return sorted(made, key=lambda g: (placements.index(g.placement), inits.index(g.init), g.variant))
