"""The command lines: a record of a model at initialisation and of a checkpoint, its figures, and what is refused."""

import json
import math

import jax
import numpy as np
import pytest

from spannorm_jax import evaluate
from spannorm_jax.analysis import figures, signal
from spannorm_jax.analysis.groups import Settings
from spannorm_jax.analysis.measure import probe_batch
from spannorm_jax.analysis.quantities import QUANTITIES
from spannorm_jax.command import run_command
from spannorm_jax.config import CheckpointConfig, to_dict
from spannorm_jax.config_file import load, resolve_without_data
from spannorm_jax.durable import write_json
from spannorm_jax.model.definition import define
from spannorm_jax.run.checkpoint import Checkpoints
from spannorm_jax.run.folder import CHECKPOINTS, CONFIG
from spannorm_jax.run.state import TrainState
from spannorm_jax.training.numbers import numbers_of
from spannorm_jax.training.optimizer import make_optimizer

SPEC = "configs/dense.py:depth=2,width=16,placement=span,init=plain"
PREDICTION = {"placement": "span", "init": "plain", "ffn": "swiglu", "depth": 2, "width": 16, "tokens": 16}


@pytest.fixture
def command(monkeypatch, capsys):
    def run(module, *argv, code=0):
        monkeypatch.setattr("sys.argv", ["command", *map(str, argv)])
        with pytest.raises(SystemExit) as exit_:
            run_command(module.main)
        printed = capsys.readouterr()
        assert exit_.value.code == code, printed.err
        if code:
            assert printed.err.count("\n") == 1 and "Traceback" not in printed.err + printed.out
        return printed.err if code else printed.out

    return run


def run_of(folder, spec=SPEC, factor=1.0):
    """A run's folder with one checkpoint, of step 5: initial weights times a factor."""
    config = resolve_without_data(load(spec), platform="cpu")
    model = define(config.model)
    params = jax.tree.map(lambda x: factor * x, jax.jit(model.init)(jax.random.key(3)))
    return saved(folder, config, TrainState(np.int32(5), params, {}, model.init_model_state()))


def saved(folder, config, state):
    folder.mkdir()
    write_json(folder / CONFIG, to_dict(config))
    saving = Checkpoints(folder / CHECKPOINTS, CheckpointConfig())
    saving.save(int(state.step), state, {"step": int(state.step), "config": to_dict(config)})
    saving.close()
    return folder


@pytest.fixture
def workdir(tmp_path):
    return run_of(tmp_path / "run")


def test_a_record_of_a_checkpoint_and_its_figures(command, workdir, tmp_path):
    """With a prediction beside it: one record that has the keys of analysis.theory."""
    out = tmp_path / "records" / "signal.json"
    options = ("--tokens", 16, "--only", "forward,backward", "--out", out, "--json")
    printed = command(signal, "--workdir", workdir, *options)
    record = json.loads(printed)
    assert json.loads(out.read_text()) == record
    assert record["step"] == 5 and record["config"]["model"]["placement"] == "span"
    assert {"command", "git_commit", "versions", "device"} <= set(record) and record["data"]["fingerprint"]
    settings = Settings(tokens=16, only=["forward", "backward"])
    assert record["settings"] == vars(settings)
    assert len(record["stream_variance"]) == 2 and record["stream_grad_norm"][-1] == 1
    assert "skip_loss_change" not in record
    predicted = tmp_path / "predicted.json"
    predicted.write_text(json.dumps(PREDICTION | {"stream_variance": [1.0, 1.0]}))
    drawn = command(figures, out, predicted, "--out", tmp_path / "figures").split()
    assert str(tmp_path / "figures" / "stream_variance.svg") in drawn
    assert (tmp_path / "figures" / "stream_variance.png").stat().st_size > 1000
    svg = (tmp_path / "figures" / "stream_variance.svg").read_text()
    assert all(word in svg for word in ("span", "measured", "predicted"))


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("factor", [math.nan, 1e20, 0.0])
@pytest.mark.parametrize("spec", [SPEC, "configs/moe.py:depth=2,width=16,placement=pre"])
def test_of_weights_that_are_not_finite_each_number_is_null(command, tmp_path, spec, factor):
    """So are those of weights whose stream is too large, or nothing at all. Every group, the table and the figures."""
    run, out = run_of(tmp_path / "run", spec, factor), tmp_path / "signal.json"
    table = command(signal, "--workdir", run, "--tokens", 16, "--fit_tokens", 64, "--out", out)
    assert "nan" not in table and "inf" not in table
    record = json.loads(out.read_text(), parse_constant=pytest.fail)
    whole = [record[key] for key in ("loss", "useful_share", "entry_variance", "update_logits_change")]
    of_blocks = {key: record[key] for key in QUANTITIES if key in record and key != "skip_path"}
    counted = ("expert_load", "expert_load_max", "router_entropy")  # a router chooses some expert all the same
    if math.isnan(factor):
        assert whole == [None] * 4
        assert {value for key, row in of_blocks.items() if key not in counted for value in row} == {None}
    else:
        assert record["loss"] is not None and record["effective_rank"] == [None, None]
    assert str(tmp_path / "figures" / "skip_path.svg") in command(figures, out, "--out", tmp_path / "figures")


