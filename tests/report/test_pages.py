"""Pages in a browser: `make test-pages`. That of `make demo-smoke`, one of each sweep's archives, and a broken one."""

import json
import re
from pathlib import Path

import pytest
from browser import assert_whole, opened
from run_folders import write_lr_sweep, write_run

from experiments.sweep_records import archives, unpack_sweep
from spannorm_jax.report import page as page_module
from spannorm_jax.report.page import write_report

pytestmark = pytest.mark.pages

DEMO = Path("runs/demo-smoke/reports/demo-cpu/report.html")


@pytest.fixture
def report(tmp_path, monkeypatch):
    """Makes the report of the runs in a folder, without its pictures for print, and returns the page."""
    monkeypatch.setattr(page_module, "print_svg", lambda figure: '<svg xmlns="http://www.w3.org/2000/svg"/>')
    return lambda runs: write_report([runs], tmp_path / "out")


def views(seen):
    """The views of each figure that were seen, but for those of lists within it."""
    found = {}
    for each in seen:
        found.setdefault(each["figure"].removeprefix("figure-"), []).append(each["view"])
    return found


def test_the_page_of_the_demo_is_whole(tmp_path):
    assert DEMO.exists(), "make demo-smoke makes the page"
    assert views(assert_whole(DEMO, tmp_path)).keys() == {"loss", "differences", "block_grad_norm"}


@pytest.mark.parametrize("sweep", sorted(archives()))
def test_the_page_of_each_sweeps_archives_is_whole(sweep, tmp_path, report):
    seen = views(assert_whole(report(unpack_sweep(sweep, tmp_path / "runs")), tmp_path))
    assert {"loss", "block_grad_norm"} <= seen.keys() and len(seen["loss"]) >= 12


def test_every_figure_is_drawn_in_every_view_in_one_panel_and_in_several(tmp_path, report):
    path = report(write_lr_sweep(tmp_path / "several", depths=(3, 6)))
    seen = views(assert_whole(path, tmp_path))
    lrs = ["0.001", "0.01", "0.1"]
    assert len(seen["loss"]) == 12 + len(lrs) and len(seen["loss_by_lr"]) == 3 and len(seen["differences"]) == 2
    for name in ("a", "b"):
        write_run(tmp_path / "one" / name, {"a": "pre", "b": "span"}[name], bits=2.0)
    assert len(views(assert_whole(report(tmp_path / "one"), tmp_path))) == 4


def test_a_figure_that_fails_says_so_and_the_others_stand(tmp_path, report):
    """One whose specification is no figure, and one whose data fails when it is drawn."""
    path = report(write_lr_sweep(tmp_path / "runs"))
    text = path.read_text(encoding="utf-8")
    (packed,) = re.findall(r'<script id="figures" type="application/json">(.*?)</script>', text)
    figures = json.loads(packed)
    failing = {"loss": {"mark": "nonsense"}, "profile": {"transform": [{"calculate": "datum.a.b.c", "as": "d"}]}}
    for name, change in failing.items():
        figures[name]["views"] = {key: view | change for key, view in figures[name]["views"].items()}
    path.write_text(text.replace(packed, json.dumps(figures).replace("<", "\\u003c")), encoding="utf-8")
    drawn, seen, errors = opened(path, tmp_path)
    assert drawn == "all but loss, profile" and len(errors) == 12 + 1
    broken = {each["figure"]: each["said"] for each in seen if each["said"]}
    assert broken.keys() == {"figure-loss", "figure-profile"} and len(views(seen)) == 9
    for name in failing:
        assert re.fullmatch(
            rf"This figure could not be drawn \(\w*Error: .+\). Its picture for print is {name}.png.",
            broken[f"figure-{name}"],
        )
