"""Initialisations: sizes of weights against the papers', and drawn weights against those, within sampling error."""

import dataclasses
import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from spannorm_jax import show_init
from spannorm_jax.config import ModelConfig, MoEConfig, unread
from spannorm_jax.config_file import load
from spannorm_jax.errors import UserError
from spannorm_jax.model.definition import define
from spannorm_jax.model.initialisation import (
    INITS,
    depth_factor,
    init_of,
    initial_size,
    predicted_additions,
    predicted_branch_variance,
    residual_additions,
)
from spannorm_jax.model.placement import PLACEMENTS
from spannorm_jax.resolution import default_ffn_dim

FIVE = 5  # standard errors: what a bound allows


def config(**changes):
    cfg = {"depth": 8, "width": 64, "num_heads": 4, "vocab_size": 64, "dtype": "float32"} | changes
    cfg.setdefault("num_kv_heads", cfg["num_heads"])
    cfg.setdefault("ffn_dim", default_ffn_dim(cfg["width"], cfg.get("ffn", "swiglu")))
    return ModelConfig(**cfg)


@functools.cache
def draw(cfg, seed=0):
    model = define(cfg)
    return model, jax.jit(model.init)(jax.random.key(seed))


def sizes(cfg):
    """Site -> what the initialisation says of it: a weight's std, where a gain starts; a list where blocks differ."""
    return {spec.site: np.asarray(INITS[cfg.init](cfg, spec)).tolist() for spec in define(cfg).specs()}


def branch_variance(cfg):
    """Of each branch, in the first block."""
    return {branch: v[0] for branch, v in predicted_branch_variance(cfg, define(cfg).specs()).items()}


# ---- the weights as drawn --------------------------------------------------------------------------------


@pytest.mark.parametrize(("ffn", "tied_head"), [("swiglu", False), ("gelu", True)])
@pytest.mark.parametrize("init", INITS)
def test_every_weight_has_the_std_of_its_site_in_every_block(init, ffn, tied_head):
    """Empirical std of n Gaussian draws: relative standard error 1 / sqrt(2n); mean: 1 / sqrt(n) of the std."""
    cfg = config(init=init, ffn=ffn, tied_head=tied_head, num_kv_heads=2, init_targets=("v", "ffn_in", "ffn_out"))
    model, params = draw(cfg)
    stds, sites = sizes(cfg), set()

    def check(spec, values):
        values = np.asarray(values, np.float64)
        sites.add(spec.site)
        if spec.role == "norm":
            np.testing.assert_array_equal(values, np.float32(1))
            return
        if stds[spec.site] == 0:
            np.testing.assert_array_equal(values, 0)
            return
        blocks = values if spec.axes[0] == "layers" else [values]
        for block, std in zip(blocks, np.broadcast_to(stds[spec.site], len(blocks)), strict=True):
            n = block.size
            assert abs(block.std() / std - 1) < FIVE / math.sqrt(2 * n), spec
            assert abs(block.mean()) < FIVE * std / math.sqrt(n), spec

    model.map_weights(check, params)
    assert sites == {"embed", "q", "k", "v", "attn_out", "ffn_in", "ffn_out", "after_attn", "after_ffn", "entry"} | (
        set() if tied_head else {"head"}
    )


def test_a_weight_is_the_same_in_models_of_another_depth_placement_and_feed_forward():
    """A block's attention starts from its own key, by its name and index: comparisons start from equal weights."""
    one = draw(config(init="plain"))[1]["blocks"]["attn"]
    deeper = draw(config(init="plain", depth=12, placement="peri"))[1]["blocks"]["attn"]
    experts = draw(config(init="plain", moe=MoEConfig(num_experts=2, expert_dim=8, first_dense=1)))[1]
    for name in ("q", "k", "v", "out"):
        np.testing.assert_array_equal(one[name], deeper[name][:8])
        np.testing.assert_array_equal(one[name][:1], experts["blocks"]["attn"][name])
        np.testing.assert_array_equal(one[name][1:], experts["moe_blocks"]["attn"][name])


