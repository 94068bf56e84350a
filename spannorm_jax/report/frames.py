"""The tables that figures are drawn from, and runs.csv: what a study says, in columns."""

import math
from collections.abc import Sequence
from typing import Any

import polars as pl

from spannorm_jax.report import stats
from spannorm_jax.report.comparisons import at_own_rates, at_shared_rates
from spannorm_jax.report.palette import OUTCOME_ORDER
from spannorm_jax.report.rates import best_lr, optimum, sensitivities
from spannorm_jax.report.stats import Interval
from spannorm_jax.report.study import Method, Place, Study, method_of

_CROWD = 9  # methods in one panel
_GRAVEST = ("diverged", "collapsed", "plateau", "unfinished", "trained")


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


def _names(method: Method, place: Place) -> dict[str, object]:
    return {
        "placement": method.placement,
        "init": method.init,
        "other": method.other,
        "depth": place.depth,
        "width": place.width,
    }


def runs_table(about: Study) -> pl.DataFrame:
    """One line a run: what runs.csv holds. `capped_loss` is the loss that figures over learning rates show."""
    best = {(method, place): best_lr(about, method, place) for method, place, _ in about.cells}
    lines = []
    for group in about.groups:
        method = method_of(group)
        for row in group.rows:
            place = Place(row.depth, row.width)
            per_step, per_token = row.run.tokens_per_step, row.run.flops_per_token
            tokens = None if per_step is None else row.run.last_step * per_step
            capped = about.capped(row)
            lines.append(
                _names(method, place)
                | {
                    "lr": float(row.lr),
                    "seed": row.seed,
                    "outcome": row.outcome.kind,
                    "last_step": row.run.last_step,
                    "steps": row.run.steps,
                    "tokens": tokens,
                    "flops": None if tokens is None or per_token is None else tokens * per_token,
                    "train_loss": row.train_loss,
                    "held_out_loss": row.held_out_loss,
                    "bits_per_byte": row.bits_per_byte,
                    "loss_at_init": row.loss_at_init,
                    "capped_loss": None if capped is None or math.isinf(capped) else capped,
                    "best_lr": best[method, place] == row.lr,
                    "spikes": row.spikes,
                    "clipped_share": row.clipped_share,
                    "grad_norm_p999": row.grad_norm_p999,
                    "tokens_per_s": row.tokens_per_s,
                    "fingerprint": row.run.fingerprint,
                    "folder": str(row.run.folder),
                }
            )
    return pl.DataFrame(lines, infer_schema_length=None)


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
    lines = [{"level": level, "name": f"{name} {level}"} for name, level in sorted(found, key=lambda pair: pair[1])]
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


_INTERVAL: dict[str, Any] = {
    **{"placement": pl.String, "init": pl.String, "other": pl.String, "depth": pl.Int64, "width": pl.Int64},
    **{"method": pl.String, "low": pl.Float64, "high": pl.Float64, "seeds": pl.Int64},
}


def _interval(method: Method, place: Place, found: Interval, column: str) -> dict[str, object]:
    numbers = {column: found.mean, "low": found.low, "high": found.high, "seeds": found.n}
    return _names(method, place) | {"method": method.label} | numbers


def optima_table(about: Study) -> pl.DataFrame:
    """Of each method and place the learning rate of least loss with its interval, where the sweep encloses it.

    `lr` is null where a neighbour of the best rate failed: it then lies somewhere between `low` and `high`.
    """
    lines = []
    for place in about.places:
        for method in about.methods:
            found = optimum(about, method, place)
            if found is not None and found.kind != "end":
                numbers = {"lr": found.at, "low": found.low, "high": found.high, "seeds": found.n}
                lines.append(_names(method, place) | {"method": method.label} | numbers)
    return pl.DataFrame(lines, schema=_INTERVAL | {"lr": pl.Float64})


def sensitivity_table(about: Study) -> pl.DataFrame:
    lines = [_interval(method, place, found, "sensitivity") for method, place, found in sensitivities(about)]
    return pl.DataFrame(lines, schema=_INTERVAL | {"sensitivity": pl.Float64})


OWN, SHARED = "each at its own best learning rate", "both at the baseline's best"


def differences_table(about: Study) -> pl.DataFrame:
    """Of each method and place its difference from the baseline, of both comparisons where the learning rate varies.

    Its bounds are those of the pooled error, or where there is none those of its own seeds.
    """
    lines = []
    for kind, compared in ((OWN, at_own_rates), (SHARED, at_shared_rates)):
        for d in compared(about).found if kind == OWN or about.varies("lr") else ():
            if d.interval is not None:
                line = _interval(d.method, d.place, d.pooled or d.interval, "difference")
                panel = ", ".join(_place_words(about, d.place))
                named = {"baseline": d.partner.label, "comparison": kind, "panel": panel}
                lines.append(line | named | {"error": "pooled" if d.pooled else "its own seeds'"})
    order = {m.label: i for i, m in enumerate(about.methods)}
    lines.sort(key=lambda line: (line["depth"], line["width"], order[str(line["method"])]))
    texts = ("baseline", "comparison", "panel", "error")
    return pl.DataFrame(lines, schema=_INTERVAL | {"difference": pl.Float64} | dict.fromkeys(texts, pl.String))


def outcomes_table(about: Study) -> pl.DataFrame:
    """One line for each method, place and learning rate of the study, whether it was run or not.

    `outcome` is the gravest over seeds, `text` the letters of all, and how many had each where they differ.
    """
    lrs = sorted({lr for _, _, lr in about.cells})
    lines = []
    for method in about.methods:
        for place in about.places:
            for lr in lrs:
                kinds = [row.outcome.kind for row in about.cells.get((method, place, lr), {}).values()]
                worst = next((kind for kind in _GRAVEST if kind in kinds), "unfinished")
                counts = [f"{n}{kind[0].upper()}" for kind in _GRAVEST if (n := kinds.count(kind))]
                seen = ", ".join(f"{n} {kind}" for kind in OUTCOME_ORDER if (n := kinds.count(kind)))
                lines.append(
                    _names(method, place)
                    | {
                        "lr": float(lr),
                        "method": method.label,
                        "place": about.place_text(place),
                        "outcome": worst,
                        "text": " ".join(counts) or "–",
                        "seen": seen or "not run",
                    }
                )
    return pl.DataFrame(lines, infer_schema_length=None)


def profile_table(about: Study) -> pl.DataFrame:
    """Of each method the share of all its runs at or below a loss: those that did not finish reach none."""
    each = {}
    for method in about.methods:
        runs = [row for (m, _, _), rows in about.cells.items() if m == method for row in rows.values()]
        reached = (about.loss(row) for row in runs)
        each[method] = (len(runs), *stats.share_below([math.inf if loss is None else loss for loss in reached]))
    everywhere = [loss for _, losses, _ in each.values() for loss in losses]
    lines = []
    for method, (count, losses, shares) in each.items() if everywhere else ():
        first, last = (min(everywhere), 0.0), (max(everywhere), shares[-1] if shares else 0.0)
        for loss, share in [first, *zip(losses, shares, strict=True), last]:
            lines.append(_names(method, about.places[0]) | {"loss": loss, "share": share, "runs": count})
    return pl.DataFrame(lines, infer_schema_length=None)
