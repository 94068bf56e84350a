"""The loss, its gradient, and the update: against plain NumPy, and against themselves done another way."""

import math
import re

import jax
import numpy as np
import pytest

from spannorm_jax.config import Config, MeshConfig, replace, resolve, validate
from spannorm_jax.model.decoder import define
from spannorm_jax.model.placement import PLACEMENTS
from spannorm_jax.parallel.mesh import make_mesh
from spannorm_jax.training.metrics import first_nonfinite
from spannorm_jax.training.optimizer import learning_rate
from spannorm_jax.training.step import gradients, loss_sums, make_program, num_loss_chunks

SEQ_LEN = 12


def make_config(**changes):
    small = {
        "model__depth": 2,
        "model__width": 16,
        "model__num_heads": 2,
        "model__vocab_size": 256,
        "data__seq_len": SEQ_LEN,
        "training__batch_size": 8,
        "training__steps": 20,
    }
    return resolve(replace(Config(), **small | changes), vocab_size=256, platform="cpu", fingerprint="")


def make_tokens(rows=8, seed=0):
    return np.random.default_rng(seed).integers(256, size=(rows, SEQ_LEN + 1), dtype=np.int32)


def grads_of(config, tokens, num_chunks=1):
    model = define(config.model)
    params = jax.jit(model.init)(jax.random.key(0))
    return jax.jit(lambda p: gradients(config, model, p, tokens, num_chunks))(params)


def assert_trees_close(a, b, rtol):
    """Each leaf within rtol of its largest entry."""
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=rtol * np.abs(y).max()), a, b)


@pytest.fixture
def one_device():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        yield mesh


# ---- the loss -----------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [2, 4, 8])
def test_accumulation_is_the_full_batch(k):
    tokens = make_tokens()
    whole, sums = grads_of(make_config(training__z_loss=1e-2), tokens)
    pieces, piece_sums = grads_of(make_config(training__z_loss=1e-2, training__num_microbatches=k), tokens)
    # The same float32 terms added in another order: 96 of them, a few roundings of 6e-8 each.
    assert_trees_close(pieces, whole, rtol=5e-6)
    np.testing.assert_allclose(piece_sums["nll"], sums["nll"], rtol=1e-6)
    assert piece_sums["count"] == sums["count"] == 8 * SEQ_LEN


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("chunks", [3, SEQ_LEN])
def test_a_chunked_loss_is_the_whole_loss(chunks, tied):
    config = make_config(training__z_loss=1e-2, model__tied_head=tied)
    whole, sums = grads_of(config, make_tokens())
    pieces, piece_sums = grads_of(config, make_tokens(), chunks)
    assert_trees_close(pieces, whole, rtol=5e-6)
    for key in sums:
        np.testing.assert_allclose(piece_sums[key], sums[key], rtol=1e-6)


def test_chunks_appear_when_the_logits_exceed_their_share_of_memory():
    """8 rows x 1024 tokens x 50304 words x 4 bytes = 1572 MiB: whole in 2048 MiB, in 2 or 8 pieces below."""
    big = {"model__vocab_size": 50304, "data__seq_len": 1024}
    mesh = {"data": 1, "fsdp": 1, "tensor": 1}
    for limit, chunks in [(2048, 1), (1024, 2), (256, 8)]:
        assert num_loss_chunks(make_config(training__max_logits_mib=limit, **big), mesh, rows=8) == chunks
    # Four devices share rows and words.
    shared = {"data": 2, "fsdp": 1, "tensor": 2}
    assert num_loss_chunks(make_config(training__max_logits_mib=512, **big), shared, rows=8) == 1


def test_sums_count_only_positions_with_weight():
    config = make_config()
    model = define(config.model)
    decoder = model.bind(jax.jit(model.init)(jax.random.key(0)))
    tokens = make_tokens(2)
    weights = np.ones((2, SEQ_LEN), np.float32)
    weights[1, 5:] = 0
    sums = loss_sums(decoder, tokens, weights, 1)
    logits = np.asarray(decoder(tokens[:, :-1]), np.float64)
    log_z = np.log(np.exp(logits).sum(-1))
    nll = log_z - np.take_along_axis(logits, tokens[:, 1:, None], -1)[..., 0]
    np.testing.assert_allclose(sums["nll"], (nll * weights).sum(), rtol=1e-6)
    np.testing.assert_allclose(sums["z"], (log_z**2 * weights).sum(), rtol=1e-6)
    assert sums["count"] == SEQ_LEN + 5
    assert sums["correct"] == ((logits.argmax(-1) == tokens[:, 1:]) * weights).sum()


# ---- the update -----------------------------------------------------------------------------------


