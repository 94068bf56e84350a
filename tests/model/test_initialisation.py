"""Initialisations: drawn weights and measured variances against what the package predicts, within sampling error.

Inputs are orthogonal rows of unit mean square, so that pre-activations are exactly Gaussian and independent between
rows, and the sampling error of a branch's variance can be written down (`branch_error`). Weights are drawn once per
case from a fixed seed; a bound is FIVE standard errors.
"""

import dataclasses
import functools
import math
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import nnx

from spannorm_jax import show_init
from spannorm_jax.config import ModelConfig, MoEConfig, unread
from spannorm_jax.config_file import load
from spannorm_jax.errors import UserError
from spannorm_jax.model.definition import define
from spannorm_jax.model.initialisation import (
    INITS,
    depth_factor,
    hidden_second_moment,
    init_of,
    initial_size,
    plain,
    predicted_additions,
    predicted_branch_variance,
    residual_additions,
)
from spannorm_jax.model.layers import rotary_angles
from spannorm_jax.model.placement import PLACEMENTS
from spannorm_jax.resolution import default_ffn_dim

FIVE = 5


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


def moments(ffn, std):
    """E h, E h^2, E h^4 of a hidden unit whose pre-activations are N(0, std^2), by the trapezoidal rule.

    Against a Gaussian the rule converges like exp(-2 pi d / step), d the distance of the integrand's nearest pole
    from the real axis (pi / std for silu, none for gelu): at step 1/64 far below rounding.
    """
    z = np.arange(-40 * 64, 40 * 64 + 1, dtype=np.longdouble) / 64
    density = np.exp(-(z**2) / 2) / np.sqrt(2 * np.longdouble(np.pi)) / 64
    a = std * z
    if ffn == "relu":  # half of the moments of N(0, std^2); in E a^p the trapezoidal rule would see the kink
        return std / math.sqrt(2 * math.pi), std**2 / 2, 3 * std**4 / 2
    if ffn == "gelu":
        h = a * (1 + reference.erf(np.float64(a) / math.sqrt(2))) / 2
        return tuple(float(np.sum(density * h**p)) for p in (1, 2, 4))
    silu = a / (1 + np.exp(-a))
    second, fourth = (float(np.sum(density * silu**p)) for p in (2, 4))
    return 0.0, second * std**2, fourth * 3 * std**4  # times the moments of b


# ---- the hidden unit's second moment -------------------------------------------------------------------


@pytest.mark.parametrize("std", [0.05, 0.3, 1.0, 1.5, 2.0])
@pytest.mark.parametrize("ffn", ["swiglu", "gelu", "relu"])
def test_second_moment_is_the_integral(ffn, std):
    assert hidden_second_moment(ffn, std) == pytest.approx(moments(ffn, std)[1], rel=1e-9)


def test_second_moment_of_gelu_in_closed_form():
    """E gelu(x)^2 for x ~ N(0, 1) is 1/4 + asin(1/2) / (2 pi) + 1 / (2 pi sqrt(3)).

    By Stein's lemma twice: E x^2 Phi(x)^2 = E Phi^2 + E (Phi^2)'' with E Phi^2 = 1/4 + asin(1/2) / (2 pi) = 1/3, and
    E (Phi^2)'' = E[2 phi^2 - 2 x phi Phi] = 2 / (2 pi sqrt(3)) - 1 / (2 pi sqrt(3)) = 1 / (2 pi sqrt(3)).
    """
    want = 1 / 4 + math.asin(1 / 2) / (2 * math.pi) + 1 / (2 * math.pi * math.sqrt(3))
    assert hidden_second_moment("gelu") == pytest.approx(want, rel=1e-12)


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


def test_a_std_may_differ_by_layer(monkeypatch):
    """Empirical stds of n Gaussian draws each: relative standard error 1 / sqrt(2n)."""

    def growing(cfg, spec):
        return 0.5 * (1 + np.array(spec.layers)) if spec.layers and spec.start is None else plain(cfg, spec)

    monkeypatch.setitem(INITS, "growing", growing)
    cfg = config(init="growing", moe=MoEConfig(num_experts=2, expert_dim=8, first_dense=2, every=3))
    _, params = draw(cfg)
    for name, layers in (("blocks", (0, 1, 2, 3, 5, 6)), ("moe_blocks", (4, 7))):
        for layer, values in zip(layers, np.asarray(params[name]["attn"]["q"], np.float64), strict=True):
            error = FIVE / math.sqrt(2 * values.size)
            assert values.std() == pytest.approx(0.5 * (1 + layer), rel=error), layer


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


