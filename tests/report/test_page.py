"""The page and the files beside it: what they hold, and that nothing else is needed. test_pages.py opens pages."""

import csv
import html
import json
import re
from dataclasses import replace

import pytest
import vl_convert
from run_folders import STEPS, study_in, write_lr_sweep, write_run

from spannorm_jax.errors import UserError
from spannorm_jax.report.figures import FIGURES
from spannorm_jax.report.page import print_svg, write_report

SWEPT = set(FIGURES) - {"loss_by_width", "ceiling_by_depth", "ceiling_by_width"}
TABLES = ("runs.csv", "curves.csv", "tables.md")


class Page:
    """The page's text by table, its figures, and its markup without scripts."""

    def __init__(self, text):
        self.figures = json.loads(re.search(r'<script id="figures" type="application/json">(.*?)</script>', text)[1])
        self.markup = re.sub(r"(<script\b[^>]*>).*?(</script>)", r"\1\2", text, flags=re.S)
        found = re.findall(r'<table id="(\w+)">(.*?)</table>', self.markup, re.S)
        self.tables = {name: [self._cells(row) for row in rows.split("<tr")[1:]] for name, rows in found}

    def _cells(self, row):
        cells = re.findall(r"<t[hd]\b[^>]*>(.*?)</t[hd]>", row, re.S)
        return [html.unescape(re.sub(r"<[^>]*>", "", cell)).strip() for cell in cells]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    root = write_lr_sweep(tmp_path_factory.mktemp("sweep") / "runs", depths=(3, 6))
    page = write_report([root], root.parent / "out", "A <title>")
    return root, page, Page(page.read_text(encoding="utf-8"))


def test_a_sweep_has_its_figures_and_tables(sweep):
    root, path, page = sweep
    assert path == root.parent / "out" / "report.html"
    assert set(page.figures) == SWEPT
    names = {f"{name}.{kind}" for name in SWEPT for kind in ("svg", "png")}
    assert {p.name for p in path.parent.iterdir()} == names | {"report.html", *TABLES}
    header, *rows = page.tables["results"]
    assert header == ["placement", "init", "also differs", "seeds", "train loss", "held-out loss", "held-out bits/byte",
                      "tokens/s", "spikes", "clipped", "gradient p99.9", "outcome"]  # fmt: skip
    assert len(rows) == 3 * 2 * 3
    assert rows[1][:4] + rows[1][5:6] + rows[1][-1:] == [
        *("pre", "plain", "model.depth=3, optim.lr=0.01", "3"),
        *("2.020 ± 0.020", "trained"),
    ]
    assert next(row for row in rows if row[2].endswith("3, optim.lr=0.1") and row[0] == "post")[-1] == (
        "3 diverged (steps 4, 4, 4)"
    )
    header, *rows = page.tables["differences"]
    assert [row[:3] for row in rows] == [[f"{p} / plain", "pre / plain", d] for d in "36" for p in ("post", "span")]
    exact = ["−0.500 [−0.500, −0.500]", "[−0.500, −0.500]", "3 of 3", "< 0.001"]  # no seed differs from another
    assert rows[1][3:] == ["0.01", "0.01", *exact, *exact]
    assert page.tables["overall"][2][:4] == ["span / plain", "pre / plain", "−0.500 [−0.500, −0.500]", "6"]
    header, *rows = page.tables["learning_rates"]
    assert [row[:3] for row in rows[2::3]] == [["span / plain", d, "0.01"] for d in "36"]
    assert re.fullmatch(r"8\.91e-03 \[6\.70e-03, 1\.19e-02\]", rows[2][3]) and rows[2][4].startswith("0.067 [")
    header, *rows = page.tables["drifts"]
    # Seed by seed the rates and their losses are the same at both depths.
    assert [row[:4] for row in rows] == [[f"{p} / plain", "depth", "width 64", "3, 6"] for p in ("pre", "post", "span")]
    one, cliff = ["1.00 [1.00, 1.00]", "3"], ["between 0.01 and 100.00", "3"]
    assert [row[4:] for row in rows] == [one, cliff, one]
    text = path.read_text(encoding="utf-8")
    assert "Loss against width: needs two widths." in text and "--baseline placement=pre,init=plain" in text


def test_every_view_compiles_and_its_data_hold_what_it_names(sweep):
    _, _, page = sweep
    ids = re.findall(r'\sid="([^"]+)"', page.markup)
    assert "differences" in ids and "figure-differences" in ids and len(set(ids)) == len(ids)
    assert len(page.figures["loss"]["views"]) == 12 and len(page.figures["loss_by_lr"]["views"]) == 3
    for figure in page.figures.values():
        columns = figure["tables"]["main"].keys()
        for view in figure["views"].values():
            fields = {f.split(".")[-1] for f in re.findall(r'"field": "([^"]+)"', json.dumps(view))}
            assert fields <= columns | {"level", "name"}
            assert vl_convert.vegalite_to_vega(view)["$schema"].startswith("https://vega.github.io/schema/vega/")

    view = json.dumps(page.figures["loss"]["views"]["FLOPs, log both"])
    assert '"field": "flops"' in view and '"field": "step"' not in view and "training FLOPs" in view
    assert '"type": "linear"' not in view and view.count('"type": "log"') > 2


