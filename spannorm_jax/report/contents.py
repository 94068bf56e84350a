"""What the page says, as values for its template: tables, differences, definitions, facts of each run."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spannorm_jax.config import is_runtime
from spannorm_jax.report import palette, stats, tables
from spannorm_jax.report.ceilings import ceilings, interval_text
from spannorm_jax.report.comparisons import OWN, SHARED, differences, errors, overall
from spannorm_jax.report.differing import differing_keys
from spannorm_jax.report.frames import GRAVEST
from spannorm_jax.report.rates import drifts, rates
from spannorm_jax.report.runs import KEPT, LEARNT, NOT_RECORDED, SHORTEST_MEAN, RunFolder, finite
from spannorm_jax.report.study import Arm, Size, Study, choosing, keys_text
from spannorm_jax.report.tables import Header, interval, markdown, run_name, seeds_line, table_cells, within

Table = tuple[Header, list[list[str]]]  # and lines
TABLES = ("results", "ceilings", "differences", "learning_rates", "drifts", "overall", "tasks")

_DEFINITIONS = {
    "placement": "Where each block puts its norms (config key model.placement).",
    "init": "How the weights are initialised (model.init). scale-L0.5 and scale-L1 are readings of ScaleInit: a branch "
    "starts times a factor that falls with the depth to the power 0.5 (p = 0) or 1 (p = 1). With -mult this factor is "
    "a constant of the forward pass.",
    "also differs": "Other config keys in which these runs differ from one another.",
    "seeds": "Runs of this setting that the means are taken over, one per seed; “2 of 3” when the third diverged or is "
    "unfinished, and after a mean “(1 of 2)” when only one of these has such a number. ± is the sample standard "
    "deviation over seeds (n − 1).",
    "train loss": "Cross-entropy on the training data in {unit}: the mean over the last 10% of the steps "
    "taken. The loss of a step is that of the weights before its update. A run that diverged has none.",
    "held-out loss": "Cross-entropy on the held-out split in {unit}, from the newest evaluation at the highest "
    "step, or else what training measured at its last step.",
    "held-out bits/byte": "The same in bits per byte of text, which compares across tokenizers.",
    "held-out accuracy": "The share of held-out images, or tokens, whose likeliest class is theirs.",
    "over linear": "Held-out accuracy less that of a linear classifier of the pixels (multinomial logistic regression, "
    "fitted to the training split) on the same images. Below zero a model has learnt less than such a classifier.",
    "over 4-gram": "Held-out bits/byte less those of a 4-gram (Witten-Bell, counted on the training split) on the same "
    "predictions, its contexts within the same windows. Above zero a model has learnt less than such counts hold, and "
    "a comparison says who learns short contexts first.",
    "images/s": "Training images per second, likewise the median over the steps after the first 5.",
    "tokens/s": "Training tokens per second over all devices: the median over the steps after the first 5, which hold "
    "compilation.",
    "spikes": f"Logged steps whose loss is more than {stats.SPIKE_HEIGHT} {{unit}} and more than "
    f"{stats.SPIKE_NOISE} standard deviations of the run’s own noise above the running median of "
    f"{stats.SPIKE_WINDOW} steps around them, after the first {stats.SPIKE_WINDOW // 2}.",
    "clipped": "Share of the logged steps whose gradient norm was above optim.clip_norm.",
    "gradient p99.9": "99.9th percentile of the gradient norm over the logged steps.",
    "outcome": f"trained: finished, with a train loss at least {LEARNT:.0%} below the unigram entropy of the training "
    f"data, and with at least {KEPT:.0%} of what it had learnt at its best, which is the least mean over 10% of the "
    f"steps, {SHORTEST_MEAN} at least. collapsed: finished, was {LEARNT:.0%} below, and lost it. plateau: finished, "
    "and was never so far below: it learnt little more than {classes} frequencies. diverged: a loss or gradient became "
    "non-finite at that step. unfinished: still running, or stopped early.",
    "unigram entropy": "Of the training split’s {classes} frequencies, in {unit}: the loss of the best model that "
    "ignores context.",
}


def contents(study: Study, said: Sequence[tuple[str, str]], root: Path, title: str) -> dict[str, Any]:
    """All that the template shows but the figures."""
    results = table_cells(study)
    shown = [*(name for name, _ in results[0]), "unigram entropy"]
    words = {"unit": study.unit, "classes": "token" if study.counted == "tokens" else "class"}
    return {
        **{"title": title, "lead": _lead(study), "notices": said, "below": _below(study)},
        **{"results": results, "looks": _looks(study), "chosen_on": _chosen_on(study), "errors": _errors(study)},
        **{
            "unit": study.unit,
            "baseline": study.baseline_text,
            "measure": study.measure,
            "several_lrs": study.varies("lr"),
        },
        **{"confirm": keys_text(study.confirmed), "differences": _differences(study), "drifts": _drifts(study)},
        **{"ceilings": _ceilings(study), "ladder_seeds": study.ladder_seeds},
        **{"learning_rates": _learning_rates(study), "overall": _overall(study)},
        "tasks": _tasks(study),
        "definitions": [(name, _DEFINITIONS[name].format(**words)) for name in shown],
        "runs": [_run(study.rows[i], root) for i in study.runs["row"]],
        "common": _common(study.rows),
    }


def in_markdown(shown: dict[str, Any]) -> dict[str, str]:
    """Name of a table of `contents` -> Markdown, for a document or an issue; one without lines is left out."""
    return {name: markdown(*shown[name]) for name in TABLES if shown[name][1]}


def _looks(study: Study) -> list[dict[str, str]]:
    """Of each setting the line as the figures draw it, and its gravest outcome."""
    placements, inits = study.placements, study.inits
    colours = dict(zip(placements, palette.colours(placements), strict=True))
    dashes = dict(zip(inits, palette.dashes(inits), strict=True))
    looks = []
    for setting in study.settings.iter_rows(named=True):
        kinds = {study.rows[i].outcome for i in setting["rows"]}
        look = {"colour": colours[setting["placement"]], "dash": " ".join(map(str, dashes[setting["init"]]))}
        looks.append(look | {"kind": next(kind for kind in GRAVEST if kind in kinds)})
    return looks


def _header(names: Sequence[str], numbers: Sequence[str]) -> Header:
    return [*((name, False) for name in names), *((name, True) for name in numbers)]


def _chosen_on(study: Study) -> str:
    """On which seeds learning rates were chosen, as the end of a sentence."""
    choosers = choosing(study.runs)
    if study.reported == choosers:
        return "; it is chosen on the losses that are compared, for every method alike, and so flatters them all"
    chosen, reported = (", ".join(map(str, sorted(seeds))) for seeds in (choosers, study.reported))
    return f"; it is chosen on seeds {chosen}, and the differences are of seeds {reported}"


def _differences(study: Study) -> Table:
    """A line a method and size; where the method was not run at the baseline's best rate, that is said."""
    several, named = study.varies("lr"), bool(study.confirmed)
    names = ["method", "baseline", *_size_column(study), *["was"] * named]
    known = ["its seeds alone", "n", "p (Holm)"]
    numbers = ["difference", *known]
    if several:
        numbers = ["own best lr", "baseline’s", "each at its own best", *known, "both at the baseline’s best", *known]
    lines: dict[tuple[int, ...], list[str]] = {}
    for d in differences(study).iter_rows(named=True):
        at, theirs = ((d[key], d["depth"], d["width"]) for key in ("method", "baseline"))
        if d["comparison"] == OWN:
            lines[at] = [study.methods[at[0]].label, study.methods[theirs[0]].label, *_size(study, at)]
            lines[at] += ["confirmatory" if d["named"] else "exploratory"] * named
            lines[at] += [_rate(study, at, d["lr"]), _rate(study, theirs, d["baseline_lr"])] if several else []
        pooled = "" if d["pooled_low"] is None else "pooled_"
        lines[at] += [
            interval(d["difference"], d[f"{pooled}low"], d[f"{pooled}high"]),
            "–" if d["difference"] is None else within(d["low"], d["high"]),
            f"{d['n']} of {d['pairs']}",
            "–" if d["p"] is None else "< 0.001" if d["p"] < 0.001 else f"{d['p']:.3f}",
        ]
    header = _header(names, numbers)
    return header, [line + ["not run", "", "", ""] * (len(line) < len(header)) for line in lines.values()]


