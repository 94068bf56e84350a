"""Records of sweeps: what is kept in which archive, that a sweep goes on from it, and the table of its runs."""

import tarfile
from pathlib import Path

import polars as pl
import pytest
from run_folders import write_eval, write_run

from experiments import claims, results_page, sweep_records
from spannorm_jax.errors import UserError
from spannorm_jax.report import page as report_page
from spannorm_jax.sweep.expansion import expand
from spannorm_jax.sweep.records import NEW, TRAINED, RunPlace

SWEEP = "init_targets"
RUNS = expand(SWEEP, "cpu").runs
ONE, TWO = [run for run in RUNS if run.config.seed == 0][:2]
OTHER = next(run for run in RUNS if run.config.seed == 1)


def end(out, *runs):
    for run in runs:
        write_run(out / run.name, "pre", "plain", bits=2.0, seed=run.config.seed)
        (out / run.name / "checkpoints").mkdir()
    return out


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder of archives of a repository that has no results yet."""
    (tmp_path / "configs").symlink_to(Path("configs").resolve())
    monkeypatch.chdir(tmp_path)
    sweep_records.RECORDS.mkdir(parents=True)
    sweep_records.TEMPLATE.write_text("")
    return tmp_path / sweep_records.RECORDS


def keep(out, folder):
    sweep = expand(SWEEP, "cpu")
    return sweep_records.keep(SWEEP, sweep_records.ended(sweep, out), out, folder)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*")}


def test_each_seed_has_its_archive_and_what_ends_later_another_one(tmp_path):
    out, folder = end(tmp_path / "runs", ONE, OTHER), tmp_path / "kept"
    assert keep(out, folder) == 2
    first = contents(folder)
    assert first.keys() == {f"{SWEEP}-seed0.tar.xz", f"{SWEEP}-seed1.tar.xz"}
    with tarfile.open(folder / f"{SWEEP}-seed0.tar.xz") as archive:
        assert sorted(archive.getnames()) == [
            f"{ONE.name}/{file}" for file in ("DONE", "config.json", "eval.jsonl", "metrics.jsonl", "starts.jsonl")
        ]
    write_run(out / TWO.name, "pre", "plain")
    assert keep(out, folder) == 0 and contents(folder) == first  # it is not evaluated
    write_eval(out / TWO.name, 20, 2.0)
    assert keep(out, folder) == 1 and keep(out, folder) == 0
    later = contents(folder)
    assert later.keys() - first.keys() == {f"{SWEEP}-seed0-2.tar.xz"} and first.items() <= later.items()
    assert sweep_records.runs_in(folder / f"{SWEEP}-seed0-2.tar.xz") == {TWO.name}


def test_the_same_runs_of_another_folder_are_the_same_bytes(tmp_path):
    for name in ("here", "there"):
        out = end(tmp_path / name, ONE)
        starts = out / ONE.name / "starts.jsonl"
        starts.write_text(starts.read_text().replace("train ", f"train --workdir {out / ONE.name} "))
        keep(out, tmp_path / f"kept-{name}")
    assert contents(tmp_path / "kept-here") == contents(tmp_path / "kept-there")


def test_an_archive_of_a_whole_sweep_is_one_of_its_parts(tmp_path, folder):
    keep(end(tmp_path / "first", ONE, OTHER), folder)
    sweep_records.unpack_sweep(SWEEP, tmp_path / "whole", folder)
    for path in folder.iterdir():
        path.unlink()
    with tarfile.open(folder / f"{SWEEP}.tar.xz", "w:xz") as archive:
        for run in (ONE, OTHER):
            archive.add(tmp_path / "whole" / SWEEP / run.name, run.name)
    (folder / f"{SWEEP}_more-seed0.tar.xz").write_bytes((folder / f"{SWEEP}.tar.xz").read_bytes())  # another sweep
    assert keep(end(tmp_path / "more", ONE, TWO), folder) == 1
    names = [f"{SWEEP}-seed0.tar.xz", f"{SWEEP}.tar.xz"]
    assert [path.name for path in sweep_records.archives(folder)[SWEEP]] == names
    again = sweep_records.unpack_sweep(SWEEP, tmp_path, folder)
    states = {run.name: RunPlace(again, run.name).state_at_rest() for run in RUNS}
    assert states == {run.name: TRAINED if run in (ONE, TWO, OTHER) else NEW for run in RUNS}


def test_the_table_of_a_sweep_is_the_runs_csv_of_a_report_on_its_runs(tmp_path, folder, capsys):
    assert sweep_records.main(["keep", SWEEP, "--out", str(end(tmp_path / "runs", ONE, OTHER))]) == 0
    assert capsys.readouterr().out == f"{SWEEP}: 2 of 2 runs are new\n"
    report_page.write_report([tmp_path / "runs"], tmp_path / "out")
    assert (folder / f"{SWEEP}-runs.csv").read_bytes() == (tmp_path / "out/runs.csv").read_bytes()


def test_a_run_of_another_version_is_kept_and_stands_in_the_table(tmp_path, folder):
    out = end(tmp_path / "runs", ONE, OTHER)
    keep(out, folder)
    sweep_records.unpack(folder / f"{SWEEP}-seed0.tar.xz", tmp_path / "newer")
    config = tmp_path / "newer" / ONE.name / "config.json"
    config.write_text(config.read_text().replace('"seed"', '"an_option_to_come": {"more": 1}, "seed"', 1))
    with tarfile.open(folder / f"{SWEEP}-seed0.tar.xz", "w:xz") as archive:
        archive.add(tmp_path / "newer" / ONE.name, ONE.name)
    assert sweep_records.main(["keep", SWEEP, "--out", str(out)]) == 0
    assert pl.read_csv(folder / f"{SWEEP}-runs.csv").height == 2


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (f"{SWEEP},lr", "no run of sweep lr has ended in .*runs; do them: sweep lr local --out"),
        (f"{SWEEP},", "unknown sweep ''"),
        (f"{SWEEP},lrr", "unknown sweep 'lrr'; did you mean 'lr'"),
    ],
)
def test_of_names_that_cannot_all_be_kept_none_is(tmp_path, folder, names, says):
    out = end(tmp_path / "runs", ONE)
    with pytest.raises(UserError, match=says):
        sweep_records.main(["keep", names, "--out", str(out)])
    assert not contents(folder)


@pytest.mark.parametrize("damage", [lambda whole: whole[:-100], lambda whole: b"", lambda whole: whole[:50]])
def test_a_damaged_archive_is_one_line(tmp_path, folder, damage):
    out = end(tmp_path / "runs", ONE)
    keep(out, folder)
    path = folder / f"{SWEEP}-seed0.tar.xz"
    path.write_bytes(damage(path.read_bytes()))
    for argv in (["keep", SWEEP, "--out", str(out)], ["page"]):
        with pytest.raises(UserError, match=r"seed0.tar.xz is damaged \(.*\); bring it here again"):
            sweep_records.main(argv)


@pytest.mark.parametrize(
    ("argv", "says"), [(["kep"], "did you mean .keep"), (["keep"], "needs the names"), (["page", "lr"], "takes none")]
)
def test_a_mistyped_command_is_one_line(argv, says):
    with pytest.raises(UserError, match=says):
        sweep_records.main(argv)


def test_the_pages_of_results_and_claims_read_a_sweep_once(tmp_path):
    write_run(tmp_path / "runs" / "a", bits=2.0)
    assert claims.read(tmp_path / "runs") is results_page.read(tmp_path / "runs")
