"""Runs as a user sees them: whole processes, killed, stopped, continued, evaluated."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from processes import LIMIT_S, finish, launch, lines_of, metrics, paused

from spannorm_jax.model.definition import define
from spannorm_jax.parallel.mesh import make_mesh
from spannorm_jax.run.folder import read_config
from spannorm_jax.training.numbers import numbers_of
from spannorm_jax.training.step import make_program

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


def train(env, workdir, *overrides, code=0):
    return finish(launch(env, "train", *TINY, "--workdir", workdir, *overrides), code)


def train_until(env, workdir, text, number, *overrides):
    """A training process that gets a signal at the moment when it has printed a line that starts with `text`."""
    process = launch(env, "train", *TINY, "--workdir", workdir, *overrides, pause_at=text)
    paused(process)
    process.send_signal(number)
    process.send_signal(signal.SIGCONT)
    return process


def evaluate(env, workdir, *argv, devices=1):
    out, _ = finish(launch(env, "evaluate", "--workdir", workdir, "--json", *argv, devices=devices))
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
    assert sorted(int(p.name) for p in (unbroken / "checkpoints").iterdir()) == [35, 40]  # the newest


def test_every_metric_of_the_step_is_in_the_lines(env, tmp_path):
    """Of a model that has all of them. A metric that is new in train_step needs no other line of code."""
    options = ("--config.training.steps=2", "--config.metrics.block_grad_every=1", "--config.metrics.tensorboard=false")
    model = "--config=configs/moe.py:depth=2,width=32"
    finish(launch(env, "train", model, *options, "--config.data.seq_len=32", "--workdir", tmp_path / "run"))
    config = read_config(tmp_path / "run")
    program = make_program(config, define(config.model, config.execution), make_mesh(config.mesh, jax.devices()[:1]))
    groups = jax.eval_shape(program.train, program.abstract_state, program.abstract_batch, numbers_of(config))[1]
    assert list(groups.pop("diagnosis")) == ["other_grad_norm"]  # the one that names what is not finite
    made = {name: shape.shape for group in groups.values() for name, shape in group.items()}
    assert made["expert_load_max"] == made["block_grad_norm"] == (2,) and made["aux_loss"] == ()
    for line in metrics(tmp_path / "run"):
        assert {name: np.shape(line.get(name)) for name in made} == made


def test_the_held_out_loss_of_training_is_that_of_evaluation_also_over_a_kill(env, unbroken, tmp_path):
    workdir = tmp_path / "evaluated"
    often = ("--config.eval.every_steps=9", "--config.metrics.log_every=6")
    process = train_until(env, workdir, "step 20/", signal.SIGKILL, *often, "--config.metrics.log_every=1")
    process.communicate(timeout=LIMIT_S)
    train(env, workdir, *often)  # which may change when a run goes on, as its metrics do
    lines = {line["step"]: line for line in metrics(workdir)}
    held_out = {step: line["held_out_loss"] for step, line in lines.items() if "held_out_loss" in line}
    assert list(held_out) == [9, 18, 27, 36, 40] and len(lines) < STEPS
    for step, line in lines.items():  # measuring changes no number of training
        was = metrics(unbroken)[step - 1]
        assert {key: line[key] for key in was} == was
    result = evaluate(env, workdir)
    last = lines[STEPS]
    assert (last["held_out_loss"], last["held_out_bits_per_byte"]) == (result["loss"], result["bits_per_byte"])
    again = tmp_path / "again"
    train(env, again, *often, "--config.checkpoint.every_steps=9")
    lines_again = {line["step"]: line for line in metrics(again)}
    assert {step: lines_again[step]["held_out_loss"] for step in held_out} == held_out
    assert evaluate(env, again, "--step", 36)["loss"] == held_out[36]


def test_held_out_rows_that_the_mesh_does_not_divide_are_refused_before_the_first_step(env, tmp_path):
    argv = (*TINY, "--workdir", tmp_path / "run", "--config.eval.every_steps=9", "--config.eval.batch_size=12")
    _, err = finish(launch(env, "train", *argv, devices=8), code=2)
    assert err.count("\n") == 1 and "eval.batch_size=12" in err
    assert not (tmp_path / "run").exists()


def train_patched(env, workdir, patch, code=0):
    """Four steps of training in a process whose loop has been changed by the Python of `patch`."""
    program = f"{patch}\nimport sys\nfrom spannorm_jax.train import main\nsys.exit(main(sys.argv[1:]))"
    more = ("--config.training.steps=4", "--config.checkpoint.every_steps=0", "--workdir", str(workdir))
    command = [sys.executable, "-c", program, *TINY, *more]
    return finish(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True), code)


def test_the_loop_refuses_an_implicit_transfer(env, tmp_path):
    patch = """