def _errors(study: Study) -> list[str]:
    """What the intervals of differences rest on, a line a comparison, size and initialisation."""
    shown = {OWN: "each at its own best rate" * study.varies("lr"), SHARED: "both at the baseline’s best"}
    lines = []
    for kind, (size, init), spread in errors(study):
        at = ", ".join(text for text in (shown[kind], study.size_text(size), init) if text)
        lines.append(f"{at}: {spread.deviation:.4f} {study.unit}, {spread.df} degrees of freedom")
    return lines


def _rate(study: Study, at: Arm, lr: float) -> str:
    """A best learning rate, marked where a better one may lie beyond those that were run."""
    return f"{lr:g} (end)" if study.at_an_end(at, lr) else f"{lr:g}"


def _size_column(study: Study) -> list[str]:
    return ["depth, width"] * (study.varies("depth") or study.varies("width"))


def _size(study: Study, at: Sequence[int]) -> list[str]:
    return [study.size_text(Size(*at[1:]))] * len(_size_column(study))


def _ceilings(study: Study) -> Table:
    """Of each method and size of a bisection where its ceiling lies."""
    lines = []
    for *at, low, high, settled, runs, below in ceilings(study).iter_rows():
        interval = interval_text(low, high) + (" so far" if not settled else "")
        lines.append([study.methods[at[0]].label, *_size(study, at), interval, str(runs), below or "–"])
    return _header(["method", *_size_column(study)], ("ceiling", "runs", "fails below it at")), lines


