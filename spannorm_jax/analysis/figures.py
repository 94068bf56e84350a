"""Draws records of the signal against the block: python -m spannorm_jax.analysis.figures RECORDS... --out DIR

A record is what analysis.signal (--out) or analysis.theory (--json) makes: a file of one JSON line, or of several. One
figure a quantity, a panel for each initialisation, ffn, depth, width, tokens and step, a colour for each placement.
What was measured is a line, what is predicted of it is dashed.
"""

import json
from pathlib import Path
from typing import Any

from spannorm_jax.analysis.quantities import QUANTITIES, init_in
from spannorm_jax.command import Parser, run_command
from spannorm_jax.errors import UserError
from spannorm_jax.paths import user_path


def main(argv: list[str]) -> int:
    parser = Parser(prog="python -m spannorm_jax.analysis.figures", description=__doc__)
    parser.add_argument("records", metavar="RECORD", nargs="+", type=user_path, help="a file of JSON lines")
    parser.add_argument("--out", required=True, type=user_path, help="folder that the figures go into, as SVG and PNG")
    args = parser.parse_args(argv)
    lines = [line for path in args.records for line in read_lines(path)]
    from spannorm_jax.analysis.drawing import draw  # and with it the libraries of figures

    for path in draw(lines, args.out):
        print(path)
    return 0


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file: `about` (placement, init, ffn, depth, width, tokens, step, kind), and lists by key.

    Raises:
      UserError: it cannot be read, or holds no such record.
    """
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        return [_record(record) for record in records]
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is no record of analysis.signal or analysis.theory ({error}); give what --out or --json made"
        ) from error


def _record(record: dict[str, Any]) -> dict[str, Any]:
    measured = "settings" in record
    model = record["config"]["model"] if measured else record
    about = {key: model[key] for key in ("placement", "init", "ffn", "depth", "width")}
    about |= {"init": init_in(model)} if measured else {}
    about |= {"tokens": (record["settings"] if measured else record)["tokens"]}
    about |= {"step": record["step"] if measured else 0, "kind": "measured" if measured else "predicted"}
    return {"about": about, **{key: record[key] for key in QUANTITIES if key in record}}


if __name__ == "__main__":
    run_command(main)
