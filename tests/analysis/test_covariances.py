"""Kernels of covariances against integrals, closed forms, and the package's own layers with drawn weights.

A layer's kernel is compared with means over draws of its weights: a bound is FIVE standard errors of the draws, and a
share for finite heads or hidden units where the docstring of the kernel says that it neglects them.
"""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference import erf

from spannorm_jax.analysis.covariances import (
    AttentionKernel,
    FeedForwardKernel,
    MixtureKernel,
    Projection,
    activation_kernels,
    routing_overlap,
)
from spannorm_jax.config import ExecutionConfig, ModelConfig, MoEConfig
from spannorm_jax.model.initialisation import mixture_gain
from spannorm_jax.model.layers import Attention, FeedForward, rotary_angles
from spannorm_jax.model.moe.layer import MoE
from spannorm_jax.model.placement import PLACEMENTS

FIVE = 5


# ---- activations ----------------------------------------------------------------------------------------


def silu(x):
    return x / (1 + np.exp(-x))


def silu_slope(x):
    s = 1 / (1 + np.exp(-x))
    return s * (1 + x * (1 - s))


def gelu(x):
    return x * (1 + erf(x / math.sqrt(2))) / 2


def gelu_slope(x):
    return (1 + erf(x / math.sqrt(2))) / 2 + x * np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)


def integral(f, s, r, c):
    """E f(s u) f(r w) with corr(u, w) = c, by the trapezoidal rule in two dimensions."""
    z = np.arange(-9, 9.01, 1 / 8)
    density = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi) / 8
    w = c * z[:, None] + math.sqrt(1 - c**2) * z[None]
    return float(np.sum(density[:, None] * density[None] * f(s * z)[:, None] * f(r * w)))


@pytest.mark.parametrize("c", [-1.0, -0.6, 0.0, 0.3, 0.95, 1.0])
@pytest.mark.parametrize(("s", "r"), [(1.0, 1.0), (0.02, 0.5), (2.0, 1.3)])
@pytest.mark.parametrize(("kind", "f", "slope"), [("swiglu", silu, silu_slope), ("gelu", gelu, gelu_slope)])
def test_activation_kernels_are_the_integrals(kind, f, slope, s, r, c):
    got, got_slope = activation_kernels(kind, np.array([[s * s, c * s * r], [c * s * r, r * r]]))
    # What the series leaves out at std 2 and correlation 1, as its docstring says; the integral's error is below 1e-9.
    assert got[0, 1] == pytest.approx(integral(f, s, r, c), rel=1e-5, abs=1e-6 * s * r)
    assert got_slope[0, 1] == pytest.approx(integral(slope, s, r, c), rel=1e-5)


def test_arc_cosine_kernels_at_known_angles():
    """Cho & Saul 2009: degree 1 is |x||y| (sin t + (pi - t) cos t) / pi, degree 0 is 1 - t / pi; half of both."""
    s, r = 1.3, 0.7
    for angle, first, zeroth in (
        (0, 1 / 2, 1 / 2),
        (np.pi / 3, (math.sqrt(3) / 2 + np.pi / 3) / (2 * np.pi), 1 / 3),
        (np.pi / 2, 1 / (2 * np.pi), 1 / 4),
        (np.pi, 0, 0),
    ):
        c = math.cos(angle)
        got, slope = activation_kernels("relu", np.array([[s * s, c * s * r], [c * s * r, r * r]]))
        assert got[0, 1] == pytest.approx(s * r * first, abs=1e-8)
        assert slope[0, 1] == pytest.approx(zeroth, abs=1e-7)


def test_a_gate_multiplies_by_the_correlation_and_gradients_come_both_ways():
    """SwiGLU at c = 1 and 0: h = silu(a) b has E h h' = c E silu silu', and dh = silu'(a) b da + silu(a) db."""
    kernel = FeedForwardKernel("ffn", "swiglu", 1.0, Projection(1.0), 1.0)
    independent, one = np.eye(2), np.ones((2, 2))
    np.testing.assert_allclose(kernel.forward(independent)[0, 1], 0, atol=1e-12)
    assert kernel.forward(one)[0, 1] == pytest.approx(integral(silu, 1, 1, 1), rel=1e-6)
    back, _ = kernel.backward(independent, one)
    assert back[0, 1] == pytest.approx(integral(silu, 1, 1, 0), rel=1e-6)
    assert back[0, 0] == pytest.approx(integral(silu_slope, 1, 1, 1) + integral(silu, 1, 1, 1), rel=1e-6)


