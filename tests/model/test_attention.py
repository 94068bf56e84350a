"""Every implementation against a float64 loop over heads and positions, its gradient against central differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spannorm_jax.model.attention import IMPLEMENTATIONS, attention

B, H, G, K = 2, 4, 2, 8


def reference(q, k, v):
    out = np.zeros_like(q)
    for b, h, t in np.ndindex(q.shape[0], H, q.shape[1]):
        g = h // (H // G)
        logits = k[b, : t + 1, g] @ q[b, t, h] / K**0.5
        p = np.exp(logits - logits.max())
        out[b, t, h] = p / p.sum() @ v[b, : t + 1, g]
    return out


def inputs(T, scale=1.0):
    rng = np.random.default_rng(T)
    return [scale * rng.standard_normal((B, T, heads, K)) for heads in (H, G, G)]


# 1: nothing to mask; 37: no divisor, one block; 128 and 192: two and three blocks; 600: blocks of 75.
@pytest.mark.parametrize("T", [1, 37, 128, 192, 600])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_output(name, T):
    q, k, v = inputs(T)
    out = attention(*(jnp.float32(x) for x in (q, k, v)), name)
    # Sums of up to 600 float32 terms of size 1 / T: largest error seen 4.7e-7.
    np.testing.assert_allclose(out, reference(q, k, v), rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_gradients(name):
    exact, rng = inputs(128), np.random.default_rng(0)
    cotangent = rng.standard_normal(exact[0].shape)

    def value(*x):
        return jnp.sum(attention(*x, name) * jnp.float32(cotangent))

    grads = jax.grad(value, (0, 1, 2))(*(jnp.float32(x) for x in exact))
    for i, grad in enumerate(grads):
        direction = rng.standard_normal(exact[i].shape)
        moved = [[x + s * direction if j == i else x for j, x in enumerate(exact)] for s in (1e-5, -1e-5)]
        difference = np.sum((reference(*moved[0]) - reference(*moved[1])) * cotangent) / 2e-5
        # Terms of both signs: the error is float32's of the largest partial sum, largest seen 6.8e-6.
        assert np.vdot(np.float64(grad), direction) == pytest.approx(difference, abs=3e-5, rel=0)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_large_logits_do_not_overflow(name):
    q, k, v = inputs(128, scale=40.0)  # logits to about 10^4, whose exponential no float holds
    out = attention(*(jnp.float32(x) for x in (q, k, v)), name)
    np.testing.assert_allclose(out, reference(q, k, v), rtol=0, atol=4e-4)  # largest error seen 9e-5
    assert np.isfinite(out).all()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_bfloat16_stays_bfloat16(name):
    q, k, v = inputs(128)
    out = attention(*(jnp.bfloat16(x) for x in (q, k, v)), name)
    assert out.dtype == jnp.bfloat16
    # Inputs, weights and output are each rounded to 8 bits: largest error seen 0.013.
    np.testing.assert_allclose(np.float32(out), reference(q, k, v), rtol=0, atol=0.03)
