"""The report of a sweep: what `spannorm_jax.report` makes of exactly its folders. The only file here that knows it."""

from pathlib import Path

from spannorm_jax.config import flatten
from spannorm_jax.errors import UserError
from spannorm_jax.report import __main__ as report
from spannorm_jax.run.folder import CONFIG
from spannorm_jax.sweep.expansion import Run, Sweep
from spannorm_jax.sweep.records import REPORTS, Place


def write_report(sweep: Sweep, out: Path, table_only: bool) -> int:
    """Prints the table of the runs that have started, and writes the page unless it is `table_only`.

    Raises:
      UserError: no run has started.
    """
    started = [place for run in sweep.runs if ((place := Place(out, run.name)).workdir / CONFIG).is_file()]
    if not started:
        raise UserError(f"no run of sweep {sweep.title} has started in {out}; start them: local")
    roots = [str(place.workdir) for place in started]
    methods, baseline = sweep.compares or ("", "")
    named = [
        item
        for flag, text in (("--baseline", baseline), ("--confirm", methods))
        if text and any(_has(run, report.keys_of(text, flag)) for run in sweep.runs if Place(out, run.name) in started)
        for item in (flag, text)
    ]
    folder = out / REPORTS / f"{sweep.names.replace(',', '+')}-{sweep.size}"
    shown = ["--table"] if table_only else []
    return report.main([*roots, "--out", str(folder), "--title", sweep.title, *named, *shown])


def _has(run: Run, keys: dict[str, str]) -> bool:
    """Whether a run is of the methods that a report's --baseline or --confirm names."""
    options = flatten(run.config)
    short = {"placement": "model.placement", "init": "model.init"}
    return all(str(options[short.get(key, key)]) == value for key, value in keys.items())
