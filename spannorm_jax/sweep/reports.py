"""The report of a sweep: what `spannorm_jax.report` makes of exactly its folders. The only file here that knows it."""

import sys
import tempfile
from pathlib import Path

from spannorm_jax.errors import UserError, one_line, visible
from spannorm_jax.report import __main__ as report
from spannorm_jax.report.page import read_rows
from spannorm_jax.report.tables import text_table
from spannorm_jax.run.folder import CONFIG
from spannorm_jax.sweep.expansion import Sweep
from spannorm_jax.sweep.records import REPORTS, Place


def write_report(sweep: Sweep, out: Path, table_only: bool) -> int:
    """Prints the table of the runs that have started, and writes the page unless it is `table_only`.

    Raises:
      UserError: no run has started, or a run is damaged.
    """
    started = [place for run in sweep.runs if ((place := Place(out, run.name)).workdir / CONFIG).is_file()]
    if not started:
        raise UserError(f"no run of sweep {sweep.title} has started in {out}; start them: local")
    with tempfile.TemporaryDirectory(prefix="sweep-") as links:  # the report takes one folder of runs
        for place in started:
            (Path(links) / place.name).symlink_to(place.workdir.absolute())
        if table_only:
            rows, said = read_rows(Path(links))
            print(visible(text_table(rows)))
            for kind, text in said:
                print(f"{kind}: {one_line(text)}", file=sys.stderr)
            return 0
        folder = out / REPORTS / f"{sweep.names.replace(',', '+')}-{sweep.size}"
        return report.main([links, "--out", str(folder), "--title", sweep.title])
