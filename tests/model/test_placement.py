"""Placements against the equations: in the whole model, and as functions of plain callables."""

import dataclasses
import re
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from spannorm_jax.config import Config, ModelConfig, MoEConfig
from spannorm_jax.model.definition import define
from spannorm_jax.model.placement import INNER_NORMS, PLACEMENTS, declare
from spannorm_jax.training.numbers import numbers_of
from spannorm_jax.training.step import gradients
from spannorm_jax.training.tasks.text import loss_sums

DOCUMENT = Path(__file__).parents[2] / "docs" / "placements.md"
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


def make(placement, variant="plain", execution=None, **changes):
    """(model, params, tokens, reference options): weights of a size that bends every nonlinearity, gains apart."""
    cfg = ModelConfig(placement=placement, **TINY | VARIANTS[variant] | changes)
    model = define(cfg, execution)
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
    normed = dataclasses.replace(PLACEMENTS["pre"], name="pre_normed", inner_norms=tuple(INNER_NORMS))
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
    own = reference.EQUATIONS[placement]
    for other, equation in reference.EQUATIONS.items():
        if (equation.enter, equation.block, equation.leave) == (own.enter, own.block, own.leave):
            continue  # of SubLN and PreNorm, which differ inside
        difference = np.abs(mine - reference.logits(exact, tokens, reference.Options(other))).max()
        assert difference > 1e-2 * np.abs(mine).max(), other


# ---- placement functions on plain callables -------------------------------------------------------

# Sub-layers and norms as affine maps with coprime numbers: every path through a block leaves its own trace.
attn = lambda x: 2 * x + 3  # noqa: E731
ffn = lambda x: 5 * x + 7  # noqa: E731
NAMES = sorted({name for p in PLACEMENTS.values() for name in (*p.block_norms, *p.block_gains, *p.end_norms)})
MAPS = {name: lambda x, a=11 + 6 * i, b=13 + i: a * x + b for i, name in enumerate(NAMES)}


def run_block(placement, x, ffn=ffn, layer=0, **norms):
    return PLACEMENTS[placement].block(x, attn, ffn, types.SimpleNamespace(**MAPS | norms), layer, ModelConfig(depth=4))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_blocks_of_plain_functions_and_numbers_are_those_of_the_equations(placement):
    """As theory runs them: a layer's index is Python's, and the stream no array."""
    values, equation, norms = PLACEMENTS[placement], reference.EQUATIONS[placement], types.SimpleNamespace(**MAPS)
    cfg = ModelConfig(depth=3, mix_share=reference.MIX_SHARE)
    apply = lambda name, x: MAPS[name](x)  # noqa: E731
    stream, want = values.enter(1.0, norms), equation.enter(1.0, apply)
    for layer in range(3):
        stream = values.block(stream, attn, ffn, norms, layer, cfg)
        want = equation.block(want, attn, ffn, apply, apply, layer, 3)
    assert values.leave(stream, norms) == pytest.approx(equation.leave(want, apply), rel=1e-12)


def test_in_their_limits_blocks_are_each_others():
    one = {name: lambda x: x for name in ("scale_attn", "scale_ffn")}
    none = {name: lambda x: 0 * x for name in ("scale_attn", "scale_ffn")}
    assert run_block("layerscale", 1.0, **one) == run_block("lns", 1.0) == run_block("pre", 1.0)
    assert run_block("rezero", 1.0, **none) == 1.0
    assert run_block("b2t", 1.0, ffn=lambda y: ffn(y) - y) == run_block("span", 1.0) != run_block("b2t", 1.0)
    assert run_block("residual", (1.0, 0.0))[0] == run_block("post", 1.0)
    assert run_block("span_raw", (1.0, 1.0)) == (run_block("span", 1.0),) * 2
    # The second skip starts at the block's input: with F = 0 a SpanNorm block is n.ffn(x), whatever attention did.
    assert run_block("span", 1.0, ffn=lambda y: 0.0) == MAPS["after_ffn"](1.0)


@pytest.mark.parametrize("layer", [int, jnp.int32], ids=["a number of Python", "an array"])
@pytest.mark.parametrize(("share", "post"), [(0.0, 0), (0.25, 1), (0.5, 2), (0.74, 2), (1.0, 4)])
def test_a_mix_has_post_blocks_first_then_pre_blocks(layer, share, post):
    norms = {f"{where}_{name}": MAPS[name] for where in ("before", "after") for name in ("attn", "ffn")}
    cfg = ModelConfig(depth=4, mix_share=share)
    for l in range(4):
        block = PLACEMENTS["mix"].block(1.0, attn, ffn, types.SimpleNamespace(**MAPS), layer(l), cfg)
        assert block == run_block("post" if l < post else "pre", 1.0, **norms)


@pytest.mark.parametrize("again", [{"name": "pre"}, {"name": "mine", "inner_norms": ("q", "head")}])
def test_a_declaration_that_would_be_lost_is_refused(again):
    with pytest.raises(ValueError, match=again["name"]):
        declare(title="Again", **again)(PLACEMENTS["pre"].block)


def test_every_placement_has_an_equation_in_the_reference_and_a_line_in_the_documents():
    assert set(reference.EQUATIONS) == set(PLACEMENTS)
    rows = re.findall(r"^\| `(\w+)` \|.*\|(.*)\|[^|]*\|$", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    published = {name: init.strip().strip("`") for name, init in rows}
    assert published.items() >= {p.name: p.published_init for p in PLACEMENTS.values()}.items()


# ---- causality ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["plain", "all"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_position_t_sees_positions_up_to_t_and_no_more(placement, variant):
    """d logits[t] / d input[s] is exactly 0 for s > t and is not 0 for s <= t.

    The row holds every token once and the head is separate, so the gradient by row s of the embedding is that by the
    input at position s. The logits are summed with random weights: the plain sum of a normed vector may have none.
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
