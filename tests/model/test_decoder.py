"""The whole decoder: sizes, FLOPs, and that scan, unroll, remat and compute dtype change what they say and no more."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.extend.core import jaxprs_in_params
from small_model import assert_trees_close, configure, program_of

import spannorm_jax
from spannorm_jax import config_file
from spannorm_jax.config import ExecutionConfig
from spannorm_jax.model import layers
from spannorm_jax.model.definition import count_params, define, flops_per_token
from spannorm_jax.model.placement import PLACEMENTS
from spannorm_jax.training.numbers import numbers_of
from spannorm_jax.training.tasks.text import loss_sums

CONFIGS = Path(spannorm_jax.__file__).parents[1] / "configs"
PRESETS = [("dense", preset) for preset in ("tiny", "124m", "350m", "1b")]
PRESETS += [("moe", preset) for preset in ("tiny", "8x124m", "64x8-124m", "16b")]


def small(**changes):
    return configure(model__depth=4, **changes).model


# ---- sizes ----------------------------------------------------------------------------------------------


MATRICES = {"swiglu": 3, "gelu": 2, "relu": 2}  # of a feed-forward


def hand_matrices(m, experts=0):
    """Weights of all blocks in matrices: 4 or fewer of attention, 3 or 2 of a feed-forward, so many experts' of it."""
    D, K, moe = m.width, m.width // m.num_heads, m.moe
    feed_forward, dense = MATRICES[m.ffn] * D, moe.first_dense if moe.num_experts else m.depth
    with_experts = feed_forward * moe.expert_dim * (experts + moe.num_shared) + D * moe.num_experts
    attention = 2 * D * (m.num_heads + m.num_kv_heads) * K
    return m.depth * attention + dense * feed_forward * m.ffn_dim + (m.depth - dense) * with_experts


def hand_count(m, experts=0):
    """Parameters by hand: those, gains of blocks and ends, V D of the embedding and of a head of its own."""
    equation = reference.EQUATIONS[m.placement]
    gains = m.depth * equation.gains(m) + len(equation.ends) * m.width
    return hand_matrices(m, experts) + gains + m.vocab_size * m.width * (1 if m.tied_head else 2)


def hand_flops(m, seq_len):
    """6 a weight in a matmul and token (2 forward, 4 backward), the lookup none; and for the two matmuls of attention,
    at position t over t + 1 of the T positions, so T / 2 on average: 2 matmuls x 2 x 3 x T / 2 x H K a block."""
    matmuls = hand_matrices(m, m.moe.top_k) + m.vocab_size * m.width
    return 6 * matmuls + m.depth * 2 * 2 * 3 * seq_len // 2 * m.width


