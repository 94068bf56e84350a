"""Rows -> the table's cells, its text form for a terminal, and what limits the comparison."""

from collections import Counter
from collections.abc import Sequence

from spannorm_jax.config import is_runtime
from spannorm_jax.report.rows import Group, Row, Spread, differing_keys, fact, held_out, over_seeds

# ---- the table --------------------------------------------------------------------------------


def _spread(spread: Spread | None, form: str, missing: str) -> str:
    if spread is None:
        return missing
    mean = format(spread.mean, form)
    return mean if spread.deviation is None else f"{mean} ± {format(spread.deviation, form)}"


def table_cells(rows: Sequence[Row], missing: str) -> tuple[list[str], list[tuple[Group, list[str]]]]:
    """Header and, for each group, its cells. `seeds` and `also differs` stand only where needed."""
    groups = over_seeds(rows)
    several = any(len(group.rows) > 1 for group in groups)
    varied = any(group.variant for group in groups)
    header = ["placement", "init"]
    header += ["also differs"] * varied + ["seeds"] * several
    header += ["train loss", "held-out bits/byte", "tokens/s", "outcome"]
    body = []
    for group in groups:
        count, of = len(group.counted), len(group.rows)
        cells = [group.placement, group.init]
        cells += [", ".join(f"{key}={value}" for key, value in group.variant)] * varied
        cells += [str(of) if count == of else f"{count} of {of}"] * several
        cells += [
            _spread(group.over_seeds(lambda r: r.train_loss), ".3f", missing),
            _spread(group.over_seeds(lambda r: r.bits_per_byte), ".3f", missing),
            _spread(group.over_seeds(lambda r: r.tokens_per_s), ",.0f", missing),
            group.ending,
        ]
        body.append((group, cells))
    return header, body


NUMERIC = ("seeds", "train loss", "held-out bits/byte", "tokens/s")


def seeds_line(rows: Sequence[Row]) -> str:
    seeds = sorted({row.seed for row in rows})
    if len(seeds) == 1:
        return f"one seed ({seeds[0]})"
    return f"{len(seeds)} seeds ({', '.join(map(str, seeds))})"


def text_table(rows: Sequence[Row]) -> str:
    """An aligned table for a terminal, one line for each setting; seeds as mean ± deviation."""
    header, body = table_cells(rows, missing="-")
    lines = [header, *(cells for _, cells in body)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = [
        "  ".join(
            cell.rjust(width) if name in NUMERIC else cell.ljust(width)
            for cell, width, name in zip(cells, widths, header, strict=True)
        ).rstrip()
        for cells in lines
    ]
    aligned.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([*aligned, f"{seeds_line(rows)}; train loss in nats/token"])


# ---- what a reader must know first --------------------------------------------------------------


def _counted(values: Sequence[str]) -> str:
    """`300 (4 runs), 600 (1 run)`"""
    counts = Counter(values)
    return ", ".join(f"{value} ({n} run{'s'[: n != 1]})" for value, n in counts.items())


def run_name(row: Row) -> str:
    return f"{row.placement} / {row.init}, seed {row.seed}"


def notices(rows: Sequence[Row], passed_over: Sequence[str] = ()) -> list[tuple[str, str]]:
    """What limits the comparison: ("warning" | "note", text), the gravest first; and why folders were passed over."""
    runs = [row.run for row in rows]
    warnings, notes = [], [f"Passed over a folder that is not a run's: {why}" for why in passed_over]
    differing = differing_keys(runs)
    if "data.fingerprint" in differing:
        seen = [run.fingerprint or "not recorded" for run in runs]
        warnings.append(f"The runs did not see the same data. Fingerprints: {_counted(seen)}.")
    for key, values in differing.items():
        if key == "data.fingerprint":
            continue
        text = f"Runs differ in {key}: {_counted(values)}."
        if is_runtime(key):
            notes.append(text + " This changes speed or bookkeeping, not the result.")
        else:
            warnings.append(text)
    twice = [name for group in over_seeds(rows) for name, n in Counter(map(run_name, group.rows)).items() if n > 1]
    if twice:
        warnings.append(f"The same setting and seed stands in several folders: {'; '.join(twice)}.")
    seeds = {tuple(sorted({row.seed for row in group.rows})) for group in over_seeds(rows)}
    if len(seeds) > 1:
        notes.append("Not every setting has the same seeds.")
    unknown = sum(run.unigram_entropy is None for run in runs)
    if unknown:
        notes.append(
            f"Unigram entropy not recorded for {unknown} of {len(runs)} runs: whether they stalled is unknown."
        )
    evaluations = [e for e in map(held_out, runs) if e is not None]
    for key in ("split", "tokens"):
        values = ["not recorded" if e.get(key) is None else str(e[key]) for e in evaluations]
        if len(set(values)) > 1:
            warnings.append(f"Held-out {key} differ: {_counted(values)}.")
    for row in rows:
        evaluation = held_out(row.run) or {}
        shared = evaluation.get("eval_overlap") or row.run.data.get("eval_overlap")
        if shared:
            warnings.append(
                f"{run_name(row)}: its held-out split shares {shared} examples with its training split, so its "
                "held-out numbers are not held out."
            )
        if evaluation and evaluation["step"] != row.run.last_step:
            notes.append(
                f"{run_name(row)}: held-out numbers are those of step {evaluation['step']}, not of its last, "
                f"{row.run.last_step}."
            )
    for name, values in {
        "device": [f"{fact(run, 'num_devices')} × {fact(run, 'device')}" for run in runs],
        "git commit": [fact(run, "git_commit") for run in runs],
        "library versions": [fact(run, "versions") for run in runs],
    }.items():
        if len(set(values)) > 1:
            notes.append(f"Runs differ in {name}: {_counted(values)}.")
    return [("warning", w) for w in warnings] + [("note", n) for n in notes]
