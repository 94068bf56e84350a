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
    names = ("differences", "learning_rates", "drifts", "overall")
    made = {"results": (header, lines)} | {name: shown[name] for name in names}
    return {name: table(header, lines) for name, (header, lines) in made.items() if lines}


def table(header: Sequence[tuple[str, bool]], lines: Iterable[Sequence[str]]) -> str:
    """A table with a header of (name, whether the column holds numbers)."""
    rows = [[name for name, _ in header], ["---:" if number else "---" for _, number in header], *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