@pytest.mark.parametrize("clip_norm", [0.0, 0.3])
def test_two_updates_are_those_of_adamw(one_device, clip_norm):
    """Against Loshchilov & Hutter 2019 (arXiv 1711.05101, algorithm 2) in float64, fed the package's gradients.

    Decay is on hidden matrices and the head alone; gains and the embedding move by Adam only.
    """
    config = make_config(optim__clip_norm=clip_norm, optim__weight_decay=0.5, optim__warmup_fraction=0.5)
    model, o = define(config.model), config.optim
    program = make_program(config, model, one_device)
    state = program.init(0)
    specs = model.specs()
    w = [np.asarray(x, np.float64) for x in jax.tree.leaves(state.params)]
    m, v = [np.zeros_like(x) for x in w], [np.zeros_like(x) for x in w]
    for t in (1, 2):
        tokens = make_tokens(seed=t)
        g, _ = jax.jit(lambda p, tokens=tokens: gradients(config, model, p, tokens, 1))(state.params)
        g = [np.asarray(x, np.float64) for x in jax.tree.leaves(g)]
        norm = math.sqrt(sum((x**2).sum() for x in g))
        state, metrics = program.train(state, jax.device_put(tokens, program.batch_sharding))
        np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
        assert norm > 0.3  # so that clipping clips
        g = [x * (min(1, clip_norm / norm) if clip_norm else 1) for x in g]
        lr = o.lr * t / 10  # warm-up takes 10 of 20 updates
        np.testing.assert_allclose(metrics["lr"], lr, rtol=1e-6)
        for i, spec in enumerate(specs):
            m[i] = o.b1 * m[i] + (1 - o.b1) * g[i]
            v[i] = o.b2 * v[i] + (1 - o.b2) * g[i] ** 2
            step = m[i] / (1 - o.b1**t) / (np.sqrt(v[i] / (1 - o.b2**t)) + o.eps)
            decay = 0.5 if spec.role in ("hidden", "output") else 0.0
            w[i] = w[i] - lr * (step + decay * w[i])
    assert int(state.step) == 2
    for mine, want, spec in zip(jax.tree.leaves(state.params), w, specs, strict=True):
        # Adam divides by |g|: where a gradient is below eps = 1e-8 its float32 error shows, on a step of at most lr.
        np.testing.assert_allclose(mine, want, rtol=2e-6, atol=2e-2 * o.lr * 0.2, err_msg=spec.site)
        assert np.mean(np.abs(mine - want)) < 1e-6, spec.site


def test_the_embedding_of_unseen_tokens_stays_as_it_was(one_device):
    """Neither decay nor Adam moves what has no gradient: a mistaken decay mask would."""
    config = make_config(optim__weight_decay=0.5)
    program = make_program(config, define(config.model), one_device)
    state = program.init(0)
    before = np.asarray(state.params["embed"])
    state, _ = program.train(state, jax.device_put(np.full((8, SEQ_LEN + 1), 7, np.int32), program.batch_sharding))
    after = np.asarray(state.params["embed"])
    assert (after[7] != before[7]).any()
    np.testing.assert_array_equal(np.delete(after, 7, 0), np.delete(before, 7, 0))


def test_the_learning_rate_warms_up_and_ends_where_it_should():
    config = make_config(training__steps=100, optim__lr=0.5, optim__warmup_fraction=0.2, optim__final_lr_fraction=0.1)
    rates = np.array([float(learning_rate(config, s)) for s in range(1, 101)])
    np.testing.assert_allclose(rates[:20], 0.5 * np.arange(1, 21) / 20, rtol=1e-6)  # no update is wasted on rate 0
    np.testing.assert_allclose(rates[59], 0.5 * (0.1 + 0.9 / 2), rtol=1e-6)  # half of the cosine
    np.testing.assert_allclose(rates[99], 0.05, rtol=1e-6)
    assert (np.diff(rates[19:]) < 0).all()
    assert float(learning_rate(make_config(optim__warmup_fraction=0.0), 1)) == pytest.approx(3e-3, rel=1e-2)
    # All warm-up: the peak is the last update.
    assert float(learning_rate(make_config(optim__warmup_fraction=1.0), 20)) == pytest.approx(3e-3)


def test_wsd_warms_up_stays_and_decays_in_straight_lines():
    shape = {"optim__warmup_fraction": 0.2, "optim__decay_fraction": 0.3, "optim__final_lr_fraction": 0.1}
    config = make_config(training__steps=100, optim__lr=0.5, optim__schedule="wsd", **shape)
    rates = np.array([float(learning_rate(config, s)) for s in range(1, 101)])
    s = np.arange(1, 101)
    want = np.where(s <= 20, 0.5 * s / 20, np.where(s <= 70, 0.5, 0.5 * (1 - 0.9 * (s - 70) / 30)))
    np.testing.assert_allclose(rates, want, rtol=1e-6)

    def ends(**changes):
        config = make_config(training__steps=3, optim__lr=0.5, optim__schedule="wsd", **shape | changes)
        return [float(learning_rate(config, s)) for s in (1, 2, 3)]

    # No decay: the peak to the end. Halves of three updates round to two and two: the warm-up keeps its two.
    assert ends(optim__warmup_fraction=0.0, optim__decay_fraction=0.0) == pytest.approx([0.5, 0.5, 0.5])
    assert ends(optim__warmup_fraction=0.5, optim__decay_fraction=0.5) == pytest.approx([0.25, 0.5, 0.05])
    assert ends(optim__warmup_fraction=0.0, optim__decay_fraction=1.0) == pytest.approx([0.35, 0.2, 0.05])


