"""Rows -> the table's cells, its text form for a terminal, and what limits the comparison."""

from collections import Counter
from collections.abc import Callable, Sequence

from spannorm_jax.config import is_runtime
from spannorm_jax.errors import visible
from spannorm_jax.report.rows import (
    AXES,
    Group,
    Row,
    Spread,
    differing_keys,
    fact,
    followers,
    held_out,
    in_words,
    over_seeds,
)

# ---- the table --------------------------------------------------------------------------------

_Number = Callable[[Row], float | None]
NUMBERS: dict[str, tuple[_Number, str]] = {  # of the text table too
    "train loss": (lambda row: row.train_loss, ".3f"),
    "held-out bits/byte": (lambda row: row.bits_per_byte, ".3f"),
    "tokens/s": (lambda row: row.tokens_per_s, ",.0f"),
}
MORE_NUMBERS: dict[str, tuple[_Number, str]] = {  # of the page's alone
    "held-out loss": (lambda row: row.held_out_loss, ".3f"),
    "over 4-gram": (lambda row: row.over_fourgram, "+.3f"),
    "spikes": (lambda row: row.spikes, ".0f"),
    "clipped": (lambda row: row.clipped_share, ".0%"),
    "gradient p99.9": (lambda row: row.grad_norm_p999, ".2f"),
}


def _spread(spread: Spread | None, form: str, missing: str, counted: int) -> str:
    """`2.770 ± 0.017`, and `(1 of 2)` after a mean of fewer seeds than count."""
    if spread is None:
        return missing
    text = format(spread.mean, form)
    text += "" if spread.deviation is None else f" ± {format(spread.deviation, form)}"
    return text if spread.n == counted else f"{text} ({spread.n} of {counted})"


def table_cells(
    groups: Sequence[Group], missing: str, numbers: dict[str, tuple[_Number, str]]
) -> tuple[list[str], list[list[str]]]:
    """Header and each group's cells. `seeds` and `also differs` stand only where needed."""
    numbers = {
        name: column
        for name, column in numbers.items()
        if name != "over 4-gram" or any(row.floors for group in groups for row in group.rows)
    }
    several = any(len(group.rows) > 1 for group in groups)
    varied = any(group.variant for group in groups)
    header = ["placement", "init"]
    header += ["also differs"] * varied + ["seeds"] * several + [*numbers, "outcome"]
    body = []
    for group in groups:
        count, of = len(group.counted), len(group.rows)
        cells = [group.placement, group.init]
        cells += [", ".join(in_words(key, value) for key, value in group.variant)] * varied
        cells += [str(of) if count == of else f"{count} of {of}"] * several
        cells += [_spread(group.over_seeds(number), form, missing, count) for number, form in numbers.values()]
        body.append([*cells, group.ending])
    return header, body


def is_numeric(column: str) -> bool:
    return column == "seeds" or column in NUMBERS or column in MORE_NUMBERS


def seeds_line(rows: Sequence[Row]) -> str:
    seeds = sorted({row.seed for row in rows})
    if len(seeds) == 1:
        return f"one seed ({seeds[0]})"
    return f"{len(seeds)} seeds ({', '.join(map(str, seeds))})"