def test_a_table_of_a_model_at_initialisation(command):
    printed = command(signal, "--config", SPEC, "--tokens", 16, "--only", "forward")
    assert "span / plain: 2 blocks, width 16, step 0" in printed and "correlation" in printed
    assert len(printed.strip().splitlines()) == 6


def test_random_text_has_no_token_twice_in_a_row():
    config = resolve_without_data(load(SPEC, [("model.vocab_size", "256")]), platform="cpu")
    batch, fit_batch, _ = probe_batch(config, None, Settings("random", 200, 3, only=("forward",)))
    tokens = batch["tokens"]
    assert tokens.shape == (3, 201) and fit_batch is None
    assert all(len(set(row)) == 201 for row in tokens.tolist()) and len(set(tokens[:, 0].tolist())) > 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--text", "random"], "--text random is of task=text"),
        (["--tokens", 8], "--tokens is of task=text: an image has all its patches, 4 here"),
        (["--rows", 361], "--rows asks for 361 images, and the split of digits/1.0.0 has 360"),
    ],
)
def test_an_image_has_all_its_patches(command, options, says):
    assert says in command(signal, "--config", "configs/vision.py:tiny,depth=2,width=16", *options, code=2)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--tokens", 1], ["--tokens", "2 or more"]),
        (["--fit_tokens", 16, "--tokens", 16], ["--fit_tokens", "16 tokens", "17 unknowns", "68 or more"]),
        (["--rows", 10**8], ["--rows", "100000000", "validation"]),
        (["--text", "randm"], ["'randm'", "'random'"]),
        (["--text", "random", "--tokens", 256], ["--text random", "256 for 257", "--tokens 255"]),
        (["--only", "forwards"], ["'forwards'", "'forward'"]),
        (["--only", ","], ["--only", "forward, sharpness, skip"]),
        (["--probes", 0], ["--probes 0", "1 or more"]),
        (["--blocks", -1], ["--blocks -1 must be 0 or more"]),
        (["--step", 3], ["--step", "--workdir"]),
        (["--workdir", "runs/none"], ["--config", "--workdir"]),
    ],
)
def test_what_cannot_be_measured_is_one_line(command, options, says):
    line = command(signal, "--config", SPEC, *options, code=2)
    assert all(part in line for part in says), line


def test_a_checkpoint_that_is_not_there_or_of_another_run(command, workdir):
    line = command(signal, "--workdir", workdir, "--step", 4, code=2)
    assert "no checkpoint of step 4" in line and "5" in line
    line = command(signal, "--workdir", workdir, "--config.model.depth=3", code=2)
    assert "model.depth" in line and "measuring" in line
    config = resolve_without_data(load(SPEC, [("model.depth", "3")]), platform="cpu")
    write_json(workdir / CONFIG, to_dict(config))
    for module in (signal, evaluate):
        line = command(module, "--workdir", workdir, code=2)
        assert all(part in line for part in ("of another run", "model.depth=2", "has 3")), line


def test_files_without_a_record_or_without_a_number_make_no_figures(command, tmp_path):
    path = tmp_path / "x.json"
    assert "cannot be read" in command(figures, path, "--out", tmp_path, code=2)
    for text, says in (
        ("{", "is no record of analysis.signal"),
        ('{"depth": 3}', "is no record of analysis.signal"),
        ("3", "is no record of analysis.signal"),
        (json.dumps(PREDICTION | {"stream_variance": [None, None]}), "nothing to draw"),
    ):
        path.write_text(text)
        assert says in command(figures, path, "--out", tmp_path, code=2)


def test_sharpness_of_a_checkpoint_takes_its_own_moments(command, tmp_path):
    spec = "configs/dense.py:depth=1,width=16,placement=pre,init=plain"
    config = resolve_without_data(load(spec), platform="cpu")
    model = define(config.model)
    params = jax.jit(model.init)(jax.random.key(config.seed))
    optimizer = make_optimizer(config.optim, model, numbers_of(config))
    ones = jax.tree.map(np.ones_like, params)
    _, opt_state = optimizer.update(ones, optimizer.init(params), params)
    folder = saved(tmp_path / "run", config, TrainState(np.int32(1), params, opt_state, {}))
    found = json.loads(command(signal, "--workdir", folder, "--only", "sharpness", "--tokens", 8, "--json"))
    # Every gradient was alike, so that P is a number: that after one update of the clipped gradient.
    P = (1 - 0.9) / np.sqrt(sum(x.size for x in jax.tree.leaves(params)))
    assert found["preconditioned_sharpness"] == pytest.approx(found["sharpness"] / P, rel=0.02)
    assert found["step"] == 1 and "loss" not in found
