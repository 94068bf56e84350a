"""Tables, figures and one HTML page from the runs in and below folders: python -m spannorm_jax.report runs/sweep

It reads run folders only. The same folders always give the same bytes.
"""

import itertools
import re
import sys

from spannorm_jax.command import Parser, run_command
from spannorm_jax.errors import UserError, one_line, visible


def keys_of(text: str, flag: str) -> dict[str, str]:
    """`placement=pre,init=plain` as a dictionary; a value may hold commas. Raises UserError for another form."""
    parts = [part.partition("=") for part in re.split(r",(?=[\w.]+=)", text)]
    if not all(key and equals and value for key, equals, value in parts):
        raise UserError(f"{flag} {one_line(text)!r} is not of the form placement=pre,init=plain")
    return {key: value for key, _, value in parts}


def rates_of(text: str) -> list[float]:
    """`1e-3,1e-2` as numbers. Raises UserError if they do not ascend from above zero."""
    try:
        rates = [float(rate) for rate in text.split(",")]
    except ValueError:
        rates = [0.0]
    if any(not low < high for low, high in itertools.pairwise([0.0, *rates])):
        raise UserError(f"--ladder {one_line(text)!r} is no list of ascending learning rates, as in 1e-3,1e-2")
    return rates


def main(argv: list[str]) -> int:
    parser = Parser(prog="python -m spannorm_jax.report", description=__doc__)
    parser.add_argument("roots", metavar="ROOT", nargs="+", help="a run, or a folder that holds runs")
    parser.add_argument("--out", help="where the files go (default: ROOT/report)")
    parser.add_argument("--title", help="the page's title")
    form = "KEY=VALUE,..."
    told = "what methods are compared with, as config keys: placement=pre compares each with PreNorm at its own "
    told += "initialisation (default: placement=pre,init=plain, or else the first method; of readings of one "
    told += "initialisation, the first placement at each)"
    parser.add_argument("--baseline", metavar=form, help=told)
    told = "methods whose comparison with the baseline was named before the runs; the others are exploratory"
    parser.add_argument("--confirm", metavar=form, help=told)
    told = "learning rates of a bisection, ascending: adds the table and figures of ceilings"
    parser.add_argument("--ladder", metavar="RATE,...", type=rates_of, default=(), help=told)
    parser.add_argument("--seeds", metavar="N", type=int, default=1, help="with which a rate of it has to train")
    parser.add_argument("--table", action="store_true", help="print the table, and write nothing")
    args = parser.parse_args(argv)
    if args.out is None and len(args.roots) > 1 and not args.table:
        raise UserError("several folders have no one place for their report; say --out FOLDER")
    baseline = None if args.baseline is None else keys_of(args.baseline, "--baseline")
    confirmed = None if args.confirm is None else keys_of(args.confirm, "--confirm")

    from spannorm_jax.report import page  # and with it the libraries of tables and figures
    from spannorm_jax.report.tables import text_table
    from spannorm_jax.run.folder import run_folder_path

    args.roots = [run_folder_path(root) for root in args.roots]
    study, said = page.read_study(args.roots, baseline, confirmed, args.ladder, args.seeds)
    written = None
    if not args.table:
        out = run_folder_path(args.out) if args.out else args.roots[0] / "report"
        written = page.write_files(study, said, args.roots, out, args.title or page.TITLE)
    print(visible(text_table(study)))
    for kind, text in said:
        print(f"{kind}: {one_line(text)}", file=sys.stderr)
    if written:
        print(written)
    return 0


if __name__ == "__main__":
    run_command(main)
