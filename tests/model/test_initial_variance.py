"""Variances of branches and of the stream at the start, measured and as the package predicts them.

Inputs are orthogonal rows of unit mean square, so that pre-activations are exactly Gaussian and independent between
rows, and the sampling error of a branch's variance can be written down (`branch_error`). Weights are drawn once per
case from a fixed seed; a bound is FIVE standard errors.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import nnx
from test_initialisation import FIVE, branch_variance, config, draw, sizes

from spannorm_jax.model.definition import define
from spannorm_jax.model.initialisation import hidden_second_moment, predicted_additions
from spannorm_jax.model.layers import rotary_angles
from spannorm_jax.model.placement import PLACEMENTS


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


@pytest.mark.parametrize("std", [0.05, 0.3, 1.0, 1.5, 2.0])
@pytest.mark.parametrize("ffn", ["swiglu", "gelu", "relu"])
def test_second_moment_is_the_integral(ffn, std):
    assert hidden_second_moment(ffn, std) == pytest.approx(moments(ffn, std)[1], rel=1e-9)


# ---- branch variance -------------------------------------------------------------------------------------


def orthogonal_rows(n, width, seed=5):
    """(n, width): orthogonal, each row of mean square 1."""
    q, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((width, n)))
    return (q.T * math.sqrt(width)).astype(np.float32)


def measure_branches(model, params, x_NxD):
    """Mean square of both branches, block by block: (L,) each. A row is a sequence of one token, its own position 0."""
    cfg = model.cfg
    graph, weights = nnx.split(model.bind(params).blocks)

    def one(weights):
        block, x = nnx.merge(graph, weights), x_NxD[:, None]
        angles = rotary_angles(1, cfg.width // cfg.num_heads, cfg.rope_theta)
        return jnp.mean(block.attn(x, angles) ** 2), jnp.mean(block.ffn(x) ** 2)

    attn, ffn = jax.jit(lambda: jax.lax.map(one, weights))()
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
    {"placement": "pre", "init": "plain"},
    {"placement": "post", "init": "plain", "ffn": "gelu"},
    {"placement": "span", "init": "gpt2"},
    {"placement": "post", "init": "scale", "variance_budget": 0.25, "depth": 3},
    {"placement": "pre", "init": "scale", "ffn": "relu"},
    {"placement": "span_raw", "init": "scale", "variance_budget": 4.0, "depth": 24, "width": 32},
    {"placement": "span", "init": "scale", "width": 128, "depth": 16, "num_kv_heads": 1},
    {"placement": "pre", "init": "scale", "init_targets": ("v", "attn_out", "ffn_in", "ffn_out"), "ffn": "gelu"},
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


# ---- the whole model --------------------------------------------------------------------------------------


def stream_at_the_end(monkeypatch, cfg, tokens, seed=0):
    """What blocks hand on to the model's end, in float64."""
    placement = PLACEMENTS[cfg.placement]
    monkeypatch.setitem(PLACEMENTS, cfg.placement, dataclasses.replace(placement, leave=lambda stream, n: stream))
    model, params = draw(cfg, seed)
    return np.asarray(jax.jit(lambda: model.bind(params).run(tokens).features)(), np.float64)


def cross_error(N, D, additions_variance):
    """Standard error of 2 mean(x y), the cross term that a zero-mean branch y = h W of the given variance adds.

    Var = 4 s^2 sum_nm (x_n x_m)(h_n h_m) / (N D)^2 |h|^2: N D from the diagonal, N^2 from rows that are independent
    and whose overlaps are of the order 1 / sqrt(D).
    """
    return 2 * math.sqrt(additions_variance * (1 / (N * D) + 1 / D**2))


ALONE = [
    *(
        ("pre", "scale", depth, {"variance_budget": c, "variance_exponent": 0.0}, c)
        for depth, c in ((4, 1.0), (16, 3.0))
    ),
    *(("pre", "plain", depth, {}, None) for depth in (4, 16)),
    *((placement, "scale", depth, {}, 1 / depth) for placement in ("peri", "layerscale") for depth in (4, 24)),
    *(("peri", "plain", depth, {}, 2 * depth) for depth in (4, 24)),
]


@pytest.mark.parametrize(("placement", "init", "depth", "changes", "want"), ALONE)
def test_the_streams_variance_is_what_show_init_prints(placement, init, depth, changes, want, monkeypatch):
    """One plus what is added, where a token attends to itself alone: ScaleInit's budget, whatever the depth.

    With plain PreNorm's stream grows by L (Var A + Var F), and Peri-LN's by 2L.
    """
    N = D = 128
    cfg = config(placement=placement, init=init, width=D, depth=depth, vocab_size=N, **changes)
    added = sum(np.sum(v) for v in predicted_additions(cfg, define(cfg).specs()).values())
    assert added == pytest.approx(depth * sum(branch_variance(cfg).values()) if want is None else want)
    finals = [np.mean(stream_at_the_end(monkeypatch, cfg, np.arange(N)[:, None], seed) ** 2) for seed in range(2)]
    # Cross terms of a branch meet a stream of variance up to 1 + added; embeddings; and each branch's own error.
    own = added * branch_error(N, D, D, 0.0, 10.0) / math.sqrt(2 * depth)
    error = math.hypot(cross_error(N, D, added * (1 + added)), math.sqrt(2 / (N * D)), own) / math.sqrt(2)
    assert FIVE * error < 0.2 * (1 + added)
    assert abs(np.mean(finals) - (1 + added)) < FIVE * error
