"""What has a backward pass of its own, against closed forms in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spannorm_jax.model.layers import gelu, linear


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
