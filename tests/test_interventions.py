"""What an intervention holds after an update, and that a run with one is a run that reports read."""

import json

import jax
import numpy as np
import pytest
from small_model import configure, drawn_params

from experiments import interventions
from experiments.interventions import CAP, INTERVENTIONS, LARGEST_MOVE
from spannorm_jax.errors import UserError
from spannorm_jax.model.definition import define
from spannorm_jax.report.folders import find_runs
from spannorm_jax.training.signal import block_squares


@pytest.fixture(scope="module")
def model():
    return define(configure(model__placement="span").model)


def norms(w):
    return np.sqrt(np.sum(np.square(w), axis=tuple(range(1, w.ndim))))


def held(name, model, move):
    """Weights before and after an update that adds `move` times them, and what the intervention makes of it."""
    first = drawn_params()
    after = jax.tree.map(lambda w: w + move * w, first)
    return first, after, INTERVENTIONS[name](model, first, first, after)


@pytest.mark.parametrize(("name", "move", "ratio"), [("hold_norm", 3, 1), ("cap_norm", 3, CAP), ("cap_norm", 0.1, 1.1)])
def test_output_projections_keep_their_norms_and_nothing_else_moves(model, name, move, ratio):
    first, after, found = held(name, model, move)

    def check(spec, w0, w, new):
        if spec.site in interventions.OUTPUTS:
            np.testing.assert_allclose(norms(new), ratio * norms(w0), rtol=1e-6)
        else:
            np.testing.assert_array_equal(new, w)

    model.map_weights(check, first, after, found)


def test_a_blocks_update_is_clipped_with_its_direction(model):
    first, after, found = held("clip_blocks", model, 0.5)
    moved = jax.tree.map(np.subtract, found, first)
    share = np.sqrt(block_squares(model, moved) / block_squares(model, first))
    np.testing.assert_allclose(share, LARGEST_MOVE, rtol=1e-4)
    np.testing.assert_array_equal(found["embed"], after["embed"])
    _, after, found = held("clip_blocks", model, 0.01)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, after)


def test_each_tokens_embedding_has_a_mean_square_of_one(model):
    _, after, found = held("unit_embed", model, 0.5)
    embed = np.asarray(after["embed"], np.float64)
    np.testing.assert_allclose(found["embed"], embed / np.sqrt(np.mean(embed**2, 1, keepdims=True)), rtol=1e-5)
    assert {name for name in after if found[name] is not after[name]} == {"embed"}


def test_a_run_with_an_intervention_is_one_that_reports_read(tmp_path, capsys, monkeypatch, own_caches):
    small = ["--config", "configs/dense.py:tiny,depth=1,width=16", "--config.training.steps=2"]
    small += ["--config.data.seq_len=8", "--config.eval.tokens=64", "--least=0.01", "--greatest=0.012", "--seeds=2"]
    assert interventions.main(["hold_norm", *small, f"--out={tmp_path / 'out'}"]) == 0
    assert capsys.readouterr().out.endswith("hold_norm: ceiling below 0.01\n")  # two steps train nothing
    record = json.loads((tmp_path / "out" / "hold_norm.json").read_text())
    runs = find_runs([tmp_path / "out"])
    assert record["outcomes"] == {run.folder.name: "plateau" for run in runs} and len(runs) == 1
    assert record["ceiling"] == [None, 0.01] and {run.seed for run in runs} == {0}
    assert "experiments.interventions hold_norm" in runs[0].starts[0]["command"]

    def trained_again(*args):
        raise AssertionError("a run that has diverged ended then")

    out = f"--out={tmp_path / 'out'}"
    monkeypatch.setattr(interventions, "train", trained_again)
    (runs[0].folder / "DIVERGED").write_text('{"step": 2}')
    assert interventions.main(["hold_norm", *small, out]) == 0
    record = json.loads((tmp_path / "out" / "hold_norm.json").read_text())
    assert list(record["outcomes"].values()) == ["diverged"]
    (tmp_path / "out" / "hold_norm.json").unlink()
    (tmp_path / "out" / "hold_norm.json").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*hold_norm.json: Is a directory; mend that and repeat"):
        interventions.main(["hold_norm", *small, out])
    with pytest.raises(UserError, match="no intervention 'hold'; did you mean 'hold_norm'"):
        interventions.main(["hold", *small, out])
    with pytest.raises(UserError, match="the ladder needs"):
        interventions.main(["hold_norm", *small, out, "--greatest=inf"])