def test_no_two_blocks_and_no_two_weights_share_their_draw():
    _, params = draw(config())
    blocks = params["blocks"]
    q, k, v = (np.asarray(blocks["attn"][name]).reshape(8, -1) for name in "qkv")
    draws = np.concatenate([q, k, v])
    # n = 4096 samples: correlations of independent draws have the standard error 1 / 64.
    correlations = np.corrcoef(draws) - np.eye(len(draws))
    assert np.abs(correlations).max() < 6 / 64


# ---- what sets the size of an addition --------------------------------------------------------------


@pytest.mark.parametrize(
    ("depth", "ffn", "budget", "exponent"), [(1, "swiglu", 0.1, 0.5), (12, "gelu", 1.0, 1.0), (100, "relu", 3.0, 0.0)]
)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_scale_spends_the_budget_over_the_streams_additions(placement, depth, ffn, budget, exponent):
    """SpanNorm's stream is added to by F alone, once a block; that of the others by A and F. In all c L^-p."""
    changes = {"variance_budget": budget, "variance_exponent": exponent}
    cfg = config(placement=placement, depth=depth, ffn=ffn, init="scale", **changes)
    added = {branch: sum(v) / depth for branch, v in predicted_additions(cfg, define(cfg).specs()).items()}
    number = len(reference.EQUATIONS[placement].added)
    assert residual_additions(cfg) == number * depth
    assert list(added.values()) == pytest.approx([budget / depth**exponent / depth / number] * number)
    if number == 1:
        assert branch_variance(cfg)["attn"] == pytest.approx(1)  # off the stream: not damped


@pytest.mark.parametrize("placement", ["peri", "layerscale"])
def test_a_branch_that_ends_in_a_gain_is_damped_there_and_not_in_its_weights(placement):
    """What its weights are does not set its size: plain and scale draw them alike, and the gains differ."""
    plain, scale = (config(placement=placement, init=init, depth=8) for init in ("plain", "scale"))
    assert sizes(scale)["attn_out"] == sizes(plain)["attn_out"]
    names = set(PLACEMENTS[placement].additions.values())
    own = 1.0 if placement == "peri" else 0.1
    assert [sizes(scale)[name] for name in names] == pytest.approx([(1 / 8 / 16) ** 0.5] * 2)
    assert {sizes(plain)[name] for name in names} == {own}
    # Who names weights to damp has said what to damp: the gains stay.
    assert {sizes(dataclasses.replace(scale, init_targets=("ffn_out",)))[name] for name in names} == {own}


@pytest.mark.parametrize("experts", [0, 2])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_with_zero_outputs_a_block_adds_nothing_and_every_branch_can_move(placement, experts):
    """Nothing is added, and what is zero has a gradient: a zero weight before a norm would have none.

    Three blocks, since DeepScaleLM has no skip at two.
    """
    moe = MoEConfig(num_experts=experts, expert_dim=8 if experts else 0)
    cfg = config(placement=placement, init="zero_out", depth=3, width=16, vocab_size=8, moe=moe)
    model, params = draw(cfg)
    assert all(np.all(added == 0) for added in predicted_additions(cfg, model.specs()).values())
    zeros = {spec.site for spec in model.specs() if np.all(initial_size(cfg, spec) == 0)}
    tokens = jnp.arange(8, dtype=jnp.int32)[None]
    gradients = jax.jit(jax.grad(lambda p: jnp.sum(model.bind(p)(tokens)[..., 0] ** 2)))(params)
    moved = {}
    model.map_weights(lambda spec, g: moved.setdefault(spec.site, float(jnp.abs(g).max())), gradients)
    assert zeros and all(moved[site] > 0 for site in zeros)


