"""What has a backward pass of its own, against closed forms in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import assert_trees_close

from spannorm_jax.config import Config, replace
from spannorm_jax.errors import UserError
from spannorm_jax.model import layers
from spannorm_jax.model.kernels.cpu import gelu, linear
from spannorm_jax.model.layers import Norm, rotary_angles, rotate
from spannorm_jax.validation import validate


# Wider and narrower than its input, and with outputs of two axes: each way to make the weight's gradient.
@pytest.mark.parametrize("outputs", [(7,), (3,), (2, 4), (1, 3)], ids=str)
def test_linear(outputs):
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((2, 6, 5)), rng.standard_normal((5, *outputs))
    g = rng.standard_normal((2, 6, *outputs))
    out, vjp = jax.vjp(linear, jnp.float32(x), jnp.float32(w))
    dx, dw = vjp(jnp.float32(g))
    # Sums of at most 12 products: largest error seen 7e-7.
    np.testing.assert_allclose(out, np.tensordot(x, w, 1), rtol=0, atol=5e-6)
    np.testing.assert_allclose(dx, g.reshape(2, 6, -1) @ w.reshape(5, -1).T, rtol=0, atol=5e-6)
    want = x.reshape(12, 5).T @ g.reshape(12, -1)
    np.testing.assert_allclose(dw, want.reshape(w.shape), rtol=0, atol=5e-6)


def test_gelu_and_its_slope():
    x = np.linspace(-12, 12, 481)
    cdf = np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in x])
    slope = cdf + x * np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
    out, vjp = jax.vjp(gelu, jnp.float32(x))
    # 1 + erf rounds to a multiple of 2^-24, which x multiplies: below 12 * 2^-24 = 7e-7, besides x's own rounding.
    np.testing.assert_allclose(out, x * cdf, rtol=3e-7, atol=1e-6)
    np.testing.assert_allclose(vjp(jnp.ones_like(out))[0], slope, rtol=3e-7, atol=1e-6)


def test_gelu_stays_in_bfloat16():
    x = jnp.linspace(-4, 4, 33, dtype=jnp.bfloat16)
    out, vjp = jax.vjp(gelu, x)
    assert out.dtype == vjp(out)[0].dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(out), gelu(jnp.float32(x)), rtol=2**-8)  # rounded once


SMALLEST_EPS, SMALLEST_THETA = 1e-24, 1.0


@pytest.mark.parametrize(
    ("key", "least"),
    [("model__norm_eps", SMALLEST_EPS), ("model__rope_theta", SMALLEST_THETA), ("optim__eps", 2**-126)],
)
def test_the_smallest_legal_values(key, least):
    validate(replace(Config(), **{key: least}))
    with pytest.raises(UserError, match=rf"{key.replace('__', '.')}=\S+ is too small: .*; write \S+ or more"):
        validate(replace(Config(), **{key: least * 0.99}))


# Rows of nothing, of one value (which LayerNorm makes nothing), of about sqrt(eps), of usual and of large values.
@pytest.mark.parametrize("eps", [SMALLEST_EPS, 1e-6])
@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm"])
def test_norm_and_its_gradient_at_any_size_of_row(kind, eps):
    D, rng = 8, np.random.default_rng(0)
    rows = np.stack([np.zeros(D), np.full(D, 3.0), *(size * rng.standard_normal(D) for size in (eps**0.5, 1.0, 1e10))])
    rows, g = np.float64(np.float32(rows)), rng.standard_normal((5, D))
    out, vjp = jax.vjp(Norm(kind, D, eps, "ffn"), jnp.float32(rows))
    (grad,) = vjp(jnp.float32(g))

    def centred(x):
        return x - x.mean(-1, keepdims=True) if kind == "layernorm" else x

    x = centred(rows)
    scale = 1 / np.sqrt(np.mean(x**2, -1, keepdims=True) + eps)
    want = centred(g * scale - x * scale**3 * np.mean(g * x, -1, keepdims=True))
    # A few roundings of values of one size: largest error seen 1.7e-7.
    np.testing.assert_allclose(out, x * scale, rtol=0, atol=1e-6)
    want[~np.any(x, axis=-1)] = 0  # a row of nothing passes none: eps^(-1/2) in each norm would overflow
    np.testing.assert_allclose(grad / scale, want / scale, rtol=0, atol=1e-6)


@pytest.mark.parametrize("theta", [SMALLEST_THETA, 3e38])
def test_rotations_keep_lengths_at_any_theta_and_position(theta):
    x = np.float32(np.random.default_rng(0).standard_normal((1, 2**16, 1, 64)))
    turned = rotate(x, rotary_angles(2**16, 64, theta))
    np.testing.assert_allclose(np.sum(np.square(turned), -1), np.sum(x**2, -1), rtol=2e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_rotation_of_a_tpu_is_that_of_others(dtype, monkeypatch):
    """Its swap of a head's halves is exact: the same products and sums, whose roundings alone may fuse otherwise."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 7, 3, 16)), dtype)
    angles = rotary_angles(7, 16, 100.0)
    want = rotate(x, angles)
    monkeypatch.setattr(layers, "target_platform", lambda: "tpu")
    turned = rotate(x, angles)
    assert turned.dtype == want.dtype
    assert_trees_close(turned, want, float(jnp.finfo(dtype).eps))