def text_table(rows: Sequence[Row]) -> str:
    """An aligned table for a terminal, one line for each setting; seeds as mean ± deviation."""
    header, body = table_cells(over_seeds(rows), "-", NUMBERS)
    lines = [[visible(cell) for cell in cells] for cells in (header, *body)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = [
        "  ".join(
            cell.rjust(width) if is_numeric(name) else cell.ljust(width)
            for cell, width, name in zip(cells, widths, header, strict=True)
        ).rstrip()
        for cells in lines
    ]
    aligned.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([*aligned, f"{seeds_line(rows)}; train loss in nats/token"])


# ---- what a reader must know first --------------------------------------------------------------

_NAMED = 5  # of a long list, in a notice


def _counted(values: Sequence[str]) -> str:
    """`300 (4 runs), 600 (1 run)`"""
    counts = Counter(values)
    return ", ".join(f"{value} ({n} run{'s'[: n != 1]})" for value, n in counts.items())


def _listed(names: Sequence[str], separator: str = ", ") -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return separator.join(names[:_NAMED]) + more


def run_name(row: Row) -> str:
    return f"{row.placement} / {row.init}, seed {row.seed}"


def notices(rows: Sequence[Row], passed_over: Sequence[str] = ()) -> list[tuple[str, str]]:
    """What limits the comparison: ("warning" | "note", text), the gravest first; and why folders were passed over."""
    runs = [row.run for row in rows]
    groups = over_seeds(rows)
    warnings, notes = _of_options(rows, groups)
    warnings += [f"Left out of {row.run.folder}: {text}." for row in rows for text in row.run.damage]
    notes += [f"Passed over a folder: {why}" for why in passed_over]
    cut = [name for run in runs for name in run.cut]
    if cut:
        notes.append(f"Half a last line, which a trainer at work or killed leaves, is left out of {_listed(cut)}.")
    twice = [name for group in groups for name, n in Counter(map(run_name, group.rows)).items() if n > 1]
    if twice:
        text = f"The same setting and seed stands in several folders: {_listed(twice, '; ')}."
        warnings.append(f"{text} Comparisons by seed take the first.")
    if len({tuple(sorted({row.seed for row in group.rows})) for group in groups}) > 1:
        notes.append("Not every setting has the same seeds.")
    unknown = sum(run.unigram_entropy is None for run in runs)
    if unknown:
        notes.append(
            f"Unigram entropy not recorded for {unknown} of {len(runs)} runs: whether they learnt more than that is "
            "unknown."
        )
    evaluated = [(row, evaluation) for row in rows if (evaluation := held_out(row.run)) is not None]
    for key in ("split", "tokens"):
        values = ["not recorded" if e.get(key) is None else str(e[key]) for _, e in evaluated]
        if len(set(values)) > 1:
            warnings.append(f"Held-out {key} differ: {_counted(values)}.")
    if 0 < len(evaluated) < len(rows):
        notes.append(f"{len(evaluated)} of {len(rows)} runs have a held-out evaluation.")
    for row in rows:
        evaluation = held_out(row.run) or {}
        shared = evaluation.get("eval_overlap") or row.run.data.get("eval_overlap")
        if shared:
            warnings.append(
                f"{run_name(row)}: its held-out split shares {shared} examples with its training split, so its "
                "held-out numbers are not held out."
            )
    old = [
        f"{run_name(row)} ({evaluation['step']} of {row.run.last_step})"
        for row, evaluation in evaluated
        if evaluation["step"] != row.run.last_step
    ]
    early = [
        f"{run_name(row)} ({max(e['step'] for e in row.run.evals)} of {row.run.last_step})"
        for row in rows
        if row.run.done is not None and row.run.evals and held_out(row.run) is None
    ]
    if early:
        notes.append(f"No evaluation of the last step, so no held-out numbers: {_listed(early, '; ')}.")
    if old:
        notes.append(f"Held-out numbers are those of step ..., not of the run's last: {_listed(old, '; ')}.")
    for name, values in {
        "device": [f"{fact(run, 'num_devices')} × {fact(run, 'device')}" for run in runs],
        "git commit": [fact(run, "git_commit") for run in runs],
        "library versions": [fact(run, "versions") for run in runs],
    }.items():
        if len(set(values)) > 1:
            notes.append(f"Runs differ in {name}: {_counted(values)}.")
    return [("warning", w) for w in warnings] + [("note", n) for n in notes]


def _of_options(rows: Sequence[Row], groups: Sequence[Group]) -> tuple[list[str], list[str]]:
    """Warnings and notes on options in which the runs differ, but for those that a report compares."""
    runs = [row.run for row in rows]
    differing = differing_keys(runs)
    following = followers(differing)
    warnings, notes = [], []
    if "data.fingerprint" in differing:
        seen = [run.fingerprint or "not recorded" for run in runs]
        warnings.append(
            f"The runs did not see the same data, so their losses do not compare. Fingerprints: {_counted(seen)}."
        )
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
    warnings += _uneven(groups)
    lacking = [lacks for run in runs if (lacks := run.of_another_version[0])]
    if lacking:
        keys = list(dict.fromkeys(key for lacks in lacking for key in lacks))
        notes.append(
            f"{len(lacking)} of {len(runs)} runs are older than some options, and did what was usual before: "
            f"{_listed(keys)}."
        )
    strange = [unknown for run in runs if (unknown := run.of_another_version[1])]
    if strange:
        keys = list(dict.fromkeys(key for unknown in strange for key in unknown))
        notes.append(f"{len(strange)} of {len(runs)} runs hold options of another version: {_listed(keys)}.")
    return warnings, notes


def _uneven(groups: Sequence[Group]) -> list[str]:
    """Methods that were not run wherever others were: no best learning rate or profile is fair then."""
    cells: dict[str, set[tuple[int, int, float]]] = {}
    for group in groups:
        first = group.rows[0]
        name = f"{group.placement} / {group.init}{', ' * bool(group.other)}{group.other}"
        cells.setdefault(name, set()).add((first.depth, first.width, first.lr))
    everywhere = set().union(*cells.values())
    uneven = [
        f"{name} lacks {len(everywhere - own)} of {len(everywhere)}" for name, own in cells.items() if own < everywhere
    ]
    if not uneven:
        return []
    return [
        f"Not every method was run at the same depths, widths and learning rates: {_listed(uneven, '; ')}. "
        "Comparisons over them favour what was run more."
    ]