def test_the_published_numbers_of_plain_and_gpt2():
    gains = {"after_attn": 1.0, "after_ffn": 1.0, "entry": 1.0}
    assert sizes(config(init="plain", width=64, depth=8, ffn_dim=176)) == pytest.approx(
        dict.fromkeys(("q", "k", "v", "attn_out", "ffn_in", "head"), 1 / 8)
        | {"ffn_out": 176**-0.5, "embed": 1.0}
        | gains
    )
    gpt2 = {site: size for site, size in sizes(config(init="gpt2")).items() if site not in gains}
    assert gpt2.pop("attn_out") == pytest.approx(0.02 / 4)  # 1 / sqrt(2 * 8)
    assert gpt2.pop("ffn_out") == pytest.approx(0.02 / 4)
    assert set(gpt2.values()) == {0.02}


@pytest.mark.parametrize("tied_head", [False, True])
def test_embeddings_enter_with_unit_variance(tied_head):
    """n = 64 * 64 draws: relative standard error of the variance sqrt(2 / n)."""
    cfg = config(tied_head=tied_head, placement="post", depth=1)
    model, params = draw(cfg)
    embed = np.asarray(params["embed"], np.float64) * (8 if tied_head else 1)
    assert np.mean(embed**2) == pytest.approx(1, abs=FIVE * math.sqrt(2 / embed.size))
    # PostNorm's block sees the embeddings as they are: a block whose branches are 0 norms them and nothing else.
    silent = jax.tree.map(jnp.zeros_like, params["blocks"])
    silent["norms"] = jax.tree.map(jnp.ones_like, silent["norms"])
    tokens = np.arange(cfg.vocab_size)[None]
    features = model.bind(params | {"blocks": silent}).run(tokens).features
    np.testing.assert_allclose(features[0], embed / np.sqrt(np.mean(embed**2, axis=1, keepdims=True)), rtol=1e-4)


# ---- branch variance -------------------------------------------------------------------------------------


def orthogonal_rows(n, width, seed=5):
    """(n, width): orthogonal, each row of mean square 1."""
    q, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((width, n)))
    return (q.T * math.sqrt(width)).astype(np.float32)


def block_modules(model, params, layer):
    graph, weights = nnx.split(model.bind(params).blocks)
    return nnx.merge(graph, jax.tree.map(lambda w: w[layer], weights))


