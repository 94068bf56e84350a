"""Causal attention in blocks of queries, in plain JAX: what a CPU runs best.

Each block of queries meets the keys up to its own end, so that half of the square is never computed. As in
FlashAttention (Dao et al. 2022, arXiv 2205.14135, algorithm 4), backward makes the weights again from the log-sum-exp
of each query's logits: what is kept is linear in time. Arrays are (B, G, R, T, K) inside: R = H / G query heads share
a key-value head. Logits of backward are transposed, (keys, queries), because two of its three large matmuls then
read them as they lie.

With XLA's attention in its place a step of configs/throughput.py takes 1.17 times as long on two CPU cores (95%: 1.10
to 1.33), by `experiments.benchmarks.kernels` (experiments/results/throughput/cpu-kernels.json).
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

SAVED = "attention"  # what remat must keep of the forward pass, so as not to repeat it: output and log-sum-exp
_BLOCK, _MAX_BLOCKS = 64, 8  # query positions a block, at least, as far as the unrolled blocks stay few


@jax.custom_vjp
def blocked_attention(q_BxTxHxK: Array, k_BxTxGxK: Array, v_BxTxGxK: Array) -> Array:
    """(B, T, H, K) in q's dtype; softmax in float32. H query heads share G key-value heads."""
    return _forward(q_BxTxHxK, k_BxTxGxK, v_BxTxGxK)[0]


def _blocks(T: int) -> Iterator[tuple[int, int]]:
    size = -(-T // min(max(T // _BLOCK, 1), _MAX_BLOCKS))
    return ((start, min(start + size, T)) for start in range(0, T, size))  # the last may be shorter


def _by_head(x_BxTxHxK: Array, groups: int) -> Array:
    B, T, H, K = x_BxTxHxK.shape
    return x_BxTxHxK.reshape(B, T, groups, H // groups, K).transpose(0, 2, 3, 1, 4)


def _by_time(x_BxGxRxTxK: Array) -> Array:
    B, G, R, T, K = x_BxGxRxTxK.shape
    return x_BxGxRxTxK.transpose(0, 3, 1, 2, 4).reshape(B, T, G * R, K)


def _rows(x_BxGxRxT: Array, start: int, end: int) -> Array:
    """The positions start..end of all query heads of a group, as rows: (B, G, R (end - start), ...)."""
    B, G, R, *_ = x_BxGxRxT.shape
    return x_BxGxRxT[:, :, :, start:end].reshape(B, G, R * (end - start), *x_BxGxRxT.shape[4:])


def _dot(a: Array, b: Array, over: tuple[int, int]) -> Array:
    """a times b for each B and G, summed over these axes: a's other axis, then b's, which an einsum may turn round."""
    dimensions = (((over[0],), (over[1],)), ((0, 1), (0, 1)))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _forward(q_BxTxHxK: Array, k_BxTxGxK: Array, v_BxTxGxK: Array) -> tuple[Array, tuple[Array, ...]]:
    K, G = q_BxTxHxK.shape[-1], k_BxTxGxK.shape[2]
    q = _by_head(q_BxTxHxK * K**-0.5, G)
    k, v = k_BxTxGxK.swapaxes(1, 2), v_BxTxGxK.swapaxes(1, 2)
    B, _, R, T, _ = q.shape
    outs, log_sums = [], []
    for start, end in _blocks(T):
        logits = _dot(_rows(q, start, end), k[:, :, :end], over=(3, 3))
        seen = jnp.tile(jnp.arange(start, end), R)[:, None] >= jnp.arange(end)
        logits = jnp.where(seen, logits, -jnp.inf)
        largest = jnp.max(logits, axis=-1, keepdims=True)
        weights = jnp.exp(logits - largest)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        out = _dot(weights.astype(v.dtype), v[:, :, :end], over=(3, 2)) / total
        outs.append(out.astype(v.dtype).reshape(B, G, R, end - start, K))
        log_sums.append((largest + jnp.log(total)).reshape(B, G, R, end - start))
    out_BxTxHxK = checkpoint_name(_by_time(jnp.concatenate(outs, axis=3)), SAVED)
    log_sum = checkpoint_name(jnp.concatenate(log_sums, axis=3), SAVED)
    return out_BxTxHxK, (q_BxTxHxK, k_BxTxGxK, v_BxTxGxK, out_BxTxHxK, log_sum)


def _backward(residuals: tuple[Array, ...], g_BxTxHxK: Array) -> tuple[Array, Array, Array]:
    q_BxTxHxK, k_BxTxGxK, v_BxTxGxK, out_BxTxHxK, log_sum = residuals
    K, G = q_BxTxHxK.shape[-1], k_BxTxGxK.shape[2]
    q, g = _by_head(q_BxTxHxK * K**-0.5, G), _by_head(g_BxTxHxK, G)
    k, v = k_BxTxGxK.swapaxes(1, 2), v_BxTxGxK.swapaxes(1, 2)
    B, _, R, T, _ = q.shape
    # The gradient through the softmax's denominator: one number a query.
    shared_BxTxH = jnp.sum(g_BxTxHxK.astype(jnp.float32) * out_BxTxHxK.astype(jnp.float32), axis=-1)
    shared = _by_head(shared_BxTxH[..., None], G)[..., 0]
    dq = []
    dk, dv = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for start, end in _blocks(T):
        q_now, g_now = _rows(q, start, end), _rows(g, start, end)
        logits = _dot(k[:, :, :end], q_now, over=(3, 3))
        seen = jnp.arange(end)[:, None] <= jnp.tile(jnp.arange(start, end), R)
        weights = jnp.where(seen, jnp.exp(logits - _rows(log_sum, start, end)[:, :, None]), 0)
        dweights = _dot(v[:, :, :end], g_now, over=(3, 3))
        dlogits = (weights * (dweights - _rows(shared, start, end)[:, :, None])).astype(k.dtype)
        dv = dv.at[:, :, :end].add(_dot(weights.astype(v.dtype), g_now, over=(3, 2)))
        dk = dk.at[:, :, :end].add(_dot(dlogits, q_now, over=(3, 2)))
        dq_now = _dot(k[:, :, :end], dlogits, over=(2, 2)).swapaxes(2, 3)
        dq.append(dq_now.reshape(B, G, R, end - start, K))
    return (
        _by_time(jnp.concatenate(dq, axis=3) * K**-0.5).astype(q.dtype),
        dk.swapaxes(1, 2).astype(k.dtype),
        dv.swapaxes(1, 2).astype(v.dtype),
    )


blocked_attention.defvjp(_forward, _backward)
