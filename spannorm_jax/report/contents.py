"""What the page says, as values for its template: tables, differences, definitions, facts of each run."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spannorm_jax.config import is_runtime
from spannorm_jax.report import palette, stats
from spannorm_jax.report.comparisons import Compared, Difference, at_own_rates, at_shared_rates, overall
from spannorm_jax.report.rates import at_an_end, best_lr, drifts, optimum, sensitivities
from spannorm_jax.report.rows import KEPT, LEARNT, SHORTEST_MEAN, Group, Row, differing_keys, fact
from spannorm_jax.report.stats import Factor, Interval, Optimum
from spannorm_jax.report.study import Method, Place, Study
from spannorm_jax.report.tables import MORE_NUMBERS, NUMBERS, is_numeric, run_name, seeds_line, table_cells

_DEFINITIONS = {
    "placement": "Where each block puts its norms (config key model.placement).",
    "init": "How the weights are initialised (model.init). scale-L0.5 and scale-L1 are readings of ScaleInit: a branch "
    "starts times a factor that falls with the depth to the power 0.5 (p = 0) or 1 (p = 1). With -mult this factor is "
    "a constant of the forward pass.",
    "also differs": "Other config keys in which these runs differ from one another.",
    "seeds": "Runs of this setting that the means are taken over, one per seed; “2 of 3” when the third diverged or is "
    "unfinished, and after a mean “(1 of 2)” when only one of these has such a number. ± is the sample standard "
    "deviation over seeds (n − 1).",
    "train loss": "Cross-entropy on the training data in nats per token: the mean over the last 10% of the steps "
    "taken. The loss of a step is that of the weights before its update. A run that diverged has none.",
    "held-out loss": "Cross-entropy on the held-out split in nats per token, from the newest evaluation at the highest "
    "step, or else what training measured at its last step.",
    "held-out bits/byte": "The same in bits per byte of text, which compares across tokenizers.",
    "over 4-gram": "Held-out bits/byte less those of a 4-gram (Witten-Bell, counted on the training split) on the same "
    "predictions, its contexts within the same windows. Above zero a model has learnt less than such counts hold, and "
    "a comparison says who learns short contexts first.",
    "tokens/s": "Training tokens per second over all devices: the median over the steps after the first 5, which hold "
    "compilation.",
    "spikes": f"Logged steps whose loss is more than {stats.SPIKE_HEIGHT} nats/token and more than "
    f"{stats.SPIKE_NOISE} standard deviations of the run’s own noise above the running median of "
    f"{stats.SPIKE_WINDOW} steps around them, after the first {stats.SPIKE_WINDOW // 2}.",
    "clipped": "Share of the logged steps whose gradient norm was above optim.clip_norm.",
    "gradient p99.9": "99.9th percentile of the gradient norm over the logged steps.",
    "outcome": f"trained: finished, with a train loss at least {LEARNT:.0%} below the unigram entropy of the training "
    f"data, and with at least {KEPT:.0%} of what it had learnt at its best, which is the least mean over 10% of the "
    f"steps, {SHORTEST_MEAN} at least. collapsed: finished, was {LEARNT:.0%} below, and lost it. plateau: finished, "
    "and was never so far below: it learnt little more than token frequencies. diverged: a loss or gradient became "
    "non-finite at that step. unfinished: still running, or stopped early.",
    "unigram entropy": "Of the training split’s token frequencies, in nats per token: the loss of the best model that "
    "ignores context.",
}


def contents(about: Study, said: Sequence[tuple[str, str]], root: Path, title: str) -> dict[str, Any]:
    """All that the template shows but the figures."""
    known = NUMBERS | MORE_NUMBERS
    numbers = {name: known[name] for name in _DEFINITIONS if name in known}
    header, body = table_cells(about.groups, "–", numbers)
    return {
        "title": title,
        "lead": _lead(about.rows),
        "notices": said,
        "header": [(name, is_numeric(name)) for name in header],
        "table": [
            {"cells": cells[1:-1], "placement": cells[0], "outcome": cells[-1], **_style(about, group)}
            for cells, group in zip(body, about.groups, strict=True)
        ],
        "below": _below(about),
        "baseline": about.baseline_text,
        "measure": about.measure,
        "several_lrs": about.varies("lr"),
        "confirm": ",".join(f"{key}={value}" for key, value in about.confirmed.items()),
        "chosen_on": _chosen_on(about),
        "errors": _errors(about),
        "differences": (_difference_header(about), _difference_rows(about)),
        "learning_rates": _learning_rates(about),
        "drifts": _drifts(about),
        "overall": _overall(about),
        "definitions": [(name, _DEFINITIONS[name]) for name in [*header, "unigram entropy"]],
        "runs": [_run(row, root) for group in about.groups for row in group.rows],
        "common": _common(about.rows),
    }


def _style(about: Study, group: Group) -> dict[str, str]:
    """The group's line as the figures draw it, and the class of its outcome."""
    placements = palette.ranked((m.placement for m in about.methods), palette.PLACEMENT_ORDER)
    inits = palette.ranked((m.init for m in about.methods), palette.INIT_ORDER)
    worst = {row.outcome.kind for row in group.rows} - {"trained"}
    return {
        "colour": palette.colours(placements)[placements.index(group.placement)],
        "dash": " ".join(map(str, palette.dashes(inits)[inits.index(group.init)])),
        "kind": next((k for k in ("diverged", "collapsed", "plateau", "unfinished") if k in worst), "trained"),
    }


