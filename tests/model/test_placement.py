"""Placements against the equations: in the whole model, and as functions of plain callables."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from spannorm_jax.config import Config, ModelConfig, MoEConfig
from spannorm_jax.model.definition import define
from spannorm_jax.model.placement import INNER_NORMS, PLACEMENTS
from spannorm_jax.training.numbers import numbers_of
from spannorm_jax.training.step import gradients
from spannorm_jax.training.tasks.text import loss_sums

TINY = {"depth": 3, "width": 16, "num_heads": 4, "num_kv_heads": 4, "ffn_dim": 24, "vocab_size": 11, "dtype": "float32"}
# theta is small, so that all pairs of a head turn visibly in a few positions; eps is large, so that it matters.
TINY |= {"rope_theta": 20.0, "norm_eps": 1e-2, "mix_share": reference.MIX_SHARE}
VARIANTS = {
    "plain": {},
    "qk_norm": {"qk_norm": True},
    "gqa": {"num_kv_heads": 2},
    "mqa_qk_norm": {"num_kv_heads": 1, "qk_norm": True},
    "layernorm": {"norm": "layernorm"},
    "gelu": {"ffn": "gelu"},
    "relu": {"ffn": "relu"},
    "tied": {"tied_head": True},
    "moe": {"moe": MoEConfig(num_experts=5, top_k=2, expert_dim=6, aux_loss=0.3, router_z_loss=0.1)},
    "moe_relu": {"ffn": "relu", "moe": MoEConfig(num_experts=3, top_k=2, expert_dim=6, num_shared=1)},
    "moe_sigmoid": {
        "ffn": "gelu",
        "moe": MoEConfig(
            num_experts=4, expert_dim=6, num_shared=1, scores="sigmoid", renormalize=False, balance="bias"
        ),
    },
    "all": {"qk_norm": True, "num_kv_heads": 2, "norm": "layernorm", "ffn": "gelu", "tied_head": True},
}
# Every placement with the plain variant, with experts and with all options at once; each other option with one in turn.
EVERY = ("plain", "moe", "all")
CASES = [(p, v) for p in PLACEMENTS for v in EVERY]
CASES += [(tuple(PLACEMENTS)[i % len(PLACEMENTS)], v) for i, v in enumerate(VARIANTS) if v not in EVERY]


UPDATE = 4  # with a warm-up of 2 the factors of three blocks are 1, 1, 2/3


def state_of(model):
    """Biases of a size that changes the selection, and a warm-up that is under way."""
    return model.next_model_state(
        model.init_model_state(),
        UPDATE,
        lambda bias: (0.4 * np.random.default_rng(2).standard_normal(bias.shape)).astype(np.float32),
    )


def make(placement, variant="plain", **changes):
    """(model, params, tokens, reference options): weights of a size that bends every nonlinearity, gains apart."""
    cfg = ModelConfig(placement=placement, **TINY | VARIANTS[variant] | changes)
    model = define(cfg)
    rng = np.random.default_rng(0)

    scalars = PLACEMENTS[placement].scalar_gains

    def draw(spec):
        if spec.site in scalars:  # no norm holds what they multiply
            return rng.uniform(0.1, 0.2, spec.shape).astype(np.float32)
        if spec.role == "norm":
            return rng.uniform(0.5, 1.5, spec.shape).astype(np.float32)
        return (0.4 * rng.standard_normal(spec.shape)).astype(np.float32)

    tokens = rng.integers(cfg.vocab_size, size=(2, 7)).astype(np.int32)
    moe = cfg.moe
    aux_loss = moe.aux_loss if moe.balance == "aux_loss" else 0.0
    router = reference.Router(moe.top_k, moe.scores, moe.renormalize, aux_loss, moe.router_z_loss)
    router = router if moe.num_experts else None
    warmup = (cfg.branch_warmup_steps, UPDATE) if cfg.branch_warmup_steps else None
    options = reference.Options(placement, cfg.norm, cfg.ffn, cfg.norm_eps, cfg.rope_theta, router, warmup)
    return model, model.map_weights(draw), tokens, options


@pytest.mark.parametrize(("placement", "variant"), CASES)
def test_logits_loss_and_gradients_are_those_of_the_equations(placement, variant):
    check_against_the_reference(placement, variant)


@pytest.mark.parametrize(
    ("placement", "variant"), [("pre", "plain"), ("span", "moe_sigmoid"), ("peri", "plain"), ("siamese", "moe")]
)
def test_branches_that_come_in_while_the_model_trains(placement, variant):
    """ProRes: min(1, t / (T l)) times what is added to the stream, in values and gradients."""
    check_against_the_reference(placement, variant, branch_warmup_steps=2.0)


@pytest.mark.parametrize("variant", ["mqa_qk_norm", "moe", "moe_sigmoid"])
def test_norms_inside_sub_layers(variant, monkeypatch):
    """PreNorm with every inner norm: heads before their projection, hidden units before theirs, of experts too."""
    normed = dataclasses.replace(PLACEMENTS["pre"], name="pre_normed", inner_norms=INNER_NORMS)
    monkeypatch.setitem(PLACEMENTS, "pre_normed", normed)
    monkeypatch.setitem(reference.EQUATIONS, "pre_normed", reference.EQUATIONS["pre"])
    check_against_the_reference("pre_normed", variant)


def check_against_the_reference(placement, variant, **changes):
    """Logits and loss against the float64 reference; the gradient, weight by weight, against its central differences.

    Directions are taken within one weight at a time, so that no large gradient hides the error of a small one.
    """
    model, params, tokens, options = make(placement, variant, **changes)
    model_state = state_of(model)
    exact = reference.to_float64(params)

    def with_router(weights):
        if "ffn" not in model_state.get("moe_blocks", {}):
            return weights
        blocks = weights["moe_blocks"]
        ffn = blocks["ffn"] | reference.to_float64(model_state["moe_blocks"]["ffn"])
        return weights | {"moe_blocks": blocks | {"ffn": ffn}}

    def all_of(params):
        config = Config(model=model.cfg)
        grads, sums = gradients(config, model, params, model_state, {"tokens": tokens}, loss_sums, numbers_of(config))
        total = sums["nll"] + sum(sums.get("router_losses", {}).values())
        return total / sums["count"], grads, model.bind(params, model_state)(tokens[:, :-1])

    loss, grads, logits = jax.jit(all_of)(params)
    want = reference.logits(with_router(exact), tokens[:, :-1], options)
    # float32 rounding through three blocks: largest error seen is 3.5e-6 of the largest logit, and
    # 5e-7 of the loss.
    np.testing.assert_allclose(logits, want, rtol=0, atol=1e-5 * np.abs(want).max())
    np.testing.assert_allclose(loss, reference.loss(with_router(exact), tokens, options), rtol=2e-6)

    rng = np.random.default_rng(1)
    leaves, treedef = jax.tree.flatten(exact)
    for i, (path, grad) in enumerate(jax.tree.leaves_with_path(grads)):
        grad = np.asarray(grad, np.float64)
        direction = rng.standard_normal(grad.shape)
        direction /= np.linalg.norm(direction)

        def loss_at(step, i=i, direction=direction):
            moved = [leaf + step * direction if j == i else leaf for j, leaf in enumerate(leaves)]
            return reference.loss(with_router(jax.tree.unflatten(treedef, moved)), tokens, options)

        # Error of the difference: h^2 f''' / 6 + 1e-16 f / h, about 1e-10 at h = 1e-5: nothing beside float32's.
        h = 1e-5
        difference = (loss_at(h) - loss_at(-h)) / (2 * h)
        # A unit direction meets the gradient with |g| / sqrt(n); largest error seen 1.8e-5 of that.
        size = np.linalg.norm(grad) / grad.size**0.5
        assert size > 0
        assert abs(np.vdot(grad, direction) - difference) < 1e-4 * size, f"gradient of {jax.tree_util.keystr(path)}"


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_the_reference_tells_placements_apart(placement):
    """No two equations agree on these weights, so that agreement above means that equation and no other."""
    _, params, tokens, _ = make(placement)
    params["ends"] = {"entry": {"gain": np.full(16, 0.7)}, "final": {"gain": np.full(16, 0.7)}}
    rng = np.random.default_rng(4)
    for other in PLACEMENTS.values():  # every norm and gain that any of them asks for
        for name in (*other.block_norms, *other.block_gains):
            params["blocks"]["norms"].setdefault(name, {"gain": rng.uniform(0.5, 1.5, (3, 16))})
    exact = reference.to_float64(params)
    mine = reference.logits(exact, tokens, reference.Options(placement))
    for other in PLACEMENTS:
        if reference.EQUATIONS[other] == reference.EQUATIONS[placement]:  # of SubLN and PreNorm, which differ inside
            continue
        difference = np.abs(mine - reference.logits(exact, tokens, reference.Options(other))).max()
        assert difference > 1e-2 * np.abs(mine).max(), other


# ---- placement functions on plain callables -------------------------------------------------------

# Sub-layers and norms as affine maps with coprime numbers: every path through a block leaves its own trace.
attn = lambda x: 2 * x + 3  # noqa: E731
ffn = lambda x: 5 * x + 7  # noqa: E731


def number(a, b):
    return lambda x: a * x + b


block_norms = types.SimpleNamespace(
    before_attn=number(41, 43), after_attn=number(11, 13), before_ffn=number(47, 53), after_ffn=number(17, 19)
)
block_norms.side_attn, block_norms.side_ffn = number(59, 61), number(67, 71)
block_norms.scale_attn, block_norms.scale_ffn = number(73, 0), number(79, 0)
end_norms = types.SimpleNamespace(entry=lambda x: 23 * x + 29, final=lambda x: 31 * x + 37)


def run_block(placement, stream):
    return PLACEMENTS[placement].block(stream, attn, ffn, block_norms, 0, ModelConfig(depth=1))


def test_a_pre_block_adds_twice_to_an_unnormed_stream():
    x = 1.0
    y = x + (2 * (41 * x + 43) + 3)
    assert run_block("pre", x) == y + (5 * (47 * y + 53) + 7)


def test_a_post_block_norms_each_sum():
    x = 1.0
    y = 11 * (x + (2 * x + 3)) + 13
    assert run_block("post", x) == 17 * (y + (5 * y + 7)) + 19


def test_a_span_block_skips_from_its_input():
    x = 1.0
    y = 11 * (x + (2 * x + 3)) + 13
    assert run_block("span", x) == 17 * (x + (5 * y + 7)) + 19
    assert run_block("span", x) != run_block("post", x)


def test_without_a_feed_forward_a_span_block_forgets_its_attention():
    """The second skip starts at the block input: with F = 0 the block is n.ffn(x), whatever attention did."""
    out = PLACEMENTS["span"].block(1.0, attn, lambda y: 0.0, block_norms, 0, ModelConfig(depth=1))
    assert out == 17 * 1.0 + 19
    assert PLACEMENTS["post"].block(1.0, attn, lambda y: 0.0, block_norms, 0, ModelConfig(depth=1)) != out


def test_a_peri_block_norms_what_its_branches_read_and_what_they_add():
    x = 1.0
    y = x + (11 * (2 * (41 * x + 43) + 3) + 13)
    assert run_block("peri", x) == y + (17 * (5 * (47 * y + 53) + 7) + 19)


def test_a_hybrid_block_adds_its_feed_forward_to_a_normed_sum():
    x = 1.0
    z = 11 * (x + (2 * x + 3)) + 13
    assert run_block("hybrid", x) == z + (5 * z + 7)
    assert PLACEMENTS["hybrid"].inner_norms == ("q", "k", "v")


def test_a_layerscale_block_is_a_pre_block_with_gains_on_its_branches():
    x = 1.0
    y = x + 73 * (2 * (41 * x + 43) + 3)
    assert run_block("layerscale", x) == y + 79 * (5 * (47 * y + 53) + 7)


@pytest.mark.parametrize("layer", [1, jnp.int32(1)], ids=["a number of Python", "an array"])
def test_a_siamese_block_has_a_normed_stream_and_one_that_is_not(layer):
    """Its factor is 1 / sqrt(2 (l + 1)), a half in block 1; a layer's index may be a number or a traced one."""
    x, y = 1.0, 2.0
    o = 2 * (41 * (x + (59 * y + 61)) + 43) + 3
    x, y = 11 * (x + o / 2) + 13, y + o
    o = 5 * (47 * (x + (67 * y + 71)) + 53) + 7
    x, y = 17 * (x + o / 2) + 19, y + o
    # float32 holds some of these numbers to 2^-24.
    assert PLACEMENTS["siamese"].block(
        (1.0, 2.0), attn, ffn, block_norms, layer, ModelConfig(depth=4)
    ) == pytest.approx((x, y), rel=1e-6)
    assert PLACEMENTS["siamese"].leave((x, y), end_norms) == x + (31 * y + 37)


