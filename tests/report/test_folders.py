"""Folders that are no run's are passed over and said, and a run's files may hold null for any number."""

import json
import os
import re
import subprocess
import sys

import pytest
from processes import LIMIT_S
from run_folders import STEPS, reached, study_in, write_run

from spannorm_jax.errors import UserError
from spannorm_jax.report.__main__ import main
from spannorm_jax.report.figures import FIGURES
from spannorm_jax.report.folders import find_runs, read_run
from spannorm_jax.report.page import read_study
from spannorm_jax.report.tables import notices

FOREIGN = {
    "hugging_face": json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096}),
    "no_json": "seed = 3",
    "bytes": b"\x80\x00\xff",
    "list": "[1, 2]",
    "nothing": "",
    "deep": "[" * 100_000,
    "null": "null",
    "half_a_character": json.dumps(
        {"model": {"placement": "\ud800", "init": "plain"}, "seed": 0, "training": {"steps": 1}}
    ),
    "other_keys": json.dumps({"model": {"placement": 3, "init": None}, "seed": 0, "training": {"steps": 1}}),
    "model_is_a_name": json.dumps({"model": "gpt2", "seed": 0, "training": {"steps": 1}}),
}


def write_foreign(folder, name):
    folder.mkdir(parents=True)
    content = FOREIGN[name]
    (folder / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def test_folders_of_other_programs_are_passed_over_and_said_and_searched(tmp_path, capsys):
    for name in FOREIGN:
        write_foreign(tmp_path / name, name)
    write_run(tmp_path / "hugging_face" / "deep" / "run")
    write_run(tmp_path / "run", "pre")
    why = []
    assert [run.placement for run in find_runs(tmp_path, why.append)] == ["span", "pre"]
    assert main([str(tmp_path)]) == 0
    said, page = capsys.readouterr().err, (tmp_path / "report" / "report.html").read_text()
    assert len(why) == said.count("note: Passed over") == page.count("Passed over") == len(FOREIGN)
    paths = [str(tmp_path / name / "config.json") for name in FOREIGN]
    assert all(path in said and any(path in line for line in why) for path in paths)


def test_a_run_folder_that_no_table_could_name_is_passed_over_and_said(tmp_path, capsys):
    strange = tmp_path / "run\udcff"
    write_run(strange / "checkpoints" / "6")
    write_run(tmp_path / "again").rename(strange / "run")
    write_run(tmp_path / "run", "pre", bits=2.0)
    assert main([str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    notes = [line for line in err.splitlines() if "Passed over" in line]
    assert len(notes) == 2 and all(r"run\udcff" in line and "no UTF-8" in line for line in notes) and "span" not in out
    with pytest.raises(UserError, match="no UTF-8"):
        find_runs(strange.rename(tmp_path / "alone\udcff"))


def test_a_report_needs_no_home(tmp_path):
    """As in a container with a user id that has no name."""
    write_run(tmp_path / "run")
    (tmp_path / "sitecustomize.py").write_text(
        "import pwd\ndef nobody(uid):\n    raise KeyError(uid)\npwd.getpwuid = nobody\n"
    )
    env = {key: value for key, value in os.environ.items() if key not in ("HOME", "XDG_CACHE_HOME")}
    env["PYTHONPATH"] = os.pathsep.join([str(tmp_path), os.getcwd()])
    for code in (
        "import altair",  # the library alone does need one
        f"from spannorm_jax.report.__main__ import main; main([{str(tmp_path)!r}])",
        "import os, spannorm_jax.analysis.drawing; assert 'HOME' not in os.environ",
    ):
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=LIMIT_S)
        assert (done.returncode == 0) == (code != "import altair"), done.stderr
    assert (tmp_path / "report" / "loss.png").exists()


def test_a_root_of_other_programs_alone_is_one_line(tmp_path):
    for number, name in enumerate(list(FOREIGN)[:3]):
        write_foreign(tmp_path / str(number), name)
    with pytest.raises(UserError, match=r"no run below .*/0/config\.json .*\(and 2 more\)") as caught:
        main([str(tmp_path)])
    assert "\n" not in str(caught.value) and not (tmp_path / "report").exists()


def test_a_damaged_line_is_left_out_and_said_and_costs_no_report(tmp_path, capsys):
    write_foreign(tmp_path / "a", "hugging_face")
    write_run(tmp_path / "b")
    whole = (write_run(tmp_path / "c", "pre") / "metrics.jsonl").read_text().splitlines()
    whole[2:4] = ['{"step": 3, "loss"', '{"loss": 4.7}']
    (tmp_path / "c" / "metrics.jsonl").write_text("\n".join(whole) + "\n")
    assert main([str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert re.search(r"warning: Left out of \S*c: \S*c/metrics.jsonl line 3 is not JSON.*\(and 1 more lines\)", err)
    assert "trained" in out and "Left out of" in (tmp_path / "report" / "report.html").read_text()
    steps = read_run(tmp_path / "c").metrics.step.tolist()
    assert steps == [1, 2, *range(5, STEPS + 1)]


@pytest.mark.parametrize("name", ["DONE", "DIVERGED", "eval.jsonl", "starts.jsonl", "metrics.jsonl"])
def test_any_file_but_the_config_may_be_damaged(tmp_path, name):
    folder = write_run(tmp_path / "run", bits=2.0)
    (folder / name).write_bytes(b"\x80[" + b"\n" * name.endswith("jsonl"))
    run = read_run(folder)
    assert len(run.damage) == 1 and str(folder / name) in run.damage[0]
    assert main([str(tmp_path), "--out", str(tmp_path / "out")]) == 0


def test_a_run_of_an_older_version_has_what_it_did_by_default(tmp_path, capsys):
    old = write_run(tmp_path / "old", seed=0)
    write_run(tmp_path / "new", seed=1, model__variance_exponent=0.0)  # its default has changed since it came
    config = json.loads((old / "config.json").read_text())
    del config["optim"]["name"], config["model"]["variance_exponent"], config["execution"]
    config["model"]["attention"] = "auto"  # where it stood then
    (old / "config.json").write_text(json.dumps(config))
    study = study_in(tmp_path)
    assert study.settings["runs"].to_list() == [2]
    said = notices(study)
    assert [kind for kind, _ in said] == ["note", "note"]
    assert "optim.name" in said[0][1] and "1 of 2 runs are older" in said[0][1]
    assert "model.variance_exponent" in said[0][1] and "model.attention" in said[1][1]
    # A younger option that was changed is a difference.
    write_run(tmp_path / "other", seed=2, optim__name="lion")
    assert study_in(tmp_path).settings.height == 2


def test_several_folders_are_read_at_every_depth_each_run_once_and_what_holds_none_is_said(tmp_path):
    write_run(tmp_path / "a" / "deep" / "x")
    write_run(tmp_path / "b", "pre")
    (tmp_path / "b" / "checkpoints" / "20").mkdir(parents=True)
    (tmp_path / "b" / "checkpoints" / "20" / "config.json").write_text("{}")  # below a run nothing is searched
    (tmp_path / "empty").mkdir()
    why = []
    roots = [tmp_path / "b", tmp_path / "a", tmp_path / "a" / "deep" / "x", tmp_path / "empty"]
    assert [run.placement for run in find_runs(roots, why.append)] == ["pre", "span"]
    assert why == [f"{tmp_path / 'empty'} holds no run's config.json"]
    with pytest.raises(UserError, match="missing is not a folder"):
        find_runs([tmp_path / "a", tmp_path / "missing"])


def without_numbers(value, missing):
    """`value` with `missing` for every number in it but the steps."""
    if isinstance(value, dict):
        return {key: v if key == "step" else without_numbers(v, missing) for key, v in value.items()}
    if isinstance(value, list):
        return [without_numbers(v, missing) for v in value]
    return missing if isinstance(value, int | float) and not isinstance(value, bool) else value


LINE = {"loss": 1.0, "grad_norm": 1.0, "block_grad_norm": [1.0, 2.0, 3.0], "tokens_per_s": 9.0, "lr": 0.1}
EVALUATION = {"loss": 1.0, "bits_per_byte": 3.0, "tokens": 9}


@pytest.mark.parametrize("from_step", [1, 2, 20])  # of 20: nothing but null, all but the first, the last alone
@pytest.mark.parametrize("missing", [None, float("nan"), -float("inf")], ids=str)
def test_a_run_without_numbers_has_a_report(tmp_path, capsys, missing, from_step):
    def write_lines(path, lines):
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    for seed in (0, 1):
        folder = write_run(tmp_path / f"whole{seed}", bits=2.0, seed=seed)
        whole = [json.loads(line) | LINE for line in (folder / "metrics.jsonl").read_text().splitlines()]
        folder = write_run(tmp_path / f"run{seed}", "pre", seed=seed)
        write_lines(
            folder / "metrics.jsonl",
            [line if line["step"] < from_step else without_numbers(line, missing) for line in whole],
        )
        where = {"step": 20, "split": "validation", "mesh": {"data": 1}}
        write_lines(folder / "eval.jsonl", [without_numbers(where | EVALUATION, missing)])
        start = json.loads((folder / "starts.jsonl").read_text())
        write_lines(folder / "starts.jsonl", [without_numbers(start, missing)])
        (folder / "DIVERGED").write_text(json.dumps({"step": missing, "where": "the loss", "loss": missing}))
    assert main([str(tmp_path)]) == 0
    row = read_run(tmp_path / "run0")
    numbers = [row.reached[name] for name in ("train_loss", "bits_per_byte", "tokens_per_s")]
    assert numbers == [None, None, 9.0 if from_step == 20 else None]
    assert row.ended == "diverged (step 20)"
    assert {path.name for path in (tmp_path / "report").glob("*.svg")} == {"loss.svg", "block_grad_norm.svg"}
    assert reached(tmp_path / "whole0")["bits_per_byte"] == 2.0
    # The same without the runs that have numbers, and without DIVERGED: a loss that is no number is enough.
    (tmp_path / "run0" / "DIVERGED").unlink()
    study, _ = read_study([tmp_path / "run0"])
    assert study.rows[0].ended == "diverged (step 20)"
    drawn = [figure for make, _ in FIGURES.values() if (figure := make(study)) is not None]
    assert [figure.name for figure in drawn] == ["loss", "block_grad_norm"][: 2 * (from_step > 1)]
    assert "None" not in capsys.readouterr().out