# ---- layers with drawn weights ---------------------------------------------------------------------------

T, D = 5, 128


def with_covariance(covariance, seed):
    """(T, D) whose rows have exactly these products over D."""
    q, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((D, len(covariance))))
    return np.float32(np.linalg.cholesky(covariance) @ q.T * math.sqrt(D))


def covariance_of(seed, scale=1.0):
    """Tokens of unlike sizes and correlations."""
    x = np.random.default_rng(seed).standard_normal((T, 2 * T)) + 0.7
    sizes = np.linspace(0.8, 1.2, T) * scale
    C = x @ x.T
    return C / np.sqrt(np.outer(np.diag(C), np.diag(C))) * np.outer(sizes, sizes)


C, G = covariance_of(1), covariance_of(2, scale=0.5)


def config(**changes):
    cfg = {"depth": 1, "width": D, "num_heads": 4, "num_kv_heads": 4, "ffn_dim": 192, "vocab_size": 8}
    return ModelConfig(**cfg | {"dtype": "float32"} | changes)


def draws_of(make, call, number):
    """Output, input's gradient and weights' gradients of a layer over draws of weights N(0, s^2 / fan_in).

    s is 1.2, and gains are 1.1: factors 1.44 and 1.21 that a kernel has to put in the right places. Returns means over
    draws and their standard errors: products over D of outputs (T, T), of input gradients (T, T), weight's site ->
    squared norm of its gradient over D^2.
    """
    graph, params, rest = nnx.split(nnx.eval_shape(make), nnx.Param, ...)
    rest = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), rest)
    specs = {path: leaf.get_metadata()["spec"] for path, leaf in nnx.to_flat_state(params)}
    x, g = with_covariance(C, 3), with_covariance(G, 4)

    rng = np.random.default_rng(0)  # of NumPy: JAX's takes most of the test's time
    weights = {
        path: rng.standard_normal((number, *spec.shape), np.float32) * np.float32(1.2 / spec.fan_in**0.5)
        if spec.start is None
        else np.full((number, *spec.shape), 1.1, np.float32)
        for path, spec in specs.items()
    }

    @jax.jit
    def run(weights):
        def one(drawn):
            def layer(drawn, x):
                state = nnx.from_flat_state([(path, nnx.Param(value)) for path, value in drawn.items()])
                return call(nnx.merge(graph, state, rest), x[None])[0]

            out, vjp = jax.vjp(layer, drawn, x)
            of_weights, into = vjp(g)
            squares = {spec.site: jnp.sum(of_weights[path] ** 2) / D**2 for path, spec in specs.items() if spec.fan_in}
            return out @ out.T / D, into @ into.T / D, squares

        return jax.lax.map(one, weights)

    samples = jax.tree.map(lambda x: np.asarray(x, np.float64), run(weights))
    mean = jax.tree.map(lambda x: x.mean(axis=0), samples)
    return mean, jax.tree.map(lambda x: x.std(axis=0) / math.sqrt(number), samples)


def check(kernel, make, call, number, finite, sites):
    """A kernel within FIVE standard errors of the draws, and a share `finite` of the largest number of each matrix."""
    (out, into, squares), (out_error, into_error, squares_error) = draws_of(make, call, number)
    want_into, want_squares = kernel.backward(C, G)
    for got, want, error in ((out, kernel.forward(C), out_error), (into, want_into, into_error)):
        assert FIVE * error.max() < 0.25 * np.abs(want).max()  # the bound can fail
        assert np.all(np.abs(got - want) < FIVE * error + finite * np.abs(want).max()), (got / want, error / want)
    assert set(sites) == set(want_squares)
    for site in sites:
        bound = FIVE * squares_error[site] + finite * want_squares[site]
        assert abs(squares[site] - want_squares[site]) < bound, (site, squares[site] / want_squares[site])