def test_span_and_span_raw_differ_in_the_first_skip_alone():
    x = 1.0
    normed = 23 * x + 29
    span, raw = PLACEMENTS["span"], PLACEMENTS["span_raw"]
    assert span.enter(x, end_norms) == normed
    y = 11 * (x + (2 * normed + 3)) + 13
    x2 = 17 * (x + (5 * y + 7)) + 19
    stream = raw.block(raw.enter(x, end_norms), attn, ffn, block_norms, 0, ModelConfig(depth=2))
    assert raw.leave(stream, end_norms) == x2
    # From the second block on they are the same function.
    stream = raw.block(stream, attn, ffn, block_norms, 1, ModelConfig(depth=2))
    assert raw.leave(stream, end_norms) == run_block("span", x2)


@pytest.mark.parametrize(
    ("placement", "entered", "left"),
    [
        ("pre", 1.0, 31 * 1.0 + 37),
        ("post", 1.0, 1.0),
        ("span", 23 * 1.0 + 29, 1.0),
        ("pre_embnorm", 23 * 1.0 + 29, 31 * 1.0 + 37),
    ],
)
def test_how_the_stream_is_entered_and_left(placement, entered, left):
    assert PLACEMENTS[placement].enter(1.0, end_norms) == entered
    assert PLACEMENTS[placement].leave(1.0, end_norms) == left


