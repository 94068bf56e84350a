"""Runs as a user sees them: whole processes, killed, stopped, continued, evaluated."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from processes import LIMIT_S, paused, pausing

pytestmark = pytest.mark.process

# Checkpoints at 7, 14, ... are never on the step that a test stops at.
STEPS = 40
TINY = (
    "--config=configs/dense.py:depth=3,width=32,placement=span,init=scale",
    f"--config.training.steps={STEPS}",
    "--config.data.seq_len=32",
    "--config.checkpoint.every_steps=7",
    "--config.metrics.block_grad_every=10",
    "--config.metrics.console_every_s=0",
    "--config.eval.tokens=4000",
)


@pytest.fixture(scope="module")
def env(tmp_path_factory):
    """A user with one CPU device and caches of their own, shared by this module's processes."""
    home = tmp_path_factory.mktemp("home")
    return {
        **{key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")},
        "XDG_CACHE_HOME": str(home / "cache"),
        "TFDS_DATA_DIR": str(home / "tfds"),
        "JAX_PLATFORMS": "cpu",
    }


def start(env, module, *argv, devices=1, pause_at=None):
    name = f"spannorm_jax.{module}"
    return subprocess.Popen(
        [*(pausing(pause_at, name) if pause_at else (sys.executable, "-m", name)), *map(str, argv)],
        env={**env, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process, code=0):
    out, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == code, out + err
    return out, err


def train(env, workdir, *overrides, code=0):
    return finish(start(env, "train", *TINY, "--workdir", workdir, *overrides), code)


def train_until(env, workdir, text, number):
    """A training process that gets a signal at the moment when it has printed a line that starts with `text`."""
    process = start(env, "train", *TINY, "--workdir", workdir, pause_at=text)
    paused(process)
    process.send_signal(number)
    process.send_signal(signal.SIGCONT)
    return process


def metrics(workdir):
    """The lines of metrics.jsonl without what depends on the machine and the moment."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.endswith("_s")} for line in lines]


def evaluate(env, workdir, *argv, devices=1):
    out, _ = finish(start(env, "evaluate", "--workdir", workdir, "--json", *argv, devices=devices))
    assert out.count("\n") == 1
    return json.loads(out)


@pytest.fixture(scope="module")
def unbroken(env, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "unbroken"
    train(env, workdir)
    return workdir


def test_a_run_learns_and_leaves_its_records(unbroken):
    lines = metrics(unbroken)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert lines[-1]["loss"] < 0.75 * lines[0]["loss"]  # 5.9 -> 3.5 when written
    assert [line["step"] for line in lines if "block_grad_norm" in line] == [1, 10, 20, 30, 40]
    # The per-block norms and the global one come from the same gradient: no block can exceed it.
    assert all(max(line["block_grad_norm"]) < line["grad_norm"] for line in lines if "block_grad_norm" in line)
    start = json.loads((unbroken / "starts.jsonl").read_text())
    config = json.loads((unbroken / "config.json").read_text())
    assert start["data"]["fingerprint"] == config["data"]["fingerprint"] and start["versions"]["jax"]
    assert config["model"]["dtype"] == "float32" and config["model"]["vocab_size"] == 256  # nothing left open
    assert json.loads((unbroken / "DONE").read_text()) == {"step": STEPS}
    assert list((unbroken / "tensorboard").iterdir())


def test_the_newest_checkpoints_are_kept(unbroken):
    assert sorted(int(p.name) for p in (unbroken / "checkpoints").iterdir()) == [35, 40]


def test_killed_and_started_again_ends_bitwise_the_same(env, unbroken, tmp_path):
    workdir = tmp_path / "killed"
    for text in ("step 3/", "step 16/", "step 29/"):  # before the first checkpoint, then between two
        process = train_until(env, workdir, text, signal.SIGKILL)
        process.communicate(timeout=LIMIT_S)
        assert process.returncode == -signal.SIGKILL and not (workdir / "DONE").exists()
    with open(workdir / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 30, "lo')  # what a crash in the middle of a write leaves
    out, _ = train(env, workdir)
    assert "continuing after step" in out
    assert metrics(workdir) == metrics(unbroken)
    assert evaluate(env, workdir) == evaluate(env, unbroken)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_saves_and_the_same_command_goes_on(env, unbroken, tmp_path, number):
    workdir = tmp_path / "stopped"
    out, err = finish(train_until(env, workdir, "step 10/", number))
    assert "the same command goes on" in out and "Traceback" not in err
    saved = max(int(p.name) for p in (workdir / "checkpoints").iterdir())
    assert saved >= 10 and f"saved at step {saved}" in out and not (workdir / "DONE").exists()
    out, _ = train(env, workdir)
    assert f"continuing after step {saved}" in out
    assert metrics(workdir) == metrics(unbroken)


def test_killed_after_the_last_save_a_run_is_only_declared_done(env, unbroken, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(unbroken, workdir)
    (workdir / "DONE").unlink()
    train(env, workdir)
    assert (workdir / "DONE").exists() and metrics(workdir) == metrics(unbroken)


def test_a_finished_run_is_not_run_again(env, unbroken):
    before = (unbroken / "metrics.jsonl").read_bytes()
    out, _ = train(env, unbroken)
    assert "done already" in out and (unbroken / "metrics.jsonl").read_bytes() == before


def test_another_config_in_the_folder_is_refused_and_nothing_changes(env, unbroken):
    before = {p: p.read_bytes() for p in unbroken.iterdir() if p.is_file()}
    _, err = train(env, unbroken, "--config.optim.lr=0.5", code=2)
    assert err.count("\n") == 1 and "optim.lr=0.003, not 0.5" in err and "--workdir" in err
    assert {p: p.read_bytes() for p in unbroken.iterdir() if p.is_file()} == before


def test_what_touches_no_number_may_change(env, unbroken):
    out, _ = train(env, unbroken, "--config.metrics.console_every_s=9")
    assert "done already" in out


def test_evaluation_measures_the_checkpoint_it_names(env, unbroken):
    newest, older = evaluate(env, unbroken), evaluate(env, unbroken, "--step", 35)
    assert (newest["step"], older["step"]) == (40, 35) and newest["loss"] != older["loss"]
    assert newest["perplexity"] == pytest.approx(np.exp(newest["loss"]), rel=1e-12)
    assert newest["tokens"] == 4000
    # One byte a token but for the ends of documents, which carry nats and no bytes.
    bits = newest["loss"] * newest["tokens"] / np.log(2)
    assert newest["bits_per_byte"] == pytest.approx(bits / newest["bytes"], rel=1e-12)
    assert newest["tokens"] - 5 <= newest["bytes"] <= newest["tokens"]
    lines = [json.loads(line) for line in (unbroken / "eval.jsonl").read_text().splitlines()]
    assert lines[-2:] == [newest, older]
    # Near the training loss: neither memory of 10k tokens nor another distribution shows at step 40.
    assert newest["loss"] == pytest.approx(metrics(unbroken)[-1]["loss"], rel=0.15)


def test_a_run_from_before_an_option_existed_is_read_with_its_default(env, unbroken, tmp_path):
    workdir = tmp_path / "older"
    shutil.copytree(unbroken, workdir)
    config = json.loads((workdir / "config.json").read_text())
    del config["model"]["qk_norm"], config["optim"]["schedule"]
    (workdir / "config.json").write_text(json.dumps(config))
    assert evaluate(env, workdir) == evaluate(env, unbroken)


def test_evaluation_on_another_mesh_gives_the_same_loss(env, unbroken):
    one = evaluate(env, unbroken)
    for mesh in (("--config.mesh.tensor=2",), ("--config.mesh.fsdp=8",)):
        eight = evaluate(env, unbroken, *mesh, devices=8)
        # Float32 sums in another order: 4000 terms of size 3 err by about 1e-7 each, relatively.
        assert eight["loss"] == pytest.approx(one["loss"], rel=2e-6)
        assert eight["accuracy"] == pytest.approx(one["accuracy"], abs=1e-3)


def test_a_checkpoint_that_is_not_there(env, unbroken):
    _, err = finish(start(env, "evaluate", "--workdir", unbroken, "--step", 12), code=2)
    assert err.count("\n") == 1 and "step 12" in err and "35, 40" in err


def test_a_nonfinite_loss_stops_with_the_last_good_checkpoint(env, tmp_path):
    workdir = tmp_path / "diverging"
    # A learning rate at which float32 overflows within a few steps of warm-up.
    out, err = train(env, workdir, "--config.optim.lr=1e30", "--config.checkpoint.every_steps=1", code=3)
    record = json.loads((workdir / "DIVERGED").read_text())
    assert f"stopped: step {record['step']}" in out and "Traceback" not in err
    met = record["step"] - 1  # the checkpoint with whose weights it happened: not a good one, though it is the newest
    assert record["where"] in out and f"that of step {met} holds the weights with which this happened" in out
    good = record["last_good_checkpoint"]
    assert good == (met - 1 if met > 1 else None)
    assert (f"last good checkpoint is step {good}" if good else "there is no good checkpoint") in out
    assert [line["step"] for line in metrics(workdir)] == list(range(1, record["step"]))
    assert not (workdir / "DONE").exists()
    if good:
        evaluate(env, workdir, "--step", good)  # it can be read


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_an_accelerator_that_is_absent_is_no_cpu_run(env, tmp_path, platform):
    if platform == "gpu" and Path("/dev/nvidiactl").exists():
        pytest.skip("there is a GPU")
    _, err = train(env, tmp_path / "run", f"--config.platform={platform}", code=2)
    assert err.count("\n") == 1 and f"platform={platform}" in err and "platform=auto" in err
    assert not (tmp_path / "run").exists()
