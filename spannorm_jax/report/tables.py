"""A study's table for the page, for Markdown and for a terminal, the forms of numbers, and what limits comparisons."""

from collections import Counter
from collections.abc import Iterable, Sequence

import polars as pl

from spannorm_jax.config import is_runtime
from spannorm_jax.errors import visible
from spannorm_jax.report.differing import AXES, differing_keys, followers
from spannorm_jax.report.runs import NOT_RECORDED, RunFolder, ending
from spannorm_jax.report.study import ARM, Study

Header = Sequence[tuple[str, bool]]  # names of columns, and whether they hold numbers


def number(value: float | None, form: str = "+.3f") -> str:
    if value is None:
        return "–"
    text = format(value, form)
    return f"−{text[1:]}" if text.startswith("-") else text


def interval(mean: float | None, low: float | None, high: float | None, form: str = "+.3f") -> str:
    """A number with its bounds: `−0.089 [−0.113, −0.066]`."""
    return f"{number(mean, form)} {within(low, high, form)}".strip()


def within(low: float | None, high: float | None, form: str = "+.3f") -> str:
    return "" if low is None or high is None else f"[{number(low, form)}, {number(high, form)}]"


def spread(mean: float, deviation: float | None, form: str) -> str:
    """`2.770 ± 0.017`"""
    return number(mean, form) + ("" if deviation is None else f" ± {format(deviation, form.removeprefix('+'))}")


NUMBERS = {  # name in a table: column of the study's settings, form
    **{"train loss": ("train_loss", ".3f"), "held-out loss": ("held_out_loss", ".3f")},
    **{"held-out bits/byte": ("bits_per_byte", ".3f"), "over 4-gram": ("over_fourgram", "+.3f")},
    **{"held-out accuracy": ("accuracy", ".1%"), "over linear": ("over_linear", "+.1%")},
    **{f"{counted}/s": ("tokens_per_s", ",.0f") for counted in ("tokens", "images")},
    **{"spikes": ("spikes", ".0f"), "clipped": ("clipped_share", ".0%")},
    "gradient p99.9": ("grad_norm_p999", ".2f"),
}
_OF_TEXT = {"held-out bits/byte", "over 4-gram", "tokens/s"}
_OVER = {"over 4-gram": "fourgram", "over linear": "linear_accuracy"}
_IN_TEXT = ("train loss", "held-out bits/byte", "held-out accuracy", "tokens/s", "images/s")  # for a terminal


def table_cells(study: Study, names: Iterable[str] = NUMBERS) -> tuple[Header, list[list[str]]]:
    """Header and each setting's cells. `seeds` and `also differs` stand only where needed."""
    settings = study.settings.to_dicts()
    left_out = _OF_TEXT if study.counted == "images" else {"images/s"}
    left_out = left_out | ({"held-out accuracy"} if {row.counted for row in study.rows} == {"tokens"} else set())
    floors = {name for row in study.rows for name in row.floors}
    left_out = left_out | {column for column, floor in _OVER.items() if floor not in floors}
    names = [name for name in names if name not in left_out]
    several, varied = (any(map(of, settings)) for of in (lambda s: s["runs"] > 1, lambda s: s["also"]))
    texts = ["placement", "init", *["also differs"] * varied]
    header = [(name, False) for name in texts] + [(name, True) for name in [*["seeds"] * several, *names]]
    body = []
    for setting in settings:
        counted = len(setting["counted"])
        cells = [setting["placement"], setting["init"], *[setting["also"]] * varied]
        cells += [str(counted) if counted == setting["runs"] else f"{counted} of {setting['runs']}"] * several
        for column, form in (NUMBERS[name] for name in names):
            mean, n = setting[column], setting[f"{column}_n"]
            text = "–" if mean is None else spread(mean, setting[f"{column}_sd"], form)
            cells.append(text if n in (0, counted) else f"{text} ({n} of {counted})")
        body.append([*cells, ending([study.rows[i] for i in setting["rows"]])])
    return [*header, ("outcome", False)], body