# ---- rivals, and what they are in the limit -------------------------------------------------------------


def test_a_deepnorm_block_is_a_post_block_with_a_heavier_skip():
    x, alpha = 1.0, 2.0  # (2 x 8)^(1/4)
    y = 11 * (alpha * x + (2 * x + 3)) + 13
    got = PLACEMENTS["deepnorm"].block(x, attn, ffn, block_norms, 0, ModelConfig(depth=8))
    assert got == 17 * (alpha * y + (5 * y + 7)) + 19


def test_an_olmo2_block_norms_what_its_branches_add():
    x = 1.0
    y = x + (11 * (2 * x + 3) + 13)
    assert run_block("olmo2", x) == y + (17 * (5 * y + 7) + 19)
    assert PLACEMENTS["olmo2"].inner_norms == ("q", "k")


def test_a_b2t_block_without_the_skip_from_its_middle_is_a_span_block():
    without = PLACEMENTS["b2t"].block(1.0, attn, lambda y: ffn(y) - y, block_norms, 0, ModelConfig(depth=1))
    assert without == run_block("span", 1.0) != run_block("b2t", 1.0)


def test_a_residual_block_is_a_post_block_and_the_sum_of_its_branches():
    x, r = PLACEMENTS["residual"].enter(1.0, end_norms)
    x, r = PLACEMENTS["residual"].block((x, r), attn, ffn, block_norms, 0, ModelConfig(depth=1))
    y = 11 * (1.0 + 5.0) + 13
    assert (x, r) == (run_block("post", 1.0), 1.0 + 5.0 + (5 * y + 7))
    assert PLACEMENTS["residual"].leave((x, r), end_norms) == x + (31 * r + 37)


