"""The page's tables in Markdown, for a document or an issue."""

from collections.abc import Iterable, Sequence
from typing import Any


def tables(shown: dict[str, Any]) -> dict[str, str]:
    """Name of a table -> Markdown, of what `contents` holds: `results`, `differences`, `learning_rates`, `drifts`,
    `overall`.

    A table without lines is left out.
    """
    header = [("placement", False), *shown["header"][1:]]
    lines = [[row["placement"], *row["cells"], row["outcome"]] for row in shown["table"]]
    made = {"results": (header, lines)}
    places = [("depth, width", False)] if shown["varied_place"] else []
    place = [lambda line: line["place"]] if places else []
    if shown["several_lrs"]:
        columns = [("own best lr", True), ("baseline’s", True), ("each at its own best", True), ("n", True)]
        columns += [("both at the baseline’s best", True), ("n", True)]
    else:
        columns = [("difference", True), ("n", True)]
    made["differences"] = (
        [("method", False), ("baseline", False), *places, *columns],
        [
            [d["method"], d["partner"], *(get(d) for get in place), *_difference(d, shown["several_lrs"])]
            for d in shown["differences"]
        ],
    )
    made["learning_rates"] = (
        [("method", False), *places, ("best run", True), ("least loss at", True), ("sensitivity", True)],
        [
            [r["method"], *(get(r) for get in place), r["best"], r["optimum"], r["sensitivity"]]
            for r in shown["learning_rates"]
        ],
    )
    made["drifts"] = (
        [
            *(("method", False), ("of", False), ("at", False), ("with an optimum at", False)),
            *(("factor a doubling", True), ("seeds", True)),
        ],
        [[d[key] for key in ("method", "axis", "fixed", "sizes", "factor", "n")] for d in shown["drifts"]],
    )
    made["overall"] = (
        [
            *(("method", False), ("baseline", False), ("difference", True), ("settings", True), ("pairs", True)),
            ("settings in which it is lower", True),
        ],
        [
            [o["method"], o["partner"], o["difference"], str(o["settings"]), str(o["pairs"]), str(o["lower"])]
            for o in shown["overall"]
        ],
    )
    return {name: table(header, lines) for name, (header, lines) in made.items() if lines}


def _difference(d: dict[str, Any], several_lrs: bool) -> Iterable[str]:
    own, shared = d["own"], d["shared"] or {"difference": "not run", "n": ""}
    if not several_lrs:
        return own["difference"], own["n"]
    return d["lr"], d["partner_lr"], own["difference"], own["n"], shared["difference"], shared["n"]


def table(header: Sequence[tuple[str, bool]], lines: Iterable[Sequence[str]]) -> str:
    """A table with a header of (name, whether the column holds numbers)."""
    rows = [[name for name, _ in header], ["---:" if number else "---" for _, number in header], *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