@pytest.mark.parametrize(("tokens", "steps"), [(1, 1), (96, 1), (97, 2), (960, 10), (961, 11)])
def test_tokens_become_the_least_steps_that_see_them(tokens, steps):
    """An update sees 8 x 12 = 96 tokens. The resolved config holds both numbers, is valid, and resolves to itself."""
    config = make_config(training__steps=0, training__tokens=tokens, optim__warmup_fraction=0.0)
    assert (config.training.steps, config.training.tokens) == (steps, tokens)
    validate(config)
    assert resolve(config, vocab_size=256, platform="cpu", fingerprint="") == config
    by_steps = make_config(training__steps=steps, optim__warmup_fraction=0.0)
    for update in (1, steps):
        assert learning_rate(config, update) == learning_rate(by_steps, update)


def test_a_profile_of_the_train_step_reads_like_the_paper(one_device):
    """Each stage has its name in the compiled step, and every matmul, forward or backward, stands under one."""
    config = make_config(model__qk_norm=True, training__num_microbatches=2)
    program = make_program(config, define(config.model), one_device)
    tokens = jax.ShapeDtypeStruct((8, SEQ_LEN + 1), "int32", sharding=program.batch_sharding)
    text = program.train.lower(program.abstract_state, tokens).compile().as_text()
    names = re.findall(r'op_name="(jit\(train_step\)[^"]*)"', text)
    stages = ["block/attention/" + s for s in ("qkv", "rope", "norm/q", "norm/k", "dot_product_attention", "out")]
    stages += ["block/norm/attn", "block/norm/ffn", "block/ffn", "embed", "norm/entry", "head", "loss", "accumulate"]
    stages += ["optimizer", "metrics"]

    def under(stage, name):  # a scope of the backward pass reads transpose(jvp(loss))
        return f"/{stage}/" in re.sub(r"\b(?:transpose|jvp)\(|\)", "", name)

    for stage in stages:
        assert any(under(stage, name) for name in names), stage
    matmuls = [name for name in names if name.endswith("dot_general")]
    assert matmuls
    for name in matmuls:
        assert any(under(stage, name) for stage in stages), name


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_one_sequence_is_learnt_by_heart(one_device, placement):
    config = make_config(model__placement=placement, training__steps=150, training__batch_size=1, optim__lr=1e-2)
    program = make_program(config, define(config.model), one_device)
    state, tokens = program.init(0), jax.device_put(make_tokens(1), program.batch_sharding)
    for _ in range(config.training.steps):
        state, metrics = program.train(state, tokens)
    assert metrics["loss"] < 0.05 and metrics["accuracy"] == 1  # from ln 256 = 5.5


def test_nothing_is_compiled_after_the_first_step(one_device):
    config = make_config()
    program = make_program(config, define(config.model), one_device)
    state = program.init(0)
    for step in range(3):
        tokens = jax.device_put(make_tokens(seed=step), program.batch_sharding)
        state, _ = program.train(state, tokens)
        assert program.train._cache_size() == 1


def test_a_step_leaves_no_copy_of_the_state_behind(one_device):
    config = make_config()
    program = make_program(config, define(config.model), one_device)
    state = program.init(0)
    program.train(state, jax.device_put(make_tokens(), program.batch_sharding))
    assert all(x.is_deleted() for x in jax.tree.leaves((state.params, state.opt_state)))


# ---- what is said of a number that is not finite ----------------------------------------------------


@pytest.mark.parametrize(
    ("blocks", "others", "says"),
    [
        ((), (), None),
        ((2, 1), (), "block 1 (counted from 0, the first of 2 such blocks)"),
        ((0, 1, 2), ("embed", "head"), "block 0 (counted from 0, the first of 3 such blocks)"),
        ((), ("head",), "head"),
    ],
)
def test_the_first_block_is_named(blocks, others, says):
    norms = {name: math.inf if name in others else 1.0 for name in ("embed", "ends", "head")}
    per_block = [math.nan if i in blocks else 1.0 for i in range(3)]
    total = math.nan if says else 1.0
    metrics = {"loss": 2.0, "grad_norm": total, "block_grad_norm": per_block, "other_grad_norm": norms}
    assert first_nonfinite(metrics) == (says and f"the gradient of {says}")


def test_a_number_that_is_not_finite_is_noticed_in_the_step_that_makes_it(one_device):
    """An infinite weight in block 1 makes the loss NaN, and backward that reaches every block."""
    config = make_config()
    program = make_program(config, define(config.model), one_device)
    state = program.init(0)
    state.params["blocks"]["attn"]["out"] = state.params["blocks"]["attn"]["out"].at[1].multiply(math.inf)
    _, metrics = program.train(state, jax.device_put(make_tokens(), program.batch_sharding))
    assert "block 0 (counted from 0, the first of 2 such blocks)" in first_nonfinite(jax.device_get(metrics))