@pytest.mark.parametrize("layer", [int, jnp.int32], ids=["a number of Python", "an array"])
@pytest.mark.parametrize(("share", "post"), [(0.0, 0), (0.25, 1), (0.5, 2), (0.74, 2), (1.0, 4)])
def test_a_mix_has_post_blocks_first_then_pre_blocks(layer, share, post):
    norms = types.SimpleNamespace(attn=number(3, 1), ffn=number(2, 5))
    names = {"before_attn": norms.attn, "after_attn": norms.attn, "before_ffn": norms.ffn, "after_ffn": norms.ffn}
    cfg = ModelConfig(depth=4, mix_share=share)
    for l in range(4):
        pure = PLACEMENTS["post" if l < post else "pre"]
        want = pure.block(1.0, attn, ffn, types.SimpleNamespace(**names), l, cfg)
        assert PLACEMENTS["mix"].block(1.0, attn, ffn, norms, layer(l), cfg) == want


def test_an_lns_block_is_a_pre_block_with_normed_inputs_over_the_root_of_its_number():
    x, cfg = 1.0, ModelConfig(depth=4)
    assert PLACEMENTS["lns"].block(x, attn, ffn, block_norms, 0, cfg) == run_block("pre", x)
    y = x + (2 * (41 * x + 43) / 2 + 3)
    assert PLACEMENTS["lns"].block(x, attn, ffn, block_norms, 3, cfg) == y + (5 * (47 * y + 53) / 2 + 7)


