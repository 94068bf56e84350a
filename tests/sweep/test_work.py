"""What one process does with runs, one after another: each as if alone, and a program compiled once a shape."""

import dataclasses
import errno
import json
import os
import signal
import threading

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from processes import values_of

from spannorm_jax import durable, evaluate
from spannorm_jax.durable import InUse, exclusive
from spannorm_jax.errors import UserError
from spannorm_jax.sweep import __main__ as command
from spannorm_jax.sweep.expansion import expand
from spannorm_jax.sweep.records import (
    FAILED,
    GONE_OFF,
    NEW,
    RUNNING,
    STOPPED,
    STOPPED_EXIT,
    TRAINED,
    RunPlace,
    write_asked,
)
from spannorm_jax.sweep.work import work

SMALLEST = {
    "model.depth": "1",
    "model.width": "16",
    "model.num_heads": "1",
    "model.ffn_dim": "16",
    "model.vocab_size": "256",
    "data.seq_len": "8",
    "training.batch_size": "8",
    "training.steps": "1",
    "training.tokens": "0",
    "eval.tokens": "64",
    "eval.batch_size": "8",
}
EXPERTS = {"model.moe.num_experts": "2", "model.moe.expert_dim": "16"}


pytestmark = pytest.mark.usefixtures("started")


@pytest.fixture
def run(tiny):
    return expand("lr", "cpu", tiny).runs[0]


@pytest.fixture
def place(run, tmp_path):
    return RunPlace(tmp_path, run.name)


def run_all(sweep, out):
    return [work(run, RunPlace(out, run.name), retry=False) for run in sweep.runs]


def evaluated_at(place):
    return values_of(place.workdir / "eval.jsonl", "step")