def with_inner_norms(monkeypatch, *names):
    monkeypatch.setitem(PLACEMENTS, "pre", dataclasses.replace(PLACEMENTS["pre"], inner_norms=names))
    return "pre"


V = 1.44


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("kind", ["swiglu", "gelu", "relu"])
def test_a_feed_forward_against_drawn_weights(kind, norm, monkeypatch):
    """Neglected: 1 / width and 1 / units, here 1 / 128."""
    cfg = config(ffn=kind, placement=with_inner_norms(monkeypatch, *(["hidden"] if norm else [])))
    out = Projection(V, 1.1 if norm else None, cfg.norm_eps)
    kernel = FeedForwardKernel("ffn", kind, V, out, cfg.ffn_dim / D)
    check(kernel, lambda: FeedForward(cfg), lambda m, x: m(x), 128, 0.02, ("ffn_in", "ffn_out"))


@pytest.mark.parametrize(
    "moe",
    [
        MoEConfig(num_experts=4, top_k=2, expert_dim=64),
        MoEConfig(num_experts=5, top_k=2, expert_dim=64, num_shared=2, scores="sigmoid", renormalize=False),
    ],
    ids=["softmax", "sigmoid_shared"],
)
def test_experts_against_drawn_weights(moe):
    """Tokens of unlike variance have unlike logits, which the kernel neglects: 5% of the outermost here."""
    cfg = config(ffn="swiglu", moe=moe)
    expert, shared = (FeedForwardKernel(s, "swiglu", V, Projection(V), 64 / D) for s in ("expert", "shared"))
    kernel = MixtureKernel(moe, V, expert, shared if moe.num_shared else None)
    sites = [f"{name}_{end}" for name in ("expert", *(["shared"] if moe.num_shared else [])) for end in ("in", "out")]
    check(kernel, lambda: MoE(cfg, ExecutionConfig()), lambda m, x: m(x)[0], 256, 0.08, sites)


def test_routing_overlap_of_equal_and_of_unrelated_tokens():
    """Equal tokens share all: the mixture's gain. Unrelated ones by chance: E products of mean weights, each 1 / E."""
    moe = MoEConfig(num_experts=8, top_k=2)
    angles, overlap, _ = routing_overlap(moe, 1.0)
    assert overlap[0] == pytest.approx(mixture_gain(moe, 1.0))
    assert np.interp(np.pi / 2, angles, overlap) == pytest.approx(1 / 8, rel=0.01)
    assert np.all(np.diff(overlap) < 0)


@pytest.mark.parametrize(
    ("changes", "inner"),
    [
        ({}, ()),
        ({"num_kv_heads": 2}, ("q", "k")),
        ({}, ("v", "heads")),
    ],
    ids=["plain", "gqa_qk_norm", "v_and_heads_norm"],
)
def test_attention_against_drawn_weights(changes, inner, monkeypatch):
    """Four heads of 32: what the kernel neglects is 1 / 32 and 1 / 4 of a part."""
    cfg = config(placement=with_inner_norms(monkeypatch, *inner), **changes)

    def projection(name):
        return Projection(V, 1.1 if name in inner else None, cfg.norm_eps)

    kernel = AttentionKernel(*map(projection, ("q", "k", "v", "heads")), 32, cfg.rope_theta, draws=4096)
    angles = rotary_angles(T, 32, cfg.rope_theta)
    sites = ("q", "k", "v", "attn_out")
    execution = ExecutionConfig(attention="xla")
    check(kernel, partial(Attention, cfg, execution), lambda m, x: m(x, angles), 256, 0.04, sites)


def test_attention_over_equal_tokens_passes_nothing_to_queries_and_keys():
    """All values alike: no weight on them matters. The output is the values', whatever A is."""
    kernel = AttentionKernel(*4 * [Projection(1.3)], 16, 1e4)
    same, g = np.ones((T, T)), covariance_of(5)
    np.testing.assert_allclose(kernel.forward(same), 1.3**2 * same, rtol=1e-9)
    into, squares = kernel.backward(same, g)
    assert squares["q"] == pytest.approx(0, abs=1e-9) and squares["k"] == pytest.approx(0, abs=1e-9)
    # Each token's weights sum to one, so that what all tokens receive together is what they sent.
    assert into.sum() == pytest.approx(1.3**2 * g.sum())