def _learning_rates(study: Study) -> Table:
    """Of each method and size where the learning rate varies: its best one, the optimum, the sensitivity."""
    numbers = ("best run", "least loss at", f"sensitivity ({study.unit})")
    lines = []
    for *at, best, kind, lr, low, high, _, mean, least, most, _ in rates(study).drop_nulls("best").iter_rows():
        optimum = "–" if kind is None else _optimum(lr, low, high)
        cells = [_rate(study, tuple(at), best), optimum, interval(mean, least, most, ".3f")]
        lines.append([study.methods[at[0]].label, *_size(study, at), *cells])
    return _header(["method", *_size_column(study)], numbers), lines if study.varies("lr") else []


def _optimum(at: float | None, low: float | None, high: float | None, form: str = ".2e", rough: str = ".2g") -> str:
    if at is not None:
        return interval(at, low, high, form)
    if low is not None and high is not None:
        return f"between {low:{rough}} and {high:{rough}}"
    return f"above {low:g}" if low is not None else f"below {high:g}" if high is not None else "beyond both ends"


def _drifts(study: Study) -> Table:
    lines = []
    for d in drifts(study):
        f, sizes = d["factor"], ", ".join(map(str, d["sizes"]))
        factor = _optimum(f.at, f.low, f.high, ".2f", ".2f")
        lines.append([d["method"], d["axis"], f"{d['other']} {d['fixed']}", sizes, factor, str(f.n)])
    return _header(("method", "of", "at", "with an optimum at"), ("factor a doubling", "seeds")), lines


def _overall(study: Study) -> Table:
    lines = [
        [m.label, baseline.label, interval(i.mean, i.low, i.high), *map(str, (settings, i.n, lower))]
        for m, baseline, i, settings, lower in overall(study)
    ]
    numbers = ("difference", "settings", "pairs", "settings in which it is lower")
    return _header(("method", "baseline"), numbers), lines


def _tasks(study: Study) -> Table:
    lines = []
    for run in (study.rows[i] for i in study.runs["row"]):
        for score in run.tasks:
            value, error, chance = (finite(score.get(key)) for key in ("value", "stderr", "chance"))
            own = "–" if value is None else tables.spread(value, error, ".4f")
            cells = [f"{score.get(key)}" for key in ("task", "metric", "step")]
            lines.append([run_name(run), *cells, own, tables.number(chance, ".4f"), str(score.get("n"))])
    return _header(("run", "task", "metric"), ("step", "value", "chance", "documents")), lines


def _below(study: Study) -> list[str]:
    levels = sorted({round(e, 4) for row in study.rows if (e := row.unigram_entropy) is not None})
    margin = f"{LEARNT:.0%} below the unigram entropy"
    lines = [f"Learnt: below {(1 - LEARNT) * e:.3f} {study.unit}, {margin} of {e:.3f}." for e in levels]
    if len(study.seeds) == 1:
        lines.append("One seed: no spread is known, so small differences may be chance.")
    return lines


_COMMON = {  # options that a page begins with, where all runs have one value
    **{"model.depth": "{} blocks", "model.width": "width {}", "training.steps": "{} steps"},
    **{"training.batch_size": "batches of {}", "data.seq_len": "sequences of {} tokens", "data.dataset": "{}"},
}


def _lead(study: Study) -> str:
    """What the runs have in common, in a line."""
    options = [row.options | {"fingerprint": row.fingerprint or None} for row in study.rows]
    parts = [f"{len(options)} run{'s'[: len(options) != 1]}", seeds_line(study)]
    for key, form in (_COMMON | {"fingerprint": "fingerprint {}"}).items():
        values = {o.get(key) for o in options}
        if len(values) == 1 and values != {None}:
            parts.append(form.format(*values))
    return " · ".join(parts)


_FACTS = {  # of starts, by what the page calls them
    **{"data": "data", "versions": "versions", "device": "device", "devices": "num_devices", "mesh": "mesh"},
    **{"parameters": "num_params", "git commit": "git_commit", "started": "time"},
}


def _run(run: RunFolder, root: Path) -> dict[str, Any]:
    where = (run.diverged or {}).get("where")
    facts = {"folder": os.path.relpath(run.folder, root), "seed": run.seed, "steps": f"{run.last_step} of {run.steps}"}
    facts |= {"outcome": f"{run.ended}, {where}" if where else run.ended}
    facts |= {"data fingerprint": run.fingerprint or NOT_RECORDED}
    each = run.counted[:-1]
    facts |= {name: run.fact(key) for name, key in (_FACTS | {f"FLOPs per {each}": f"flops_per_{each}"}).items()}
    commands = list(dict.fromkeys(str(start["command"]) for start in run.starts if start.get("command")))
    return {"name": run_name(run), "command": "\n".join(commands) or NOT_RECORDED, "facts": facts}


def _common(runs: Sequence[RunFolder]) -> dict[str, str]:
    """Options that are the same in all runs, but for those of speed and bookkeeping."""
    differing = differing_keys(runs)
    return {
        key: json.dumps(value).strip('"')
        for key, value in runs[0].options.items()
        if key not in differing and not is_runtime(key)
        and len({json.dumps(run.options.get(key)) for run in runs}) == 1
    }  # fmt: skip
