"""Run folders -> a report: one HTML page that needs nothing beside it, its figures for print, and its tables.

    report.html         opens without a network: the figures' library, data and definitions are in it
    NAME.svg, NAME.png  each figure for print
    runs.csv            one line a run
    curves.csv          the loss curves, as they are drawn
    tables.md           the page's tables, in Markdown

The same folders always give the same bytes, with the same versions of the libraries.
"""

import functools
import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import polars as pl
import vl_convert

from spannorm_jax.errors import UserError, visible
from spannorm_jax.report import curves, frames
from spannorm_jax.report.comparisons import replicates
from spannorm_jax.report.contents import contents, in_markdown
from spannorm_jax.report.figures import FIGURES
from spannorm_jax.report.folders import find_runs
from spannorm_jax.report.looks import Figure
from spannorm_jax.report.study import RUNS, Study, study_of
from spannorm_jax.report.tables import notices
from spannorm_jax.run.bucket import in_bucket
from spannorm_jax.run.store import upload

TITLE = "Norm placement and initialisation"
Notices = list[tuple[str, str]]
_PNG_SCALE = 2  # twice what a README shows
_DIGITS = 5  # of a number in the page's figures
_CURVES = [  # the columns of curves.csv
    *("curve", "placement", "init", "other", "depth", "width", "lr", "best_lr", "runs", "alone", "train_loss"),
    *("crossed", "step", "tokens", "flops", "loss", "low", "high"),
]


def write_report(
    folders: Sequence[Path],
    out: Path,
    title: str = TITLE,
    baseline: Mapping[str, str] | None = None,
    confirmed: Mapping[str, str] | None = None,
    ladder: Sequence[float] = (),
    ladder_seeds: int = 0,
) -> Path:
    """Writes the report on the runs in and below `folders` into `out`, and returns the page's path.

    `baseline` has config keys of what methods are compared with, `confirmed` of those named before the runs. Raises
    UserError if there is nothing to report, no run has the baseline, or `out` cannot be written.
    """
    study, said = read_study(folders, baseline, confirmed, ladder, ladder_seeds)
    return write_files(study, said, folders, out, title)


def read_study(
    folders: Sequence[Path],
    baseline: Mapping[str, str] | None = None,
    confirmed: Mapping[str, str] | None = None,
    ladder: Sequence[float] = (),
    ladder_seeds: int = 0,
) -> tuple[Study, Notices]:
    """The runs in and below `folders`, and the notices that go with them. Raises UserError as `write_report`."""
    passed_over: list[str] = []
    study = study_of(find_runs(folders, passed_over.append), baseline, confirmed, ladder, ladder_seeds)
    twice = "Equal losses at every step under two names, in {} run{}: {} and {}. "
    twice += "They are one method: it has two lines, and enters the pooled error once."
    same = [twice.format(n, "s"[: n != 1], one.label, other.label) for (one, other), n in replicates(study).items()]
    return study, notices(study, passed_over) + [("warning", text) for text in same]


def write_files(study: Study, said: Notices, folders: Sequence[Path], out: Path, title: str) -> Path:
    """Writes the files of a report. Raises UserError if that cannot be done."""
    if in_bucket(out):
        with tempfile.TemporaryDirectory() as local:
            page = write_files(study, said, folders, Path(local), title)
            upload(Path(local), out)
            return out / page.name
    root = Path(os.path.commonpath([folder.absolute() for folder in folders]))
    made = {name: make(study) for name, (make, _) in FIGURES.items()}
    drawn = [figure for figure in made.values() if figure is not None]
    left_out = [why for name, (_, why) in FIGURES.items() if made[name] is None]
    page = out / "report.html"
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in FIGURES:
            for path in (out / f"{name}.svg", out / f"{name}.png"):
                path.unlink(missing_ok=True)  # an older report's
        for figure in drawn:
            svg = print_svg(figure)
            (out / f"{figure.name}.svg").write_text(svg, encoding="utf-8")
            (out / f"{figure.name}.png").write_bytes(vl_convert.svg_to_png(svg, scale=_PNG_SCALE))
        paths = pl.Series("folder", [os.path.relpath(folder, root) for folder in study.runs["folder"]])
        study.runs.with_columns(paths).select(*RUNS).write_csv(out / "runs.csv")
        frames.named(study, curves.loss_curves(study)).select(_CURVES).write_csv(out / "curves.csv")
        shown = contents(study, said, root, title)
        named = in_markdown(shown).items()
        text = "\n\n".join(f"## {name.replace('_', ' ').capitalize()}\n\n{table}" for name, table in named)
        (out / "tables.md").write_text(visible(f"# {title}\n\n{text}\n"), encoding="utf-8")
        page.write_text(visible(_html(shown, drawn, left_out)), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}; choose another --out") from error
    return page


def print_svg(figure: Figure) -> str:
    """The figure's first view."""
    spec = next(iter(figure.views.values()))
    tables = {name: table.to_dicts() for name, table in figure.data.items()}
    svg = vl_convert.vegalite_to_svg(spec | {"datasets": tables})
    # Vega numbers clips through all figures of a process: the same figure has the same names here.
    names: dict[str, str] = {}
    return re.sub(r"\bclip\d+\b", lambda found: names.setdefault(found[0], f"clip{len(names)}"), svg)


def _html(shown: dict[str, Any], drawn: Sequence[Figure], left_out: Sequence[str]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("spannorm_jax.report", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    figures = {
        figure.name: {"views": figure.views, "tables": {name: _columns(table) for name, table in figure.data.items()}}
        for figure in drawn
    }
    # Within a script element nothing is escaped, but for what would end it.
    as_json = json.dumps(figures, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    more = {"figures": drawn, "left_out": left_out, "figures_json": as_json.replace("<", "\\u003c")}
    return environment.get_template("page.html").render(**shown, **more, library=_library())


@functools.cache
def _library() -> str:
    """Vega, Vega-Lite and Vega-Embed in one script, which takes a second to bundle."""
    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;").replace("</script", "<\\/script")


def _columns(table: pl.DataFrame) -> dict[str, list[Any]]:
    numbers = pl.col(pl.Float64).round_sig_figs(_DIGITS)
    return table.with_columns(pl.when(numbers.is_finite()).then(numbers)).to_dict(as_series=False)
