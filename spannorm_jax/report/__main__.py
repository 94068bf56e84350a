"""Tables, figures and one HTML page from the runs below a folder: python -m spannorm_jax.report runs/sweep

It reads run folders only. The same folders always give the same bytes.
"""

import sys

from spannorm_jax.command import Parser, run_command
from spannorm_jax.errors import one_line, visible
from spannorm_jax.paths import user_path
from spannorm_jax.report.page import TITLE, read_rows, write_page
from spannorm_jax.report.tables import text_table


def main(argv: list[str]) -> int:
    parser = Parser(prog="python -m spannorm_jax.report", description=__doc__)
    parser.add_argument("root", type=user_path, help="the folder that holds the runs")
    parser.add_argument("--out", type=user_path, help="where the page goes (default: ROOT/report)")
    parser.add_argument("--title", default=TITLE, help="the page's title")
    args = parser.parse_args(argv)
    rows, said = read_rows(args.root)
    page = write_page(rows, said, args.root, args.out or args.root / "report", args.title)
    print(visible(text_table(rows)))
    for kind, text in said:
        print(f"{kind}: {one_line(text)}", file=sys.stderr)
    print(page)
    return 0


if __name__ == "__main__":
    run_command(main)