def test_a_keel_block_becomes_its_norms_of_the_skip_as_the_depth_grows():
    """Scale-free norms of 2L x + f: the branch's part falls as 1 / 2L, and at great depth a block passes x on."""
    sign = types.SimpleNamespace(
        before_attn=np.tanh, before_ffn=np.tanh, after_attn=lambda v: v / abs(v[0]), after_ffn=lambda v: v / abs(v[0])
    )
    x = np.array([1.0, -0.4, 0.2])
    moved = []
    for depth in (10, 1000):
        y = PLACEMENTS["keel"].block(x, lambda v: v[::-1], lambda v: v**2, sign, 0, ModelConfig(depth=depth))
        moved.append(np.abs(y - x).max())
    assert moved[1] == pytest.approx(moved[0] / 100, rel=0.1)


def test_gains_of_one_make_a_layerscale_block_a_pre_block_and_of_zero_a_rezero_block_nothing():
    ones = types.SimpleNamespace(**vars(block_norms) | {"scale_attn": number(1, 0), "scale_ffn": number(1, 0)})
    zeros = types.SimpleNamespace(**vars(block_norms) | {"scale_attn": number(0, 0), "scale_ffn": number(0, 0)})
    cfg = ModelConfig(depth=1)
    assert PLACEMENTS["layerscale"].block(1.0, attn, ffn, ones, 0, cfg) == run_block("pre", 1.0)
    assert PLACEMENTS["rezero"].block(1.0, attn, ffn, zeros, 0, cfg) == 1.0
    assert PLACEMENTS["rezero"].block(1.0, attn, ffn, block_norms, 0, cfg) == 1 + 73 * 5 + 79 * (5 * 366 + 7)


def test_pre_embnorm_is_pre_but_for_the_norm_of_its_embeddings():
    assert run_block("pre_embnorm", 1.0) == run_block("pre", 1.0)
    pre, normed = PLACEMENTS["pre"], PLACEMENTS["pre_embnorm"]
    assert (normed.block_norms, normed.additions) == (pre.block_norms, pre.additions)


