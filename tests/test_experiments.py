"""The runner behind the demo: whole processes, one after the other, interrupted and continued."""

import json

import pytest

from experiments import runner

ARGUMENTS = (
    "--config=configs/dense.py:depth=1,width=16,placement=pre,init=plain",
    "--config.training.steps=4",
    "--config.data.seq_len=16",
    "--config.eval.tokens=200",
    "--config.eval.batch_size=8",
)
RUNS = {"good": ARGUMENTS, "bad": (*ARGUMENTS, "--config.optim.lr=1e30", "--config.checkpoint.every_steps=1")}


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.delenv("XLA_FLAGS", raising=False)


def test_runs_are_trained_and_evaluated_once_and_divergence_is_a_result(tmp_path, capfd):
    out = tmp_path / "out"
    assert runner.run_all(out, RUNS) == 0
    assert (out / "good" / "DONE").exists() and (out / "bad" / "DIVERGED").exists()
    evals = [json.loads(line) for line in (out / "good" / "eval.jsonl").read_text().splitlines()]
    assert [e["step"] for e in evals] == [4]
    # The diverged run is evaluated at its last good checkpoint.
    [at] = [json.loads(line)["step"] for line in (out / "bad" / "eval.jsonl").read_text().splitlines()]
    assert at == json.loads((out / "bad" / "DIVERGED").read_text())["step"] - 1

    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}
    capfd.readouterr()
    assert runner.run_all(out, RUNS) == 0
    assert capfd.readouterr().out.count("done before") == 2
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()} == before


def test_what_was_trained_but_not_evaluated_is_evaluated(tmp_path):
    runs = {"good": RUNS["good"]}
    assert runner.run_all(tmp_path, runs) == 0
    trained = (tmp_path / "good" / "metrics.jsonl").read_bytes()
    (tmp_path / "good" / "eval.jsonl").unlink()
    assert runner.run_all(tmp_path, runs) == 0
    assert (tmp_path / "good" / "eval.jsonl").exists()
    assert (tmp_path / "good" / "metrics.jsonl").read_bytes() == trained


def test_a_mistake_stops_the_list_with_its_code(tmp_path, capfd):
    assert runner.run_all(tmp_path, {"typo": (*ARGUMENTS, "--config.optim.rl=1"), **RUNS}) == 2
    assert "optim.rl" in capfd.readouterr().err and not (tmp_path / "good").exists()