def test_the_tables_beside_the_page_hold_the_runs_and_the_curves(sweep):
    root, path, _ = sweep
    with open(path.parent / "runs.csv", encoding="utf-8") as file:
        runs = list(csv.DictReader(file))
    assert len(runs) == 54 and {run["folder"] for run in runs} == {folder.name for folder in root.iterdir()}
    (run,) = [run for run in runs if run["folder"] == "span-6-0.1-2"]
    assert (float(run["held_out_loss"]), run["depth"], run["lr"], run["seed"]) == (pytest.approx(1.66), "6", "0.1", "2")
    assert [run["held_out_loss"] for run in runs if run["outcome"] == "diverged"] == [""] * 6
    with open(path.parent / "curves.csv", encoding="utf-8") as file:
        curves = list(csv.DictReader(file))
    assert len({curve["curve"] for curve in curves}) == 18
    assert [c["step"] for c in curves if c["curve"] == "0"] == [str(step) for step in range(1, STEPS + 1)]


def test_the_page_needs_nothing_beside_it_and_may_fetch_nothing(sweep):
    root, path, page = sweep
    [policy] = re.findall(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">', page.markup)
    assert policy.startswith("default-src 'none'; img-src data: blob:;") and "http" not in policy
    assert not re.search(r"\s(src|href)=|<(link|img|iframe|object|embed|base)\b", page.markup)
    text = path.read_text(encoding="utf-8")
    assert str(root) not in text
    assert "<title>A &lt;title&gt;</title>" in text and "<title>A <title>" not in text
    assert path.stat().st_size < 2_000_000


def test_what_a_folder_says_is_never_markup(tmp_path):
    folder = write_run(tmp_path / "run", "</script><b>pre", init="<i>")
    text = write_report([folder], tmp_path / "out").read_text(encoding="utf-8")
    assert "<b>pre" not in text and "<i>" not in text
    assert Page(text).figures["loss"]["tables"]["main"]["placement"][0] == "</script><b>pre"


def test_the_same_folders_give_the_same_bytes(sweep, tmp_path):
    root, path, _ = sweep
    write_report([root], tmp_path, "A <title>")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {
        p.name: p.read_bytes() for p in path.parent.iterdir()
    }


def test_a_comparison_over_different_data_has_a_warning_above_its_tables(tmp_path):
    folders = [write_run(tmp_path / "a", "pre"), write_run(tmp_path / "b", fingerprint="beef")]
    text = write_report(folders, tmp_path / "out").read_text(encoding="utf-8")
    assert text.index('<li class="warning">The runs did not see the same data, so their') < text.index("<table")


def test_a_run_that_logged_nothing_still_has_a_page(tmp_path):
    folder = write_run(tmp_path / "run", losses=[], done=False)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "loss.png").write_bytes(b"an older report's")
    text = write_report([folder], tmp_path / "out").read_text(encoding="utf-8")
    assert "unfinished (step 0 of 20)" in text and "Training loss: no run logged a step." in text
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"report.html", *TABLES}


@pytest.mark.parametrize(
    "changes",
    [
        {"optim__lr": [0.0, 1e-3, 1e-2, 1e-1]},  # a log axis has no zero
        {"model__width": [32, 64, 128]},
        {"model__depth": [3, 6], "model__width": [32, 64]},
        {"data__seq_len": [64, 128]},
        {"model__placement": ["pre", "post", "span", "peri", "hybrid"], "model__init": ["plain", "gpt2", "scale"]},
        {"model__placement": ["ours", "another"], "model__init": ["new", "newer"], "optim__lr": [1e-3, 1e-2]},
    ],
    ids=lambda changes: " ".join(changes),
)
def test_whatever_varies_figures_compile(tmp_path, changes):
    settings = [{}]
    for key, values in changes.items():
        settings = [s | {key: value} for s in settings for value in values]
    for i, setting in enumerate(settings):
        write_run(tmp_path / str(i), losses=[5.0 - 0.1 * s + 0.01 * i for s in range(STEPS)], bits=2.0, **setting)
    study = study_in(tmp_path)
    drawn = [figure for make, _ in FIGURES.values() if (figure := make(study)) is not None]
    assert {"loss", "block_grad_norm"} <= {figure.name for figure in drawn}
    for figure in drawn:
        for view in figure.views.values():
            svg = print_svg(replace(figure, views={"": view}))
            assert "NaN" not in svg and "Infinity" not in svg


def test_an_out_that_cannot_be_written_is_one_line(tmp_path):
    folder = write_run(tmp_path / "run")
    (tmp_path / "out" / "runs.csv").mkdir(parents=True)
    with pytest.raises(UserError, match=r"out cannot be written: .*; choose another --out"):
        write_report([folder], tmp_path / "out")