def measure_branches(model, params, x_NxD):
    """Mean square of both branches, block by block: (L,) each. A row is a sequence of one token, its own position 0."""

    cfg = model.cfg

    def one(layer):
        block = block_modules(model, params, layer)
        x = x_NxD[:, None]
        angles = rotary_angles(1, cfg.width // cfg.num_heads, cfg.rope_theta)
        return jnp.mean(block.attn(x, angles) ** 2), jnp.mean(block.ffn(x) ** 2)

    attn, ffn = jax.jit(lambda: jax.lax.map(one, jnp.arange(cfg.depth)))()
    return {"attn": np.asarray(attn, np.float64), "ffn": np.asarray(ffn, np.float64)}


def branch_error(N, D, F, mean_share, kurtosis, copies=1):
    """Relative standard error of the mean square of y = h W over N rows and D outputs, W Gaussian, in one block.

    h holds F numbers a row, independent between rows, `copies` equal ones each (heads that share a value), with E h^2 =
    m, (E h)^2 = mean_share * m and E h^4 = kurtosis * m^2. Given h, y is Gaussian with row covariance H H^T, so the
    variance from W is 2 / D * |H H^T|^2 / tr(H H^T)^2 with |H H^T|^2 = N (F m)^2 + N^2 (copies F m^2 + (F m
    mean_share)^2), and h's own fluctuation adds copies (kurtosis - 1) / (N F).
    """
    from_weights = 2 / D * (1 / N + copies / F + mean_share**2)
    return math.sqrt(from_weights + copies * (kurtosis - 1) / (N * F))


CASES = [
    {"placement": placement, "init": init, "ffn": ffn}
    for init, swiglu, gelu in (("plain", "pre", "post"), ("gpt2", "span", "pre"), ("scale", "pre", "span"))
    for placement, ffn in ((swiglu, "swiglu"), (gelu, "gelu"))
]
CASES += [
    {"placement": "post", "init": "scale", "variance_budget": 0.25, "depth": 3},
    {"placement": "pre", "init": "scale", "ffn": "relu"},
    {"placement": "span_raw", "init": "scale", "variance_budget": 4.0, "depth": 24, "width": 32},
    {"placement": "span", "init": "scale", "width": 128, "depth": 16, "num_kv_heads": 1},
    {"placement": "span", "init": "scale", "init_targets": ("attn_out", "ffn_out")},
    {"placement": "pre", "init": "scale", "init_targets": ("v", "attn_out", "ffn_in", "ffn_out"), "ffn": "gelu"},
    {"placement": "post", "init": "scale", "init_targets": ("v", "attn_out", "ffn_in", "ffn_out"), "depth": 2},
    {"placement": "pre", "init": "scale", "init_targets": ("ffn_in",), "variance_budget": 2.0, "num_kv_heads": 2},
]


@pytest.mark.parametrize("changes", CASES, ids=lambda c: "-".join(str(v) for v in c.values()))
def test_branches_have_the_predicted_variance(changes):
    """Feed-forward at every position, attention at position 0, for input of unit variance."""
    cfg = config(**changes)
    D, F, L = cfg.width, cfg.ffn_dim, cfg.depth
    N = D // 2
    model, params = draw(cfg)
    measured = measure_branches(model, params, orthogonal_rows(N, D))
    predicted = branch_variance(cfg)

    mean, second, fourth = moments(cfg.ffn, sizes(cfg)["ffn_in"] * math.sqrt(D))
    errors = {
        "attn": branch_error(N, D, D, 0.0, 3.0, copies=cfg.num_heads // cfg.num_kv_heads),
        "ffn": branch_error(N, D, F, mean**2 / second, fourth / second**2),
    }
    for branch, error in errors.items():
        ratio = measured[branch] / predicted[branch]
        # Blocks are drawn independently. At most 3% of a mean, at most 15% of a block: the bounds can fail.
        assert FIVE * error / math.sqrt(L) < 0.25
        assert abs(ratio.mean() - 1) < FIVE * error / math.sqrt(L), (branch, ratio.mean())
        assert np.abs(ratio - 1).max() < (FIVE + 1) * error, (branch, ratio)


@pytest.mark.parametrize("ffn", ["swiglu", "gelu", "relu"])
@pytest.mark.parametrize("init", INITS)
def test_feed_forward_prediction_is_the_textbook_product(init, ffn):
    """Var F = F * Var W_out * E h^2 with pre-activations of variance D * Var W_in, from an independent integral."""
    cfg = config(init=init, ffn=ffn, init_targets=("ffn_in", "ffn_out"))
    stds = {site: np.ravel(size)[0] for site, size in sizes(cfg).items()}
    second = moments(ffn, stds["ffn_in"] * math.sqrt(cfg.width))[1]
    assert branch_variance(cfg)["ffn"] == pytest.approx(cfg.ffn_dim * stds["ffn_out"] ** 2 * second, rel=1e-9)


@pytest.mark.parametrize(("budget", "exponent"), [(0.1, 0.5), (1.0, 1.0), (3.0, 0.0)])
@pytest.mark.parametrize("ffn", ["swiglu", "gelu"])
@pytest.mark.parametrize("depth", [1, 12, 100])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_scale_spends_the_budget_over_the_streams_additions(placement, depth, ffn, budget, exponent):
    """SpanNorm's stream is added to by F alone, once a block; that of the others by A and F. In all c L^-p."""
    changes = {"variance_budget": budget, "variance_exponent": exponent}
    cfg = config(placement=placement, depth=depth, ffn=ffn, init="scale", **changes)
    added = {branch: sum(v) / depth for branch, v in predicted_additions(cfg, define(cfg).specs()).items()}
    number = 1 if placement in ("span", "span_raw") else 2
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


@pytest.mark.parametrize("depth", [4, 24])
@pytest.mark.parametrize(("placement", "init"), [("peri", "scale"), ("peri", "plain"), ("layerscale", "scale")])
def test_the_streams_variance_is_what_show_init_prints(placement, init, depth):
    """One plus what is added, measured where a token attends to itself alone; Peri-LN with plain grows by 2L."""
    N = D = 128
    cfg = config(placement=placement, init=init, width=D, depth=depth, vocab_size=N)
    model, params = draw(cfg)
    tokens = np.arange(N)[:, None]
    stream, _ = run_recording(model, params, tokens)
    added = sum(np.sum(v) for v in predicted_additions(cfg, model.specs()).values())
    assert added == pytest.approx(1 / depth if init == "scale" else 2 * depth)
    # Cross terms of a branch meet a stream of variance up to 1 + added; a normed branch has its variance exactly.
    error = math.hypot(cross_error(N, D, added * (1 + added)), math.sqrt(2 / (N * D)), added * 0.02)
    assert FIVE * error < 0.25 * (1 + added)
    assert abs(np.mean(stream**2) - (1 + added)) < FIVE * error


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
    zeros = {
        spec.site
        for spec in model.specs()
        if initial_size(cfg, spec) is not None and np.all(initial_size(cfg, spec) == 0)
    }
    tokens = jnp.arange(8, dtype=jnp.int32)[None]
    gradients = jax.jit(jax.grad(lambda p: jnp.sum(model.bind(p)(tokens)[..., 0] ** 2)))(params)
    moved = {}
    model.map_weights(lambda spec, g: moved.setdefault(spec.site, float(jnp.abs(g).max())), gradients)
    assert zeros and all(moved[site] > 0 for site in zeros)
    assert ("attn_out" in zeros) == (placement not in ("span", "span_raw", "peri", "olmo2", "layerscale", "rezero"))


@pytest.mark.parametrize("target", ["v", "attn_out", "ffn_in", "ffn_out"])
def test_init_targets_take_the_factor_and_no_other_weight_does(target):
    base = sizes(config(placement="pre", init="scale", init_targets=("v", "attn_out", "ffn_in", "ffn_out")))
    one = sizes(config(placement="pre", init="scale", init_targets=(target,), variance_budget=3.0))
    for site in ("v", "attn_out", "ffn_in", "ffn_out"):
        # sqrt(c / (L 2L)): budget 3 against 1 for the target, none against sqrt(1 / 128) for the others.
        assert one[site] / base[site] == pytest.approx(math.sqrt(3 if site == target else 128))
    for site in ("embed", "q", "k", "head"):
        assert one[site] == base[site]


# ---- the whole model --------------------------------------------------------------------------------------


def run_recording(model, params, tokens):
    """(final stream, {norm: (L,) mean square of what enters it}): the blocks, with norms that record."""
    cfg, decoder = model.cfg, model.bind(params)
    placement = PLACEMENTS[cfg.placement]
    angles = rotary_angles(tokens.shape[1], cfg.width // cfg.num_heads, cfg.rope_theta)

    def run_block(stream, layer):
        block, seen = block_modules(model, params, layer), {}

        def recorder(name):
            def norm(x):
                seen[name] = jnp.mean(x**2)
                return getattr(block.norms, name)(x)

            return norm

        names = (*placement.block_norms, *placement.block_gains)
        norms = types.SimpleNamespace(**{name: recorder(name) for name in names})
        out = placement.block(stream, lambda x: block.attn(x, angles), block.ffn, norms, layer, cfg)
        return out, seen

    entered = placement.enter(decoder.embed[...][tokens], decoder.ends)
    out = jax.jit(lambda: jax.lax.scan(run_block, entered, jnp.arange(cfg.depth)))()
    return jax.tree.map(lambda x: np.asarray(x, np.float64), out)


def cross_error(N, D, additions_variance):
    """Standard error of 2 mean(x y), the cross term that a zero-mean branch y = h W of the given variance adds.

    Var = 4 s^2 sum_nm (x_n x_m)(h_n h_m) / (N D)^2 |h|^2: N D from the diagonal, N^2 from rows that are independent
    and whose overlaps are of the order 1 / sqrt(D).
    """
    return 2 * math.sqrt(additions_variance * (1 / (N * D) + 1 / D**2))


@pytest.mark.parametrize(("depth", "budget"), [(4, 1.0), (16, 3.0)])
def test_prenorm_with_scale_ends_at_one_plus_the_budget(depth, budget):
    """Each of the 2L branches adds its variance: with p = 0, 1 + c for sequences of one token, at any depth."""
    N = D = 128
    changes = {"variance_budget": budget, "variance_exponent": 0.0}
    cfg = config(placement="pre", init="scale", width=D, depth=depth, vocab_size=N, **changes)
    finals = []
    for seed in range(2):
        model, params = draw(cfg, seed)
        stream, _ = run_recording(model, params, np.arange(N)[:, None])
        finals.append(np.mean(stream**2))
    # Cross terms meet a stream of variance up to 1 + c; embeddings: sqrt(2 / ND); branches: each one's own error.
    error = math.hypot(
        cross_error(N, D, budget * (1 + budget)),
        math.sqrt(2 / (N * D)),
        budget * branch_error(N, D, D, 0.0, 10.0) / math.sqrt(2 * depth),
    ) / math.sqrt(len(finals))
    assert FIVE * error < 0.12 * (1 + budget)
    assert abs(np.mean(finals) - (1 + budget)) < FIVE * error


def test_prenorm_with_scale_stays_within_the_budget_over_a_sequence():
    """Later positions average values of several tokens, which lowers attention's share: between 1 + c/2 and 1 + c."""
    cfg = config(placement="pre", init="scale", width=128, depth=8, vocab_size=128, variance_exponent=0.0)
    model, params = draw(cfg)
    tokens = np.random.default_rng(0).permutation(128)[None]
    stream, _ = run_recording(model, params, tokens)
    last_half = np.mean(stream[:, 64:] ** 2)
    error = cross_error(64, 128, 2.0)
    assert 1.5 - FIVE * error < last_half < 2.0 - 0.1


@pytest.mark.parametrize("depth", [4, 16])
def test_prenorm_with_plain_init_grows_with_depth(depth):
    """1 + L (Var A + Var F), unbounded: what ScaleInit's budget prevents."""
    N = D = 128
    cfg = config(placement="pre", init="plain", width=D, depth=depth, vocab_size=N)
    model, params = draw(cfg)
    stream, _ = run_recording(model, params, np.arange(N)[:, None])
    want = 1 + depth * sum(branch_variance(cfg).values())
    # Cross terms of branch l meet a stream of variance up to `want`.
    assert abs(np.mean(stream**2) - want) < FIVE * cross_error(N, D, want**2 / 2)


@pytest.mark.parametrize(("init", "depth", "budget"), [("scale", 4, 1.0), ("scale", 16, 2.0), ("plain", 16, 1.0)])
@pytest.mark.parametrize("placement", ["span", "post"])
def test_skip_path_gain(placement, init, depth, budget):
    """A norm after the sum divides the skip by the sum's root mean square; the product over the norms on the skip path.

    SpanNorm has one such norm a block, gain (1 + Var F)^(-L/2), PostNorm two, [(1 + Var A)(1 + Var F)]^(-L/2). With
    scale and p = 0 both stay near exp(-c/2) at any depth; with plain init they fall exponentially.
    """
    N = D = 128
    changes = {"variance_budget": budget, "variance_exponent": 0.0}
    cfg = config(placement=placement, init=init, width=D, depth=depth, vocab_size=N, **changes)
    model, params = draw(cfg)
    # The first block's skip is the embeddings in PostNorm: their variance is 1 within sqrt(2 / ND).
    _, mean_squares = run_recording(model, params, np.arange(N)[:, None])
    on_skip = ("ffn",) if placement == "span" else ("attn", "ffn")
    log_gain = -sum(np.sum(np.log(mean_squares[f"after_{name}"])) for name in on_skip) / 2

    variance = branch_variance(cfg)
    branches = [variance[name] for name in on_skip]
    want = -depth / 2 * sum(math.log1p(v) for v in branches)
    # Half the sum of relative errors: cross terms and the branch's own, over 1 + v, independent between branches.
    each = [math.hypot(cross_error(N, D, v), v * branch_error(N, D, D, 0.0, 10.0)) / (1 + v) / 2 for v in branches]
    error = math.hypot(*each) * math.sqrt(depth) + (placement == "post") * math.sqrt(2 / (N * D)) / 2
    assert abs(log_gain - want) < FIVE * error
    if init == "scale":  # at most exp(-c/2), whatever the depth; less deep, less decay
        assert -budget / 2 - FIVE * error < log_gain < -budget / 2 + budget**2 / (2 * depth) + FIVE * error
    else:
        assert log_gain < -0.1 * depth


# ---- what rivals were published with ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("init", "expected"),
    [
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


def test_deepnorms_two_constants_balance_each_other():
    """Its theorem's condition: 2L (v^2 + w^2) / alpha^2 = 1 in orders, with v and w the damping of a sub-layer."""
    for depth in (1, 18, 100):
        cfg = config(placement="deepnorm", init="deepnorm", depth=depth)
        ones = types.SimpleNamespace(after_attn=lambda x: x, after_ffn=lambda x: x)
        squared = PLACEMENTS["deepnorm"].block(1.0, lambda x: 0.0, lambda x: 0.0, ones, 0, cfg)  # alpha twice
        beta = sizes(cfg)["ffn_out"] / sizes(dataclasses.replace(cfg, init="xavier"))["ffn_out"]
        assert 2 * depth * 2 * beta**2 / squared == pytest.approx(1)


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
    cfg = config(placement=placement, init="shrink", depth=12)
    assert sizes(cfg)["q"] * 8 == pytest.approx((12 * 12 * damped) ** (-0.5 * damped / 6))


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