def _number(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def interval_text(found: Interval | None) -> str:
    """A difference with its interval: `−0.089 [−0.113, −0.066]`."""
    return "–" if found is None else f"{_number(found.mean)} {_within(found)}".strip()


def _within(found: Interval) -> str:
    return "" if found.low is None or found.high is None else f"[{_number(found.low)}, {_number(found.high)}]"


def _chosen_on(about: Study) -> str:
    """On which seeds learning rates were chosen, as the end of a sentence."""
    if about.reported == about.choosing:
        return "; it is chosen on the losses that are compared, for every method alike, and so flatters them all"
    chosen, reported = (", ".join(map(str, sorted(seeds))) for seeds in (about.choosing, about.reported))
    return f"; it is chosen on seeds {chosen}, and the differences are of seeds {reported}"


def _difference_header(about: Study) -> list[tuple[str, bool]]:
    """(name, whether the column holds numbers) of the table of differences."""
    names = [("method", False), ("baseline", False)]
    names += _place_column(about)
    names += [("was", False)] * bool(about.confirmed)
    numbers = ["difference", "its seeds alone", "n", "p (Holm)"]
    if about.varies("lr"):
        numbers = ["own best lr", "baseline’s", "each at its own best", *numbers[1:], "both at the baseline’s best"]
        numbers += ["its seeds alone", "n", "p (Holm)"]
    return [*names, *((name, True) for name in numbers)]


def _difference_rows(about: Study) -> list[list[str]]:
    """The cells of each method and place; where the method was not run at the baseline's best rate, that is said."""
    shared = {(d.method, d.place): d for d in at_shared_rates(about).found}
    lines = []
    for own in at_own_rates(about).found:
        line = [own.method.label, own.partner.label, *[about.place_text(own.place)] * len(_place_column(about))]
        line += ["confirmatory" if about.confirms(own.method) else "exploratory"] * bool(about.confirmed)
        if about.varies("lr"):
            line += [_rate(about, own.method, own.place, own.lr), _rate(about, own.partner, own.place, own.partner_lr)]
            both = shared.get((own.method, own.place))
            line += [*_judgement(own), *(_judgement(both) if both else ["not run", "", "", ""])]
        else:
            line += _judgement(own)
        lines.append(line)
    return lines


def _judgement(found: Difference) -> list[str]:
    """Difference, interval of its own seeds, n, p."""
    alone, p = found.interval, found.p
    return [
        interval_text(found.pooled or alone),
        "–" if alone is None else _within(alone),
        f"{alone.n if alone else 0} of {found.pairs}",
        "–" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}",
    ]


def _errors(about: Study) -> list[str]:
    """What the intervals of differences rest on, a line a comparison, place and initialisation."""
    lines = []
    kinds: list[tuple[str, Compared]] = [("", at_own_rates(about))]
    if about.varies("lr"):
        kinds = [("each at its own best rate", at_own_rates(about))]
        kinds.append(("both at the baseline’s best", at_shared_rates(about)))
    for kind, compared in kinds:
        for (place, init), spread in compared.spreads.items():
            where = ", ".join(text for text in (kind, about.place_text(place), init) if text)
            lines.append(f"{where}: {spread.deviation:.4f} nats/token, {spread.df} degrees of freedom")
    return lines


def _rate(about: Study, method: Method, place: Place, lr: float) -> str:
    """A best learning rate, marked where a better one may lie beyond those that were run."""
    return f"{lr:g} (end)" if at_an_end(about, method, place, lr) else f"{lr:g}"


Table = tuple[list[tuple[str, bool]], list[list[str]]]  # header of (name, whether it holds numbers), lines


def _place_column(about: Study) -> list[tuple[str, bool]]:
    return [("depth, width", False)] * (about.varies("depth") or about.varies("width"))


def _learning_rates(about: Study) -> Table:
    """Of each method and place where the learning rate varies: its best one, the optimum, the sensitivity."""
    numbers = ("best run", "least loss at", "sensitivity (nats/token)")
    header = [("method", False), *_place_column(about), *((name, True) for name in numbers)]
    found = {(method, place): interval for method, place, interval in sensitivities(about)}
    lines = []
    for place in about.places if about.varies("lr") else ():
        for method in about.methods:
            best = best_lr(about, method, place)
            if best is not None:
                where = [about.place_text(place)] * len(_place_column(about))
                numbers_here = [
                    _rate(about, method, place, best),
                    _optimum(optimum(about, method, place)),
                    _bounds(found.get((method, place)), ".3f"),
                ]
                lines.append([method.label, *where, *numbers_here])
    return header, lines