@pytest.mark.parametrize("target", ["v", "attn_out", "ffn_in", "ffn_out"])
def test_init_targets_take_the_factor_and_no_other_weight_does(target):
    base = sizes(config(placement="pre", init="scale", init_targets=("v", "attn_out", "ffn_in", "ffn_out")))
    one = sizes(config(placement="pre", init="scale", init_targets=(target,), variance_budget=3.0))
    for site in ("v", "attn_out", "ffn_in", "ffn_out"):
        # sqrt(c / (L 2L)): budget 3 against 1 for the target, none against sqrt(1 / 128) for the others.
        assert one[site] / base[site] == pytest.approx(math.sqrt(3 if site == target else 128))
    for site in ("embed", "q", "k", "head"):
        assert one[site] == base[site]


# ---- what rivals were published with ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("init", "expected"),
    [
        ("plain", {"q": 1 / 8, "attn_out": 1 / 8, "ffn_in": 1 / 8, "ffn_out": 96**-0.5, "head": 1 / 8, "embed": 1.0}),
        ("gpt2", {"embed": 0.02, "head": 0.02, "q": 0.02, "ffn_in": 0.02, "attn_out": 0.005, "ffn_out": 0.005}),
        ("normal", {"embed": 0.02, "head": 0.02, "q": 0.02, "attn_out": 0.02, "ffn_in": 0.02, "ffn_out": 0.02}),
        ("megatron", {"q": (2 / 320) ** 0.5, "v": (2 / 320) ** 0.5, "attn_out": (2 / 320 / 16) ** 0.5}),
        # Glorot: q maps 64 to 64, k and v 64 to 32, each half of SwiGLU's first weight 64 to 96, the last 96 to 64.
        ("xavier", {"q": (2 / 128) ** 0.5, "v": (2 / 96) ** 0.5, "ffn_in": (2 / 160) ** 0.5, "head": 1 / 8}),
        # beta = (8 L)^(-1/4), of all but queries and keys.
        ("deepnorm", {"k": (2 / 96) ** 0.5, "v": (2 / 96) ** 0.5 / 64**0.25, "ffn_in": (2 / 160) ** 0.5 / 64**0.25}),
        ("subln", {"q": (2 / 128) ** 0.5, "attn_out": (2 / 128 * math.log(16)) ** 0.5, "embed": 1.0}),
    ],
)
def test_a_published_initialisation_has_its_papers_sizes(init, expected):
    cfg = config(init=init, placement="pre", depth=8, num_kv_heads=2, ffn_dim=96)
    found = sizes(cfg)
    assert {site: found[site] for site in expected} == pytest.approx(expected)
    assert found["before_attn"] == found["final"] == 1.0


def test_ds_damps_every_matrix_of_a_block_by_the_root_of_its_number():
    """Experts and routers stand in blocks too, each of its own number; embedding, head and gains are Xavier's."""
    cfg = config(init="ds", moe=MoEConfig(num_experts=2, expert_dim=8, num_shared=1, first_dense=2, every=3))
    blocks = {"blocks": (1, 2, 3, 4, 6, 7), "moe_blocks": (5, 8)}
    seen = set()
    for spec in define(cfg).specs():
        size, of_xavier = INITS["ds"](cfg, spec), INITS["xavier"](cfg, spec)
        if spec.layers and spec.role != "norm":
            name = "blocks" if len(spec.layers) == 6 else "moe_blocks"
            assert size == pytest.approx([of_xavier / l**0.5 for l in blocks[name]]), spec
            seen.add(spec.site)
        else:
            assert size == of_xavier, spec
    assert {"q", "attn_out", "ffn_in", "ffn_out", "expert_in", "expert_out", "shared_out", "router"} <= seen


def test_show_init_prints_the_range_of_a_std_that_differs_by_block(capsys):
    dense = f"{Path(__file__).parents[2]}/configs/dense.py:tiny,placement=pre,depth=4"
    for init, ends in (("ds", "mean of 0.125000 to 0.062500"), ("xavier", "")):
        assert show_init.main(["--config", f"{dense},init={init}"]) == 0
        [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("q ")]
        assert line.endswith(ends) and ("mean of" in line) == bool(ends)