from spannorm_jax.training.batches import Batches
Batches.__next__ = lambda self: self._read_part(1, (0, 8))  # on the host
"""
    _, err = train_patched(env, tmp_path / "run", patch, code=1)
    assert "Disallowed host-to-device transfer" in err
    assert metrics(tmp_path / "run") == []


def test_the_loop_waits_for_a_step_when_the_next_is_dispatched(env, tmp_path):
    patch = """
from spannorm_jax.training import step_log
from spannorm_jax.training.batches import Batches
take, read = Batches.__next__, step_log.host_metrics
def next_batch(self):
    print("seen take")
    return take(self)
def host_metrics(metrics):
    print("seen read")
    return read(metrics)
Batches.__next__, step_log.host_metrics = next_batch, host_metrics
"""
    out, _ = train_patched(env, tmp_path / "run", patch)
    seen = [line.split()[1] for line in out.splitlines() if line.startswith("seen")]
    assert seen == ["take", *["take", "read"] * 3, "read"]


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


def test_a_finished_run_is_not_run_again_whatever_touches_no_number(env, unbroken):
    before = (unbroken / "metrics.jsonl").read_bytes()
    out, _ = train(env, unbroken, "--config.metrics.console_every_s=9")
    assert "done already" in out and (unbroken / "metrics.jsonl").read_bytes() == before


def test_another_config_in_the_folder_is_refused_and_nothing_changes(env, unbroken):
    before = {p: p.read_bytes() for p in unbroken.iterdir() if p.is_file()}
    _, err = train(env, unbroken, "--config.optim.lr=0.5", code=2)
    assert err.count("\n") == 1 and "optim.lr=0.003, not 0.5" in err and "--workdir" in err
    assert {p: p.read_bytes() for p in unbroken.iterdir() if p.is_file()} == before


def test_evaluation_measures_the_checkpoint_it_names(env, unbroken):
    newest, older = evaluate(env, unbroken), evaluate(env, unbroken, "--step", 35)
    assert (newest["step"], older["step"]) == (40, 35) and newest["loss"] != older["loss"]
    assert newest["perplexity"] == pytest.approx(np.exp(newest["loss"]), rel=1e-12)
    assert newest["tokens"] == 4000
    # One byte a token but for the ends of documents, which carry nats and no bytes.
    bits = newest["loss"] * newest["tokens"] / np.log(2)
    assert newest["bits_per_byte"] == pytest.approx(bits / newest["bytes"], rel=1e-12)
    # Floors are of the same predictions: a unigram is worse than a 3-gram, and all are above zero.
    assert 0 < newest["floors"]["fourgram"] < newest["floors"]["trigram"] < newest["floors"]["unigram"]
    assert newest["tokens"] - 5 <= newest["bytes"] <= newest["tokens"]
    assert lines_of(unbroken / "eval.jsonl")[-2:] == [newest, older]
    # Near the training loss: neither memory of 10k tokens nor another distribution shows at step 40.
    assert newest["loss"] == pytest.approx(metrics(unbroken)[-1]["loss"], rel=0.15)


def test_evaluation_on_another_mesh_gives_the_same_loss(env, unbroken):
    one = evaluate(env, unbroken)
    for mesh in (("--config.mesh.tensor=2",), ("--config.mesh.fsdp=8",)):
        eight = evaluate(env, unbroken, *mesh, devices=8)
        # Float32 sums in another order: 4000 terms of size 3 err by about 1e-7 each, relatively.
        assert eight["loss"] == pytest.approx(one["loss"], rel=2e-6)
        assert eight["accuracy"] == pytest.approx(one["accuracy"], abs=1e-3)


def test_a_checkpoint_that_is_not_there(env, unbroken):
    _, err = finish(launch(env, "evaluate", "--workdir", unbroken, "--step", 12), code=2)
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
        assert evaluate(env, workdir)["step"] == good


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_an_accelerator_that_is_absent_is_no_cpu_run(env, tmp_path, platform):
    if platform == "gpu" and Path("/dev/nvidiactl").exists():
        pytest.skip("there is a GPU")
    _, err = train(env, tmp_path / "run", f"--config.platform={platform}", code=2)
    assert err.count("\n") == 1 and f"platform={platform}" in err and "platform=auto" in err
    assert not (tmp_path / "run").exists()