@pytest.mark.parametrize("depth", [2, 3, 24, 1000])
def test_a_deepscale_block_keeps_a_streams_variance_where_its_branches_have_the_streams(depth):
    """x and what two branches add as three orthogonal vectors of one length: the sum has that length, at any depth."""
    x, a, f = np.eye(3)
    same = types.SimpleNamespace(before_attn=lambda v: v, before_ffn=lambda v: v)
    y = PLACEMENTS["deepscale"].block(x, lambda v: a, lambda v: f, same, 0, ModelConfig(depth=depth))
    assert np.linalg.norm(y) == pytest.approx(1, rel=1e-12)
    assert y == pytest.approx([1 - 2 / depth, ((1 - 2 / depth) * 2 / depth) ** 0.5, (2 / depth) ** 0.5])


OWNED = {
    "pre": (2, {"final"}),
    "post": (2, set()),
    "span": (2, {"entry"}),
    "span_raw": (2, {"entry"}),
    "peri": (4, {"final"}),
    "hybrid": (1, set()),
    "layerscale": (4, {"final"}),
    "siamese": (6, {"final"}),
    "deepnorm": (2, set()),
    "olmo2": (2, {"final"}),
    "b2t": (2, set()),
    "residual": (2, {"final"}),
    "mix": (2, {"final"}),
    "lns": (2, {"final"}),
    "keel": (4, set()),
    "rezero": (2, set()),
    "subln": (2, {"final"}),
    "deepscale": (2, {"final"}),
    "pre_embnorm": (2, {"entry", "final"}),
}


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_norms_and_gains_owned(placement):
    """SpanNorm has as many as PreNorm and PostNorm: two a block, and one at an end or none."""
    weights = define(ModelConfig(placement=placement, **TINY)).weights
    number, ends = OWNED[placement]
    assert len(weights["blocks"]["norms"]) == number and set(weights.get("ends", {})) == ends
    gains = [
        spec.shape for spec in jax.tree.leaves(weights, is_leaf=lambda x: hasattr(x, "role")) if spec.role == "norm"
    ]
    inner = [{"heads": (3, 16), "hidden": (3, 24)}.get(name, (3, 4)) for name in PLACEMENTS[placement].inner_norms]
    scalars = len(PLACEMENTS[placement].scalar_gains)
    own = [(3, 1)] * scalars + [(3, 16)] * (number - scalars)
    assert sorted(gains) == sorted(own + [(16,)] * len(ends) + inner)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_norm_is_where_its_name_says(placement):
    """`before_attn` norms what attention reads, `after_ffn` what the feed-forward made or the sum with it.

    Where a norm stands depends on the block, it has the branch's name alone.
    """
    for name in PLACEMENTS[placement].block_norms:
        *where, branch = name.split("_")
        where = where[0] if where else "before"
        assert branch in ("attn", "ffn") and where in ("before", "after", "side"), name


def test_the_reference_has_an_equation_for_every_placement():
    assert set(reference.EQUATIONS) == set(PLACEMENTS)


# ---- causality ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["plain", "all"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_position_t_sees_positions_up_to_t_and_no_more(placement, variant):
    """d logits[t] / d input[s] is exactly 0 for s > t and is not 0 for s <= t.

    The row holds every token once and the head is separate, so the gradient by row s of the embedding is the gradient
    by the input at position s. A masked logit gets the probability exp(-large) = 0 exactly, and what multiplies 0 has
    the gradient 0 exactly: one wrong position in the mask, or a norm or mean over time, gives a number. The logits are
    summed with random weights, since the plain sum of a normed vector may have no gradient.
    """
    model, params, _, _ = make(placement, variant, tied_head=False)
    T = model.cfg.vocab_size
    tokens = jnp.asarray([np.random.default_rng(2).permutation(T)])
    mix = np.random.default_rng(3).standard_normal(T).astype(np.float32)

    def logits_mixed(embed):
        return (model.bind(params | {"embed": embed})(tokens) @ mix)[0]

    gradient = np.asarray(jax.jit(jax.jacrev(logits_mixed))(jnp.asarray(params["embed"])))[:, tokens[0]]  # t, s, D
    sees = np.any(gradient != 0, axis=-1)
    np.testing.assert_array_equal(sees, np.tril(np.ones((T, T), bool)))