# ---- ScaleInit's other choices ------------------------------------------------------------------------


@pytest.mark.parametrize("init", INITS)
def test_an_initialisation_reads_the_options_that_count_as_its_own(init):
    """An option that it reads changes a weight's size; one that counts as unread changes none."""
    usual = config(placement="pre", init=init)
    for name, value in (("variance_budget", 2.0), ("variance_exponent", 0.5), ("init_targets", ("ffn_out",))):
        changed = sizes(dataclasses.replace(usual, **{name: value})) != sizes(usual)
        assert changed == (f"model.{name}" not in unread(init)), name


@pytest.mark.parametrize("placement", ["pre", "post", "span"])
def test_a_multiplier_is_the_weights_factor_moved_into_the_forward_pass(placement):
    """Same function at the start, and weights of another size: those of a branch without the factor."""
    weight = config(placement=placement, init="scale", depth=3)
    multiplier = dataclasses.replace(weight, depth_factor="multiplier")
    tokens = jnp.arange(24, dtype=jnp.int32).reshape(2, 12)
    logits = []
    for cfg in (weight, multiplier):
        model, params = draw(cfg)
        logits.append(np.asarray(model.bind(params)(tokens)))
        damped = PLACEMENTS[placement].additions.values()
        assert ("attn_out" in damped) == (placement != "span")
    # A factor in another place rounds otherwise: the largest difference seen is 1e-6 of the largest logit.
    np.testing.assert_allclose(logits[0], logits[1], rtol=0, atol=1e-5 * np.abs(logits[0]).max())
    factor = sizes(weight)["ffn_out"] / sizes(multiplier)["ffn_out"]
    assert factor == pytest.approx((len(PLACEMENTS[placement].additions) * 3 * 3) ** -0.5)
    assert branch_variance(weight) == pytest.approx(branch_variance(multiplier))


@pytest.mark.parametrize(("placement", "damped"), [("pre", 2), ("post", 2), ("span", 1)])
def test_shrink_damps_all_matrices_of_a_block_as_much_as_scale_damps_some(placement, damped):
    products = []
    for init in ("scale", "shrink"):
        found = sizes(config(placement=placement, init=init, depth=12))
        products.append(math.prod(found[site] for site in ("q", "k", "v", "attn_out", "ffn_in", "ffn_out")))
        assert found["embed"] == 1.0
    assert products[0] == pytest.approx(products[1])
    assert found["q"] * 8 == pytest.approx((12 * 12 * damped) ** (-0.5 * damped / 6))


@pytest.mark.parametrize("placement", ["pre", "span"])
@pytest.mark.parametrize(
    ("name", "power", "place"),
    [("scale-L0.5", 0.5, "weight"), ("scale-L0.75-mult", 0.75, "multiplier"), ("scale-L1", 1.0, "weight"),
     ("shrink-L0.5", 0.5, "weight")],
)  # fmt: skip
def test_a_reading_is_named_by_the_power_of_depth_and_a_config_file_takes_the_name(name, power, place, placement):
    shallow, deep = (load(f"configs/dense.py:depth={d},placement={placement},init={name}").model for d in (6, 24))
    assert init_of(deep) == name and deep.depth_factor == place and deep.init == name.partition("-")[0]
    assert depth_factor(deep) / depth_factor(shallow) == pytest.approx(4**-power)


def test_the_default_and_the_published_reading_are_one_and_other_initialisations_have_no_reading():
    load_init = {
        arg: init_of(load(f"configs/dense.py:{arg}").model) for arg in ("init=scale", "rival=span", "init=gpt2")
    }
    assert load_init == {"init=scale": "scale-L1", "rival=span": "scale-L1", "init=gpt2": "gpt2"}
    with pytest.raises(UserError, match=r"model\.init='scale-1' is unknown"):
        load("configs/dense.py:init=scale-1")