def files(folder):
    """When each file was last written, but for locks, which name their last holder."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.name != "LOCK"}


@pytest.mark.parametrize(
    "sweep",
    [
        *("placement_init", "depth", "width", "lr", "fixed_budget", "init_targets", "rivals", "depth_factor"),
        *("depth_lr", "warmup", "experts", "demo", "depth (gpu)", "experts (gpu)"),
    ],
)
def test_the_first_run_of_each_shipped_sweep_takes_a_step(sweep, tmp_path):
    run = expand(sweep.removesuffix(" (gpu)"), "gpu" if sweep.endswith("(gpu)") else "cpu").runs[0]
    experts = EXPERTS if run.config.model.moe.num_experts else {}
    run = dataclasses.replace(run, overrides=tuple((dict(run.overrides) | SMALLEST | experts).items()))
    place = RunPlace(tmp_path, run.name)
    assert work(run, place, retry=False) == (TRAINED, "")
    assert place.last_step() == 1
    assert evaluated_at(place) == [1]


def test_runs_that_differ_in_numbers_compile_once_in_a_process(tiny, tmp_path):
    """The files of an empty cache are the programs that were compiled."""
    usual = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs

    def use(folder, seconds):
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)
        compilation_cache.reset_cache()

    use(str(tmp_path / "xla"), 0.0)
    try:
        compiled = []
        for run in expand("lr,seed", "cpu", tiny).runs[::4]:
            assert work(run, RunPlace(tmp_path / "out", run.name), retry=False) == (TRAINED, "")
            compiled.append(sorted(path.name for path in (tmp_path / "xla").glob("*-cache")))
    finally:
        use(*usual)
    assert sum("train_step" in name for name in compiled[0]) == 1
    assert compiled == compiled[:1] * 3


def test_a_failure_and_a_divergence_are_ends_and_the_others_go_on(tiny, tmp_path, capsys):
    sweep = expand("mixed", "cpu", tiny)
    bad, off, good = run_all(sweep, tmp_path)
    assert bad[0] == FAILED and "nothing" in bad[1] and (off, good) == ((GONE_OFF, ""), (TRAINED, ""))
    before = files(tmp_path)
    assert run_all(sweep, tmp_path) == [bad, off, good]  # again: nothing is done
    assert files(tmp_path) == before
    # Of the diverged run the last good checkpoint is evaluated.
    place = RunPlace(tmp_path, sweep.runs[1].name)
    good = json.loads((place.workdir / "DIVERGED").read_text())["last_good_checkpoint"]
    assert good and evaluated_at(place) == [good]

    capsys.readouterr()
    where = ["--config", tiny, "--out", str(tmp_path)]
    assert command.main(["mixed", "status", *where]) == 0
    said = capsys.readouterr().out.splitlines()
    assert "failed at step 0 of 6: " in said[0] and "nothing" in said[0] and said[1].endswith("  diverged")
    assert said[-1] == "3 runs: 1 done, 1 diverged, 1 failed"
    assert command.main(["mixed", "table", *where]) == 0
    assert "diverged (step" in capsys.readouterr().out
    assert command.main(["mixed", "report", *where]) == 0
    assert (tmp_path / "reports" / "mixed-cpu" / "report.html").exists()


def test_what_was_trained_and_not_evaluated_is_evaluated(run, place):
    assert work(run, place, retry=False) == (TRAINED, "")
    metrics = (place.workdir / "metrics.jsonl").read_bytes()
    (place.workdir / "eval.jsonl").unlink()
    assert place.state() == STOPPED
    assert work(run, place, retry=False) == (TRAINED, "") and (place.workdir / "eval.jsonl").exists()
    assert (place.workdir / "metrics.jsonl").read_bytes() == metrics


def test_a_done_run_whose_last_checkpoint_is_damaged_is_trained_from_the_one_before(run, place):
    assert work(run, place, retry=False) == (TRAINED, "")
    before, steps = values_of(place.workdir / "metrics.jsonl", "loss"), run.config.training.steps
    (place.workdir / "eval.jsonl").unlink()
    manifest = place.workdir / "checkpoints" / str(steps) / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-5])
    assert work(run, place, retry=False) == (TRAINED, "")
    assert values_of(place.workdir / "metrics.jsonl", "loss") == before and evaluated_at(place) == [steps]
    assert (place.workdir / "damaged" / str(steps)).is_dir()


def test_only_the_evaluation_that_the_run_asks_for_is_the_runs(run, place):
    """By hand another step, or other tokens, is evaluated; a crash leaves half a line or none."""
    assert work(run, place, retry=False) == (TRAINED, "")
    evaluations = place.workdir / "eval.jsonl"
    own = evaluations.read_text()
    not_its_own = own.replace("validation", "train"), own.replace('"fingerprint": "', '"fingerprint": "0')
    for text in ("", "{", "[]\n", own[:-9], *not_its_own):
        evaluations.write_text(text)
        assert place.state() == STOPPED and place.to_evaluate() == 6
    evaluations.unlink()
    for other in ("--step=4", "--config.eval.tokens=128"):
        assert evaluate.main(["--workdir", str(place.workdir), other]) == 0
        assert place.state() == STOPPED and place.to_evaluate() == 6
    assert work(run, place, retry=False) == (TRAINED, "")
    assert evaluated_at(place) == [4, 6, 6] and evaluations.read_text().endswith(own)
    (place.workdir / "config.json").unlink()  # without it there is no run
    assert not place.trained() and place.state() == NEW


def test_a_run_that_is_claimed_is_left_alone(run, place):
    with place.claim():
        assert place.state() == RUNNING
        with pytest.raises(InUse, match="in use by process"):
            work(run, place, retry=False)
    assert place.state() == NEW


def test_a_run_that_a_trainer_is_at_is_left_alone_and_not_failed(tiny, tmp_path, capsys):
    """`run` says that a scheduler may start it again; a runner says at its end that the run was taken."""
    sweep = expand("lr", "cpu", tiny)
    place, where = RunPlace(tmp_path, sweep.runs[0].name), ["--config", tiny, "--out", str(tmp_path)]
    place.workdir.mkdir()
    with exclusive(place.workdir / "LOCK", "the run"):
        assert command.main(["lr", "run", "0", *where]) == STOPPED_EXIT
        assert f"in use by process {os.getpid()}" in capsys.readouterr().err
    with place.claim():
        assert command.main(["lr", "run", "0", *where]) == STOPPED_EXIT
    assert place.state() == NEW


@pytest.fixture
def full(monkeypatch):
    """full(*names): from now on files of these names cannot be written, as on a disk that is full."""
    usual = durable.write_text

    def fill(*names):
        def write(path, text):
            if path.name in names:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            usual(path, text)

        monkeypatch.setattr(durable, "write_text", write)

    return fill


@pytest.mark.parametrize("name", ["asked.json", "config.json", "DONE"])
def test_a_full_disk_is_no_failure_of_a_run(run, place, tmp_path, full, name):
    """It is said, wherever it is met, and the same command goes on once there is room."""
    full(name, "FAILED")
    with pytest.raises(UserError, match=f"cannot write in --.* {tmp_path}.* mend that|{tmp_path}.*No space left"):
        work(run, place, retry=False)
    assert place.state() in (NEW, STOPPED)
    full()
    assert work(run, place, retry=False) == (TRAINED, "")


def test_a_divergence_that_cannot_be_recorded_is_said_and_met_again(tiny, tmp_path, full, capsys):
    run = expand("mixed", "cpu", tiny).runs[1]
    place = RunPlace(tmp_path, run.name)
    full("DIVERGED")
    with pytest.raises(UserError, match=r"cannot write in --workdir .*: the disk is full"):
        work(run, place, retry=False)
    assert "stopped: " in capsys.readouterr().out and place.state() == STOPPED
    full()
    assert work(run, place, retry=False) == (GONE_OFF, "")


def test_a_failure_that_cannot_be_recorded_is_said_with_its_reason(tiny, tmp_path, full):
    run = expand("mixed", "cpu", tiny).runs[0]
    full("FAILED")
    with pytest.raises(UserError, match=r"has failed \(.*nothing.*\).* cannot write in --out .*: the disk is full"):
        work(run, RunPlace(tmp_path, run.name), retry=False)


def test_an_evaluation_that_is_not_recorded_is_no_reason_to_start_again_for_ever(run, place, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(evaluate, "main", lambda argv: 0)
        with pytest.raises(UserError, match=r"eval\.jsonl cannot be written"):
            work(run, place, retry=False)
    assert place.state() == STOPPED
    assert work(run, place, retry=False) == (TRAINED, "")


def test_a_run_leaves_no_thread_and_no_handler_behind(tiny, tmp_path):
    """What it opens in a process it closes, whichever way it ends."""

    def ends_of_runs(out):
        run_all(dataclasses.replace(sweep, runs=sweep.runs[1:]), out)
        return threading.active_count(), [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]

    sweep = expand("mixed", "cpu", tiny)
    first = ends_of_runs(tmp_path / "first")  # libraries keep the threads that they begin with
    assert ends_of_runs(tmp_path / "second") == first


def test_status_says_which_key_has_changed_since_a_run_had_another_name(run, place, tiny, tmp_path, capsys):
    with place.claim():
        write_asked(place, run)
    changed = tmp_path / "changed.py"
    with open(tiny, encoding="utf-8") as file:
        changed.write_text(file.read().replace("config.training.steps = 16, 6", "config.training.steps = 16, 8"))
    asked = place.notes / "asked.json"
    asked.write_text(asked.read_text().replace(tiny, str(changed)))
    assert command.main(["lr", "status", "--config", str(changed), "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert f"was {run.name}: training.steps was 6 and is 8" in said and said.count("was") == 2
