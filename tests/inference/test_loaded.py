"""A run used from Python: its logits and losses against full forward passes, and against what `evaluate` computes."""

import json
import logging
import math

import jax
import numpy as np
import pytest
from small_run import SEQ_LEN, small_config, write_small_run

from spannorm_jax import evaluate as command
from spannorm_jax.config_file import for_this_machine, override
from spannorm_jax.data.loader import eval_batches
from spannorm_jax.errors import UserError
from spannorm_jax.inference.loaded import load_run
from spannorm_jax.inference.scoring import windows
from spannorm_jax.run.folder import EVAL, is_evaluated, read_config, what_is_evaluated
from spannorm_jax.training.step import make_evaluate

# A token's loss, some nats, comes of float32 logits of a size of ten: 1e-6 each, and sums of a hundred lose no more.
CLOSE = 1e-5
TEXT = "def f(x):\n    return x  # é€😀\n" * 5


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return write_small_run(tmp_path_factory.mktemp("runs") / "run", small_config())


def loaded(workdir, step=None, **mesh):
    overrides = [(f"mesh.{axis}", str(size)) for axis, size in mesh.items()]
    return load_run(override(for_this_machine(read_config(workdir)), overrides), workdir, step, "loading")


@pytest.fixture(scope="module")
def run(workdir):
    return loaded(workdir)


def by_hand(run, ids):
    """Nats of each id but the first of one window, by the definition, in float64."""
    padded = np.zeros((8, SEQ_LEN), np.int32)  # causal: what comes after does not matter; a row a device
    padded[0, : len(ids) - 1] = ids[:-1]
    logits = np.asarray(run.logits(padded), np.float64)[0, : len(ids) - 1]
    peak = logits.max(-1, keepdims=True)
    return (np.log(np.exp(logits - peak).sum(-1)) + peak[:, 0]) - logits[np.arange(len(ids) - 1), ids[1:]]


@pytest.mark.parametrize("length", [2, 17, SEQ_LEN + 1])
def test_a_sequence_within_a_window_is_scored_to_its_last_token(run, length):
    ids = np.random.default_rng(length).integers(256, size=length).tolist()
    want = by_hand(run, ids)
    for scored in {1, length // 2, length - 1}:
        [(nll, right)] = run.score([(ids, scored)])
        np.testing.assert_allclose(nll, want[-scored:], rtol=CLOSE)
        assert right.shape == nll.shape


def test_context_is_cut_from_the_left_by_tokens_and_the_boundary_stays(run):
    ids = np.random.default_rng(1).integers(256, size=3 * SEQ_LEN).tolist()
    [(nll, _)] = run.score([(ids, 5)])
    np.testing.assert_allclose(nll, by_hand(run, ids[-SEQ_LEN - 1 :])[-5:], rtol=CLOSE)


def test_what_is_longer_than_a_window_is_scored_once_each(run):
    ids = list(range(100))
    cut = windows(ids, 90, SEQ_LEN)
    assert [row[-n:] for row, n in cut] == [ids[10:42], ids[42:74], ids[74:]]
    [(nll, _)] = run.score([(ids, 90)])
    np.testing.assert_allclose(nll, np.concatenate([by_hand(run, row) for row, _ in cut]), rtol=CLOSE)
    assert [nll.size for nll, _ in run.score([(ids, 0), ([1, 2], 1)])] == [0, 1]


def test_answers_stand_in_the_order_of_the_requests_and_a_shape_compiles_once(workdir, caplog):
    run, rng = loaded(workdir), np.random.default_rng(2)
    lengths = [2, 40, 9, 31, 5, 33, 64, 3, 100, 17, *rng.integers(2, 100, size=30)]
    sequences = [(rng.integers(256, size=n).tolist(), int(n) - 1) for n in lengths]
    alone = [run.score([sequence])[0] for sequence in sequences[:10]]
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        together = run.score(sequences)
    assert not [r for r in caplog.records if r.getMessage().startswith("Compiling") and "score" in r.getMessage()]
    for (nll, right), (want, want_right) in zip(together[:10], alone, strict=True):
        np.testing.assert_allclose(nll, want, rtol=CLOSE)
        assert right.tolist() == want_right.tolist()


def test_a_texts_loss_is_that_of_evaluate_on_the_same_document(run):
    """Every token of a store that holds an end of text and the document, in evaluate's own windows and program."""

    class Store:
        tokens = np.array(run.document(TEXT)[0])
        num_tokens = len(tokens)

    assert len(TEXT.encode()) > 4 * SEQ_LEN
    totals = {"nll": 0.0, "count": 0.0}
    with jax.set_mesh(run.mesh):
        program = make_evaluate(run.config, run.model, run.mesh)
        for tokens, weights in eval_batches(Store, SEQ_LEN, 0, run.config.eval.batch_size):
            sums = program(run.params, run.model_state, {"tokens": tokens, "weights": weights})
            totals = {name: total + float(sums[name]) for name, total in totals.items()}
    got = run.loss(TEXT)
    assert got["loss"] == pytest.approx(totals["nll"] / totals["count"], rel=CLOSE)
    assert (got["tokens"], got["bytes"]) == (totals["count"], len(TEXT.encode()))
    assert got["bits_per_byte"] == pytest.approx(totals["nll"] / math.log(2) / got["bytes"], rel=CLOSE)


def test_a_checkpoint_on_other_meshes_scores_the_same(run, workdir):
    sequences = [(list(range(n)), n - 1) for n in (9, 50)]
    want = np.concatenate([nll for nll, _ in run.score(sequences)])
    for mesh in ({"data": 1, "fsdp": 8}, {"data": 4, "fsdp": 2}):
        got = np.concatenate([nll for nll, _ in loaded(workdir, **mesh).score(sequences)])
        np.testing.assert_allclose(got, want, rtol=CLOSE)


def test_texts_are_sampled_as_by_the_command_and_steps_are_chosen(run, workdir):
    assert run.step == 2 and loaded(workdir, 1).step == 1
    first, second = run.sample("def ", "x", max_tokens=9, temperature=0)
    assert [first] == run.sample("def ", max_tokens=9, temperature=0) and first != second
    with pytest.raises(UserError, match="--max_tokens 0"):
        run.sample("x", max_tokens=0)


# ---- tasks, where the harness is not installed -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--tasks", "x"], "pip install 'spannorm_jax[eval]'"),
        (["--tasks", ","], "names no task"),
        (["--limit", "3"], "names no task"),
        (["--tasks", "x", "--limit", "0"], "--limit 0"),
        (["--tasks", "x", "--include_path", "/nowhere"], "/nowhere is no folder"),
    ],
)
def test_tasks_that_cannot_be_asked_for_are_one_line(monkeypatch, workdir, argv, words):
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as refused:
        command.main(["--workdir", str(workdir), *argv])
    assert words in str(refused.value)


def test_a_line_of_tasks_is_no_evaluation_of_held_out_loss(tmp_path):
    config = small_config()
    line = what_is_evaluated(config, 2)
    for more, evaluated in (({"tasks": []}, False), ({}, True)):
        (tmp_path / EVAL).write_text(json.dumps(line | more) + "\n")
        assert is_evaluated(tmp_path, config, 2) == evaluated
