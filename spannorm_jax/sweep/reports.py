"""Reports on exactly a sweep's folders. Of sweep/ this file and `bisection` alone import `spannorm_jax.report`."""

from pathlib import Path

from spannorm_jax.errors import UserError
from spannorm_jax.report import __main__ as report
from spannorm_jax.run.folder import CONFIG
from spannorm_jax.sweep.expansion import Sweep
from spannorm_jax.sweep.records import REPORTS, RunPlace


def write_report(sweep: Sweep, out: Path, table_only: bool) -> int:
    """Prints the table of the runs that have started, and writes the page unless it is `table_only`.

    Raises:
      UserError: no run has started.
    """
    started = [place for run in sweep.runs if ((place := RunPlace(out, run.name)).workdir / CONFIG).is_file()]
    if not started:
        raise UserError(f"no run of sweep {sweep.title} has started in {out}; start them: local")
    roots = [str(place.workdir) for place in started]
    placements = {run.config.model.placement for run in sweep.runs if RunPlace(out, run.name) in started}
    named: list[str] = []
    if sweep.compares and placements.issuperset(sweep.compares):
        named = ["--confirm", f"placement={sweep.compares[0]}", "--baseline", f"placement={sweep.compares[1]}"]
    if sweep.bisects:
        rates = sorted({run.config.optim.lr for run in sweep.runs})
        seeds = len({run.config.seed for run in sweep.runs})
        named += ["--ladder", ",".join(map(str, rates)), "--seeds", str(seeds)]
    folder = out / REPORTS / f"{sweep.names.replace(',', '+')}-{sweep.size}"
    shown = ["--table"] if table_only else []
    return report.main([*roots, "--out", str(folder), "--title", sweep.title, *named, *shown])