def markdown(header: Header, lines: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    rows = [[name for name, _ in header], ["---:" if numeric else "---" for _, numeric in header], *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def text_table(study: Study) -> str:
    """An aligned table for a terminal, one line for each setting; seeds as mean ± deviation."""
    header, body = table_cells(study, _IN_TEXT)
    lines = [[visible(cell) for cell in cells] for cells in ([name for name, _ in header], *body)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    sides = [str.rjust if numeric else str.ljust for _, numeric in header]
    aligned = [
        "  ".join(side(cell, width) for side, cell, width in zip(sides, cells, widths, strict=True)).rstrip()
        for cells in lines
    ]
    aligned.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([*aligned, f"{seeds_line(study)}; train loss in {study.unit}"])


def seeds_line(study: Study) -> str:
    seeds = sorted(study.seeds)
    if len(seeds) == 1:
        return f"one seed ({seeds[0]})"
    return f"{len(seeds)} seeds ({', '.join(map(str, seeds))})"


_NAMED = 5  # of a long list, in a notice


def _counted(values: Sequence[str]) -> str:
    """`300 (4 runs), 600 (1 run)`"""
    counts = Counter(values)
    return ", ".join(f"{value} ({n} run{'s'[: n != 1]})" for value, n in counts.items())


def _listed(names: Sequence[str], separator: str = ", ") -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return separator.join(names[:_NAMED]) + more


def run_name(row: RunFolder) -> str:
    return f"{row.placement} / {row.init}, seed {row.seed}"


def notices(study: Study, passed_over: Sequence[str] = ()) -> list[tuple[str, str]]:
    """What limits the comparison: ("warning" | "note", text), the gravest first; and why folders were passed over."""
    runs = study.rows
    warnings, notes = _of_options(study)
    warnings += [f"Left out of {run.folder}: {text}." for run in runs for text in run.damage]
    notes += [f"Passed over a folder: {why}" for why in passed_over]
    cut = [name for run in runs for name in run.cut]
    if cut:
        notes.append(f"Half a last line, which a trainer at work or killed leaves, is left out of {_listed(cut)}.")
    again = study.runs.filter(~study.runs["first"]).unique([*ARM, "seed"], maintain_order=True)["row"]
    if len(again):
        text = (
            f"The same setting and seed stands in several folders: {_listed([run_name(runs[i]) for i in again], '; ')}"
        )
        warnings.append(f"{text}. Comparisons by seed take the first.")
    if study.runs.group_by(ARM).agg(pl.col("seed").unique().sort())["seed"].n_unique() > 1:
        notes.append("Not every setting has the same seeds.")
    unknown = sum(run.unigram_entropy is None for run in runs)
    if unknown:
        text = f"Unigram entropy not recorded for {unknown} of {len(runs)} runs"
        notes.append(f"{text}: whether they learnt more than that is unknown.")
    _of_evaluations(runs, warnings, notes)
    devices = [f"{run.fact('num_devices')} × {run.fact('device')}" for run in runs]
    commits, versions = ([run.fact(key) for run in runs] for key in ("git_commit", "versions"))
    for name, values in (("device", devices), ("git commit", commits), ("library versions", versions)):
        if len(set(values)) > 1:
            notes.append(f"Runs differ in {name}: {_counted(values)}.")
    return [("warning", text) for text in warnings] + [("note", text) for text in notes]


def _of_evaluations(runs: Sequence[RunFolder], warnings: list[str], notes: list[str]) -> None:
    """Adds what is to be said of the runs' evaluations."""
    evaluated = [(run, run.held_out) for run in runs if run.held_out is not None]
    for key in ("split", "tokens"):
        values = [NOT_RECORDED if e.get(key) is None else str(e[key]) for _, e in evaluated]
        if len(set(values)) > 1:
            warnings.append(f"Held-out {key} differ: {_counted(values)}.")
    if 0 < len(evaluated) < len(runs):
        notes.append(f"{len(evaluated)} of {len(runs)} runs have a held-out evaluation.")
    for run in runs:
        shared = (run.held_out or {}).get("eval_overlap") or run.data.get("eval_overlap")
        if shared:
            text = f"its held-out split shares {shared} examples with its training split"
            warnings.append(f"{run_name(run)}: {text}, so its held-out numbers are not held out.")
    done = [run for run in runs if run.done is not None and run.evals and run.held_out is None]
    early = [(run, max(e["step"] for e in run.evals)) for run in done]
    steps = [(run, e["step"]) for run, e in evaluated if e["step"] != run.last_step]
    for said, of in (
        ("No evaluation of the last step, so no held-out numbers", early),
        ("Held-out numbers are those of step ..., not of the run's last", steps),
    ):
        if of:
            names = [f"{run_name(run)} ({step} of {run.last_step})" for run, step in of]
            notes.append(f"{said}: {_listed(names, '; ')}.")


def _of_options(study: Study) -> tuple[list[str], list[str]]:
    """Warnings and notes on options in which the runs differ, but for those that a report compares."""
    runs = study.rows
    differing = differing_keys(runs)
    following = followers(differing)
    warnings, notes = [], []
    if "data.fingerprint" in differing:
        seen = _counted([run.fingerprint or "not recorded" for run in runs])
        warnings.append(f"The runs did not see the same data, so their losses do not compare. Fingerprints: {seen}.")
    for key, values in differing.items():
        if key == "data.fingerprint" or key in AXES:
            continue
        text = f"Runs differ in {key}: {_counted(values)}."
        if is_runtime(key):
            notes.append(text + " This changes speed or bookkeeping, not the result.")
        elif key in following:
            notes.append(f"{text} It is the same wherever these are: {following[key]}.")
        else:
            warnings.append(text)
    # Methods that were not run wherever others were: no best learning rate or profile is fair then.
    own = study.settings.group_by("method", maintain_order=True).agg(at=pl.struct("depth", "width", "lr"))
    total = study.runs.select("depth", "width", "lr").n_unique()
    lacking = ((study.methods[i].label, total - len(at)) for i, at in own.iter_rows())
    uneven = [f"{label} lacks {missing} of {total}" for label, missing in lacking if missing]
    if uneven:
        text = f"Not every method was run at the same depths, widths and learning rates: {_listed(uneven, '; ')}."
        warnings.append(f"{text} Comparisons over them favour what was run more.")
    words = ("are older than some options, and did what was usual before", "hold options of another version")
    for said, each in zip(words, zip(*(run.of_another_version for run in runs), strict=True), strict=True):
        keys = list(dict.fromkeys(key for keys in each for key in keys))
        if keys:
            notes.append(f"{sum(map(bool, each))} of {len(runs)} runs {said}: {_listed(keys)}.")
    return warnings, notes
