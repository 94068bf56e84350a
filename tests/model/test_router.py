"""Routers where float32 scores vanish or saturate, against closed forms in float64 that work in logarithms."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spannorm_jax.config import MoEConfig
from spannorm_jax.model.moe.router import load_balance_loss, route, router_stats

E = 6
LEVELS = (50.0, 95.0, 120.0, 1e4)


def extreme_logits():
    """Rows all at one level, near one level but distinct, of several levels with ties, and of usual size."""
    rng = np.random.default_rng(0)
    levels = [0.0, *(sign * level for level, sign in itertools.product((40.0, *LEVELS), (1, -1)))]
    rows = [np.full(E, level) for level in levels]
    rows += [level + rng.permutation(E) / 4 for level in levels]
    rows += [rng.choice(levels, E) for _ in range(40)]
    rows += list(rng.standard_normal((8, E)))
    return np.float32(rows)


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def reference(logits, bias, moe, cotangents):
    """Weights, ids, probabilities, the sums of router_stats, the load-balance loss, and the gradient of all of them
    under `cotangents` (of weights, probabilities, z and that loss)."""
    logits = np.float64(logits)
    log_softmaxes, log_sigmoids = log_softmax(logits), -np.logaddexp(0, -logits)
    log_scores = log_softmaxes if moe.scores == "softmax" else log_sigmoids
    preferred = np.exp(log_scores) + bias if moe.balance == "bias" else logits
    ids = np.argsort(-preferred, axis=-1, kind="stable")[:, : moe.top_k]  # of equals the first
    chosen = np.take_along_axis(log_scores, ids, -1)
    weights = np.exp(log_softmax(chosen) if moe.renormalize else chosen)
    log_probs = log_softmax(log_scores)
    probs = np.exp(log_probs)
    log_z = logits.max(-1) + np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1))
    counts = np.bincount(ids.ravel(), minlength=E)
    stats = {"counts": counts, "probs": probs.sum(0), "z": np.sum(log_z**2), "entropy": -np.sum(probs * log_probs)}
    balance = E * (counts / counts.sum()) @ probs.mean(0)

    c_weights, c_probs, c_z, c_balance = cotangents
    c_probs = c_probs + c_balance * E * counts / counts.sum() / len(logits)
    of_chosen = weights * (c_weights - moe.renormalize * np.sum(c_weights * weights, -1, keepdims=True))
    grad = probs * (c_probs - np.sum(c_probs * probs, -1, keepdims=True))
    np.put_along_axis(grad, ids, np.take_along_axis(grad, ids, -1) + of_chosen, -1)  # with respect to log_scores
    if moe.scores == "softmax":
        grad = grad - np.exp(log_softmaxes) * grad.sum(-1, keepdims=True)
    else:
        grad = grad * np.exp(log_sigmoids - logits)  # sigmoid(-x)
    grad = grad + c_z * 2 * log_z[:, None] * np.exp(log_softmaxes)
    return weights, ids, probs, stats, balance, grad


@pytest.mark.parametrize("balance", ["none", "bias"])
@pytest.mark.parametrize("top_k", [1, 2, E])
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_extreme_logits(scores, renormalize, top_k, balance):
    moe = MoEConfig(num_experts=E, top_k=top_k, scores=scores, renormalize=renormalize, balance=balance)
    logits, rng = extreme_logits(), np.random.default_rng(1)
    bias = np.float32([0.0, 0.93, -0.71, 0.37, 0.11, -0.23])
    cotangents = (rng.standard_normal((len(logits), top_k)), rng.standard_normal(logits.shape), 1e-3, 5.0)

    def value(logits):
        weights, ids, probs = route(logits, bias if balance == "bias" else None, moe)
        stats = router_stats(logits, ids, probs)
        loss = load_balance_loss(stats)
        sums = jnp.sum(weights * jnp.float32(cotangents[0])) + jnp.sum(probs * jnp.float32(cotangents[1]))
        return sums + cotangents[2] * stats["z"] + cotangents[3] * loss, (weights, ids, probs, stats, loss)

    grad, (weights, ids, probs, stats, loss) = jax.jit(jax.grad(value, has_aux=True))(logits)
    want_weights, want_ids, want_probs, want_stats, want_loss, want_grad = reference(logits, bias, moe, cotangents)
    np.testing.assert_array_equal(ids, want_ids)
    # A logarithm of up to 87 in size, whose exponential is the least normal float32, is off by 87 * 2^-24 = 5e-6.
    near = {"rtol": 1e-5, "atol": 1.2e-38}
    np.testing.assert_allclose(weights, want_weights, **near)
    np.testing.assert_allclose(probs, want_probs, **near)
    # Sums of up to 70 terms: largest relative error seen 3e-7.
    np.testing.assert_allclose(loss, want_loss, rtol=1e-6)
    for name, want in want_stats.items():
        np.testing.assert_allclose(stats[name], want, rtol=1e-6, err_msg=name)
    # Differences of terms of size 1 (and of z's, up to 20 = 1e-3 * 2 * 1e4): largest error seen 1.9e-7.
    size = np.maximum(1, np.abs(want_grad).max(-1, keepdims=True))
    np.testing.assert_allclose(grad / size, want_grad / size, rtol=0, atol=1e-6)