def _drifts(about: Study) -> Table:
    names = [("method", False), ("of", False), ("at", False), ("with an optimum at", False)]
    lines = [
        [
            *(d.method.label, d.axis, f"{'depth' if d.axis == 'width' else 'width'} {d.fixed}"),
            *(", ".join(map(str, d.sizes)), _factor(d.factor), str(d.factor.n)),
        ]
        for d in drifts(about)
    ]
    return [*names, ("factor a doubling", True), ("seeds", True)], lines


def _overall(about: Study) -> Table:
    numbers = ("difference", "settings", "pairs", "settings in which it is lower")
    lines = [
        [o.method.label, o.partner.label, interval_text(o.interval), str(o.settings), str(o.interval.n), str(o.lower)]
        for o in overall(about)
    ]
    return [("method", False), ("baseline", False), *((name, True) for name in numbers)], lines


def _bounds(found: Interval | None, form: str) -> str:
    if found is None:
        return "–"
    mean, *bounds = (
        "" if number is None else format(abs(number), form) if number >= 0 else f"−{format(-number, form)}"
        for number in (found.mean, found.low, found.high)
    )
    return f"{mean} [{', '.join(bounds)}]" if all(bounds) else mean


def _optimum(found: Optimum | None) -> str:
    if found is None:
        return "–"
    if found.at is not None:
        return _bounds(Interval(found.at, found.low, found.high, found.n), ".2e")
    if found.low is None or found.high is None:
        beyond = [text for text, bound in (("below", found.high), ("above", found.low)) if bound is not None]
        return f"{' or '.join(beyond)} {found.high or found.low:g}" if len(beyond) == 1 else "beyond both ends"
    return f"between {found.low:.2g} and {found.high:.2g}"


def _factor(found: Factor) -> str:
    if found.mean is None:
        return f"between {found.low:.2f} and {found.high:.2f}"
    return _bounds(Interval(found.mean, found.low, found.high, found.n), ".2f")


def _below(about: Study) -> list[str]:
    levels = sorted({round(e, 4) for row in about.rows if (e := row.run.unigram_entropy) is not None})
    margin = f"{LEARNT:.0%} below the unigram entropy"
    lines = [f"Learnt: below {(1 - LEARNT) * e:.3f} nats/token, {margin} of {e:.3f}." for e in levels]
    if len({row.seed for row in about.rows}) == 1:
        lines.append("One seed: no spread is known, so small differences may be chance.")
    return lines


def _lead(rows: Sequence[Row]) -> str:
    """What the runs have in common, in a line."""
    options = [row.run.options for row in rows]
    parts = [f"{len(rows)} run{'s'[: len(rows) != 1]}", seeds_line(rows)]
    for key, form in {
        "model.depth": "{} blocks",
        "model.width": "width {}",
        "training.steps": "{} steps",
        "training.batch_size": "batches of {}",
        "data.seq_len": "sequences of {} tokens",
        "data.dataset": "{}",
    }.items():
        values = {str(o.get(key)) for o in options}
        if len(values) == 1 and None not in (o.get(key) for o in options):
            parts.append(form.format(*values))
    prints = {row.run.fingerprint for row in rows}
    if len(prints) == 1 and prints != {""}:
        parts.append(f"fingerprint {prints.pop()}")
    return " · ".join(parts)


def _run(row: Row, root: Path) -> dict[str, Any]:
    run = row.run
    ended = str(row.outcome)
    if run.diverged and run.diverged.get("where"):
        ended += f", {run.diverged['where']}"
    facts = {
        "folder": os.path.relpath(run.folder, root),
        "seed": run.seed,
        "steps": f"{run.last_step} of {run.steps}",
        "outcome": ended,
        "data fingerprint": run.fingerprint or "not recorded",
        "data": fact(run, "data"),
        "versions": fact(run, "versions"),
        "device": fact(run, "device"),
        "devices": fact(run, "num_devices"),
        "mesh": fact(run, "mesh"),
        "parameters": fact(run, "num_params"),
        "FLOPs per token": fact(run, "flops_per_token"),
        "git commit": fact(run, "git_commit"),
        "started": fact(run, "time"),
    }
    commands = list(dict.fromkeys(str(s["command"]) for s in run.starts if s.get("command")))
    return {"name": run_name(row), "command": "\n".join(commands) or "not recorded", "facts": facts}


def _common(rows: Sequence[Row]) -> dict[str, str]:
    """Options that are the same in all runs, but for those of speed and bookkeeping."""
    runs = [row.run for row in rows]
    differing = differing_keys(runs)
    return {
        key: json.dumps(value).strip('"')
        for key, value in runs[0].options.items()
        if key not in differing and not is_runtime(key)
        and len({json.dumps(run.options.get(key)) for run in runs}) == 1
    }  # fmt: skip
