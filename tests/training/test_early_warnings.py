"""Early warnings in training: their numbers against the model itself, when a line holds them, what TensorBoard sees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_model import BATCH, SEQ_LEN, batch, configure, drawn_params, program_of, start

from spannorm_jax.config import is_runtime, replace
from spannorm_jax.model.definition import define
from spannorm_jax.model.layers import rotary_angles
from spannorm_jax.model.placement import PLACEMENTS
from spannorm_jax.run.metrics import scalars
from spannorm_jax.sweep.expansion import identity
from spannorm_jax.training.numbers import numbers_of
from spannorm_jax.training.signal import forward_signal
from spannorm_jax.training.step_log import StepLog, host_metrics
from spannorm_jax.training.tasks.text import TEXT

DEPTH = 2


def by_hand(placement, tokens):
    """Root mean square and largest logit of each block, one block after another, every logit written out."""
    cfg = configure(model__placement=placement).model
    decoder = define(cfg).bind(drawn_params(placement))
    K, angles = cfg.width // cfg.num_heads, rotary_angles(tokens.shape[1], cfg.width // cfg.num_heads, cfg.rope_theta)
    seen = {"stream_rms": [], "attention_logit_max": []}
    graph, state = nnx.split(decoder.stacks[False])
    stream = PLACEMENTS[placement].enter(decoder.embeddings(tokens), decoder.ends)
    for layer in range(DEPTH):
        block = nnx.merge(graph, jax.tree.map(lambda x, layer=layer: x[layer], state))

        def attn(x, block=block):
            q, k, _ = map(np.asarray, block.attn.qkv(x, angles))
            logits = np.einsum("bthk,bshk->bhts", q, k) / np.sqrt(K)
            seen["attention_logit_max"].append(logits[..., np.tri(tokens.shape[1], dtype=bool)].max())
            return block.attn(x, angles)

        stream, _ = block(stream, layer, attn, block.feed_forward)
        seen["stream_rms"].append(np.sqrt(np.mean(np.square(jax.tree.leaves(stream)[0]))))
    return seen


@pytest.mark.parametrize("placement", ["pre", "span", "siamese"])
def test_the_forward_numbers_are_those_of_the_blocks(placement):
    model = define(configure(model__placement=placement).model)
    got = jax.jit(lambda p, t: forward_signal(model, TEXT.inputs, 1, p, {}, t))(drawn_params(placement), batch())
    for name, want in by_hand(placement, batch()["tokens"][:, :-1]).items():
        np.testing.assert_allclose(got[name], want, rtol=1e-5, err_msg=name)


def test_of_microbatches_the_first_is_looked_at():
    """Rows 0, 4 of 8: the same rows that the step's first piece has."""
    model = define(configure().model)
    got = jax.jit(lambda p, t: forward_signal(model, TEXT.inputs, 4, p, {}, t))(drawn_params(), batch())
    want = jax.jit(lambda p, t: forward_signal(model, TEXT.inputs, 1, p, {}, t))(
        drawn_params(), {"tokens": batch()["tokens"][::4]}
    )
    assert len(batch()["tokens"]) == BATCH == 8
    for name in want:
        np.testing.assert_array_equal(got[name], want[name])


@pytest.fixture(scope="module")
def stepped():
    """(config, state before, state after, metrics) of a step whose gradient is clipped."""
    config = configure(optim__clip_norm=0.01, optim__warmup_fraction=0.0, training__z_loss=0.1)
    program = program_of(config)
    before = jax.tree.map(np.asarray, drawn_params())
    state, metrics = program.train(start(program, drawn_params()), batch(), numbers_of(config))
    return config, before, jax.device_get(state.params), jax.device_get(metrics)


def test_norms_of_updates_and_weights_are_those_of_the_weights_before_and_after(stepped):
    """Differences of float32 weights round: 1e-7 of a weight."""
    config, before, after, metrics = stepped
    got = forward_signal(define(config.model), TEXT.inputs, 1, before, {}, batch())
    for layer in range(DEPTH):
        flat = [np.concatenate([x[layer].ravel() for x in jax.tree.leaves(p["blocks"])]) for p in (before, after)]
        want = np.linalg.norm(np.float64(flat[1]) - flat[0])
        assert metrics["signal"]["update_norm"][layer] == pytest.approx(want, rel=1e-3)
        assert got["weight_norm"][layer] == pytest.approx(np.linalg.norm(flat[0]), rel=1e-5)


def test_log_z_and_the_clip_factor(stepped):
    config, before, _, metrics = stepped
    logits = np.asarray(define(config.model).bind(before)(batch()["tokens"][:, :-1]), np.float64)
    got = metrics["scalars"]
    assert got["log_z"] == pytest.approx(np.mean(np.log(np.sum(np.exp(logits), axis=-1))), rel=1e-5)
    assert got["clip_factor"] == pytest.approx(0.01 / got["grad_norm"], rel=1e-6)
    assert logits.shape[1] == SEQ_LEN


@pytest.mark.parametrize("clip_norm", [0.0, 1e6])
def test_what_is_not_clipped_has_the_factor_one(clip_norm):
    config = configure(optim__clip_norm=clip_norm)
    program = program_of(config)
    _, metrics = program.train(start(program, drawn_params()), batch(), numbers_of(config))
    assert float(metrics["scalars"]["clip_factor"]) == 1


def logged(every, log_every=1, steps=20):
    """Steps whose lines hold early warnings."""
    log = object.__new__(StepLog)
    log._config = configure(
        metrics__signal_every=every, metrics__log_every=log_every, training__steps=steps, training__batch_size=8
    )
    return [step for step in range(1, steps + 1) if log.takes_signal(step)]


def test_when_a_line_holds_them():
    assert logged(0) == []
    assert logged(7) == [1, 7, 14, 20]
    assert logged(5, log_every=10) == [1, 10, 20]  # what no line would hold is not computed


def test_it_says_nothing_of_what_a_run_is():
    config = configure()
    assert is_runtime("metrics.signal_every")
    assert identity(config) == identity(replace(config, metrics__signal_every=3))


def test_tensorboard_sees_the_largest_of_each_list():
    metrics = host_metrics({"update_ratio": jnp.array([1.0, 3.0, 2.0]), "log_z": jnp.array(4.0)})
    line = {"step": 5, **metrics, "machine_s": {"mfu": None, "memory_bytes": 7}}
    assert scalars(line) == {"step": 5, "log_z": 4.0, "memory_bytes": 7, "largest/update_ratio": 3.0}