@pytest.mark.parametrize(("file", "preset"), PRESETS)
def test_presets_have_the_size_that_their_table_says(file, preset):
    path = CONFIGS / f"{file}.py"
    config = config_file.resolve_without_data(config_file.load(f"{path}:{preset}", []), "accelerator")
    m, row = config.model, re.search(rf"^{preset} (.*)$", path.read_text(), re.MULTILINE)[1]
    model = define(m)
    kind = (m.num_kv_heads, m.ffn_dim)
    sizes = (hand_count(m),)
    if m.moe.num_experts:
        kind = (m.moe.num_experts, m.moe.top_k, m.moe.expert_dim)
        sizes = (hand_count(m, m.moe.num_experts), hand_count(m, m.moe.top_k))
        assert count_params(model, active=True) == sizes[1]
    numbers = [int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*", row.replace(", ", " "))]
    assert numbers == [m.depth, m.width, m.num_heads, *kind, m.vocab_size, *sizes]
    assert ("tied" in row) == m.tied_head and count_params(model) == sizes[0]
    assert flops_per_token(model, config.data.seq_len) == hand_flops(m, config.data.seq_len)
    # The table of weights is what init makes, without making it.
    made = jax.eval_shape(model.init, jax.random.key(0))
    assert jax.tree.map(lambda x: x.shape, made) == model.map_weights(lambda spec: spec.shape)
    assert {x.dtype for x in jax.tree.leaves(made)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize(
    "changes", [{"model__ffn": "gelu", "model__qk_norm": True}, {"model__num_kv_heads": 2, "model__ffn": "relu"}]
)
def test_sizes_of_the_variants(placement, changes):
    m = small(model__placement=placement, **changes)
    assert count_params(define(m)) == hand_count(m)
    assert flops_per_token(define(m), 24) == hand_flops(m, 24)
    assert set(define(m).weights.get("ends", {})) == set(reference.EQUATIONS[placement].ends)


def test_define_allocates_nothing():
    """A model of a trillion weights has a table."""
    m = small(model__ffn_dim=2**28)
    m = dataclasses.replace(m, width=2**12, num_heads=2**6, num_kv_heads=2**6)
    live = len(jax.live_arrays())
    assert count_params(define(m)) == hand_count(m) > 1e12
    assert len(jax.live_arrays()) <= live + 1  # at most a random key


# ---- what must not change the result -----------------------------------------------------------------------


def loss_and_gradients(m, seed=0, **execution):
    model = define(m, ExecutionConfig(**execution))
    params = jax.jit(model.init)(jax.random.key(seed))
    tokens = np.random.default_rng(1).integers(m.vocab_size, size=(2, 9))

    def loss(params):
        sums = loss_sums(model.bind(params), {"tokens": tokens})
        return sums["nll"] / sums["count"]

    return jax.jit(jax.value_and_grad(loss))(params)


@pytest.fixture(scope="module")
def looped():
    return loss_and_gradients(small())


@pytest.mark.parametrize(
    "changes",
    [{"scan_unroll": 2}, {"remat": "block"}, {"remat": "dots"}, {"remat": "dots", "scan_unroll": 4}],
    ids=str,
)
def test_unroll_and_remat_change_nothing(changes, looped):
    """Same operations, other fusions: float32 rounding apart. None was seen
    without compiler optimisation; a few parts in 10^7 of a weight's largest gradient are legal with it."""
    loss, grads = loss_and_gradients(small(), **changes)
    np.testing.assert_allclose(loss, looped[0], rtol=1e-6)
    assert_trees_close(grads, looped[1], 1e-5)


def count_equations(jaxpr, name=None):
    """Equations of a jaxpr and of all jaxprs inside; only those of one primitive if `name` is given."""
    inner = (x for eqn in jaxpr.eqns for x in jaxprs_in_params(eqn.params))
    own = sum(name in (None, eqn.primitive.name) for eqn in jaxpr.eqns)
    return own + sum(count_equations(x, name) for x in inner)


def test_remat_recomputes_what_it_says():
    """Remat is there at all: the gradient's program has matmuls of a block a second time."""

    def matmuls(**changes):
        model = define(small(), ExecutionConfig(**changes))
        tokens = np.zeros((2, 9), np.int32)

        def loss(params):
            return loss_sums(model.bind(params), {"tokens": tokens})["objective"]

        params = jax.eval_shape(model.init, jax.random.key(0))
        return count_equations(jax.make_jaxpr(jax.grad(loss))(params).jaxpr, "dot_general")

    # A block has 7 linear layers: q, k, v, out, two in, out. Each is one matmul forward and two backward, as is the
    # head's. Attention has 2 forward and, making its weights again, 5 backward. `dots` repeats none of them, `block`
    # all of the forward ones that it needs.
    assert matmuls(remat="none") == 3 * (7 + 1) + 7
    assert matmuls(remat="dots") == 3 * (7 + 1) + 7
    assert matmuls(remat="block") in (3 * (7 + 1) + 7 + 8, 3 * (7 + 1) + 7 + 9)  # the last is no gradient's input


def test_a_train_steps_program_is_as_long_whatever_the_depth():
    """This is what keeps compile time flat in depth; seconds would depend on the machine."""

    def length(depth):
        config = configure(model__depth=depth, training__num_microbatches=2)
        program = program_of(config)
        args = program.abstract_state, program.abstract_batch, numbers_of(config)
        return count_equations(program.train.trace(*args).jaxpr.jaxpr)

    assert length(12) == length(128)


# ---- declarations ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("site", "change"), [("q", {"role": "hiden"}), ("head", {"axes": ("embed", "vocabulary")})])
def test_an_unknown_role_or_axis_is_an_error(monkeypatch, site, change):
    declare = layers.weight

    def misdeclared(shape, axes, role, name, **fans):
        meta = {"axes": axes, "role": role} | (change if name == site else {})
        return declare(shape, meta["axes"], meta["role"], name, **fans)

    monkeypatch.setattr(layers, "weight", misdeclared)
    monkeypatch.setattr("spannorm_jax.model.decoder.weight", misdeclared)
    with pytest.raises(ValueError, match=site) as error:
        define(small())
    assert ("hiden" if "role" in change else "vocabulary") in str(error.value)


# ---- compute dtype ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_bfloat16_computes_in_bfloat16_and_keeps_float32(placement):
    """Weights, logits and gradients stay float32; the result is float32's within bfloat16's 8 bits, and not equal."""
    m = small(model__placement=placement, model__init="plain", model__qk_norm=True)
    half = dataclasses.replace(m, dtype="bfloat16")
    params = jax.jit(define(half).init)(jax.random.key(0))
    tokens = np.random.default_rng(1).integers(m.vocab_size, size=(2, 8))
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}

    def run(m):
        model = define(m)
        return jax.jit(lambda params: (model.bind(params)(tokens), model.bind(params).run(tokens).features))(params)

    (full_logits, full_features), (half_logits, half_features) = run(m), run(half)
    assert (full_logits.dtype, full_features.dtype) == (jnp.float32, jnp.float32)
    assert (half_logits.dtype, half_features.dtype) == (jnp.float32, jnp.bfloat16)
    error = np.sqrt(np.mean((half_logits - full_logits) ** 2) / np.mean(full_logits**2))
    # One rounding is 2^-9 of the size; 4 blocks with about ten roundings each and equal shares give sqrt(40) 2^-9. What
    # branches hand on grows in them: largest seen 2.2 times that, of DeepScaleLM, half of whose stream each branch is.
    assert 2**-11 < error < 40**0.5 * 2**-9 * 3
    model = define(half)
    grads = jax.eval_shape(jax.grad(lambda p: model.bind(p)(tokens).sum()), params)
    assert {x.dtype for x in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
