"""What the page says, as values for its template: tables, differences, definitions, facts of each run."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spannorm_jax.config import is_runtime
from spannorm_jax.report import palette, stats
from spannorm_jax.report.rows import STALL_MARGIN, Group, Row, differing_keys, fact
from spannorm_jax.report.stats import Interval
from spannorm_jax.report.study import Difference, Study, best_lr, differences, drifts, optimum, overall, sensitivities
from spannorm_jax.report.tables import MORE_NUMBERS, NUMBERS, is_numeric, run_name, seeds_line, table_cells

_DEFINITIONS = {
    "placement": "Where each block puts its norms (config key model.placement).",
    "init": "How the weights are initialised (model.init).",
    "also differs": "Other config keys in which these runs differ from one another.",
    "seeds": "Runs of this setting that the means are taken over, one per seed; “2 of 3” when the third diverged or is "
    "unfinished, and after a mean “(1 of 2)” when only one of these has such a number. ± is the sample standard "
    "deviation over seeds (n − 1).",
    "train loss": "Cross-entropy on the training data in nats per token: the mean over the last 10% of the steps "
    "taken. The loss of a step is that of the weights before its update. A run that diverged has none.",
    "held-out loss": "Cross-entropy on the held-out split in nats per token, from the newest evaluation at the highest "
    "step, or else what training measured at its last step.",
    "held-out bits/byte": "The same in bits per byte of text, which compares across tokenizers.",
    "tokens/s": "Training tokens per second over all devices: the median over the steps after the first 5, which hold "
    "compilation.",
    "spikes": f"Logged steps whose loss is more than {stats.SPIKE_HEIGHT} nats/token above the running median of "
    f"{stats.SPIKE_WINDOW} steps around them, after the first {stats.SPIKE_WINDOW // 2}. Small batches are noisy: "
    "compare it between settings, not with zero.",
    "clipped": "Share of the logged steps whose gradient norm was above optim.clip_norm.",
    "gradient p99.9": "99.9th percentile of the gradient norm over the logged steps.",
    "outcome": "trained: finished, and not stalled. stalled: finished, but the train loss is not at least "
    f"{STALL_MARGIN:.0%} below the unigram entropy of the training data, so the model has learnt little more than "
    "token frequencies. diverged: a loss or gradient became non-finite at that step. unfinished: still running, or "
    "stopped early.",
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
        "varied_place": about.varies("depth") or about.varies("width"),
        "differences": [_difference(about, own, shared) for own, shared in differences(about)],
        "learning_rates": _learning_rates(about),
        "drifts": [
            {
                "method": d.method.label,
                "axis": d.axis,
                "fixed": f"{'depth' if d.axis == 'width' else 'width'} {d.fixed}",
                "sizes": ", ".join(map(str, d.sizes)),
                "factor": _bounds(d.factor, ".2f"),
                "n": str(d.factor.n),
            }
            for d in drifts(about)
        ],
        "overall": [
            {
                "method": o.method.label,
                "partner": o.partner.label,
                "difference": _interval(o.interval),
                "settings": o.settings,
                "pairs": o.interval.n,
                "lower": o.lower,
            }
            for o in overall(about)
        ],
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
        "kind": next((k for k in ("diverged", "stalled", "unfinished") if k in worst), "trained"),
    }


def _number(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def _interval(found: Interval | None) -> str:
    if found is None:
        return "–"
    if found.low is None or found.high is None:
        return _number(found.mean)
    return f"{_number(found.mean)} [{_number(found.low)}, {_number(found.high)}]"


def _difference(about: Study, own: Difference, shared: Difference | None) -> dict[str, Any]:
    def cells(found: Difference) -> dict[str, str]:
        count = found.interval.n if found.interval else 0
        return {"difference": _interval(found.interval), "n": f"{count} of {found.pairs}"}

    return {
        "method": own.method.label,
        "partner": own.partner.label,
        "place": about.place_text(own.place),
        "lr": f"{own.lr:g}",
        "partner_lr": f"{own.partner_lr:g}",
        "own": cells(own),
        "shared": cells(shared) if shared else None,
    }


def _learning_rates(about: Study) -> list[dict[str, str]]:
    """Of each method and place where the learning rate varies: its best one, the optimum's and the sensitivity's
    interval."""
    if not about.varies("lr"):
        return []
    found = {(method, place): interval for method, place, interval in sensitivities(about)}
    lines = []
    for place in about.places:
        for method in about.methods:
            best, least = best_lr(about, method, place), optimum(about, method, place)
            if best is not None:
                lines.append(
                    {
                        "method": method.label,
                        "place": about.place_text(place),
                        "best": f"{best:g}",
                        "optimum": _bounds(least, ".2e"),
                        "sensitivity": _bounds(found.get((method, place)), ".3f"),
                    }
                )
    return lines


def _bounds(found: Interval | None, form: str) -> str:
    if found is None:
        return "–"
    mean = format(found.mean, form)
    if found.low is None or found.high is None:
        return mean
    return f"{mean} [{format(found.low, form)}, {format(found.high, form)}]"


def _below(about: Study) -> list[str]:
    levels = sorted({round(e, 4) for row in about.rows if (e := row.run.unigram_entropy) is not None})
    margin = f"{STALL_MARGIN:.0%} below the unigram entropy"
    lines = [f"Stalled: above {(1 - STALL_MARGIN) * e:.3f} nats/token, {margin} of {e:.3f}." for e in levels]
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
