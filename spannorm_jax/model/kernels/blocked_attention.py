"""Attention in blocks of queries, in plain JAX, which a CPU runs best.

Without a mask each block of queries meets all keys. With a causal mask it meets the keys up to the end of its span, so
that half of the square is never computed. There are eight spans at most, and a loop over the blocks of each. A block's
size is fixed, so memory is linear in time. As in FlashAttention (Dao et al. 2022, arXiv 2205.14135, algorithm 4),
backward makes the weights again from the log-sum-exp of each query's logits. Arrays are (B, G, R, T, K) inside: R = H/G
query heads share a key-value head, and a block's rows are the positions of all R. Logits of backward are transposed,
(keys, queries), because two of its three large matmuls then read them as they lie.

docs/speed.md says what it gains.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

SAVED = "attention"  # what remat must keep of the forward pass, so as not to repeat it: output and log-sum-exp
_ROWS, _MAX_SPANS = 64, 8  # query positions a block, at least; loops over blocks, each with the keys up to its end


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def blocked_attention(q_BxTxHxK: Array, k_BxTxGxK: Array, v_BxTxGxK: Array, causal: bool = True) -> Array:
    """(B, T, H, K) in q's dtype; softmax in float32. H query heads share G key-value heads."""
    return _forward(q_BxTxHxK, k_BxTxGxK, v_BxTxGxK, causal)[0]


def _spans(T: int) -> tuple[int, list[tuple[int, int]]]:
    """Rows of a block, and spans of whole blocks; the last span may reach beyond T."""
    blocks = max(T // _ROWS, 1)
    rows = -(-T // blocks)
    size = rows * -(-blocks // _MAX_SPANS)
    return rows, [(start, min(start + size, rows * blocks)) for start in range(0, T, size)]


def _by_head(x_BxTxHxK: Array, groups: int, length: int) -> Array:
    """(B, G, R, length, K), with zeros after the last position."""
    B, T, H, K = x_BxTxHxK.shape
    x = jnp.pad(x_BxTxHxK, ((0, 0), (0, length - T), (0, 0), (0, 0)))
    return x.reshape(B, length, groups, H // groups, K).transpose(0, 2, 3, 1, 4)


def _by_time(x_BxGxRxTxK: Array, T: int) -> Array:
    B, G, R, length, K = x_BxGxRxTxK.shape
    return x_BxGxRxTxK.transpose(0, 3, 1, 2, 4).reshape(B, length, G * R, K)[:, :T]


def _dot(a: Array, b: Array, over: tuple[int, int]) -> Array:
    """a times b for each B and G, summed over these axes: a's other axis, then b's, which an einsum may turn round."""
    dimensions = (((over[0],), (over[1],)), ((0, 1), (0, 1)))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _for_blocks(
    step: Callable[..., tuple[Any, Any]], carry: Any, rows: int, span: tuple[int, int], *arrays: Array
) -> tuple[Any, Any]:
    """`step(carry, positions, *blocks)` for each block of the span in turn; what it returns beside the carry is joined.

    Arrays are (B, G, R, T, ...); a block is (B, G, R rows, ...), its positions (R rows,).
    """
    start, end = span
    B, G, R = arrays[0].shape[:3]
    count = (end - start) // rows

    def split(x: Array) -> Array:
        x = x[:, :, :, start:end].reshape(B, G, R, count, rows, *x.shape[4:])
        return jnp.moveaxis(x, 3, 0).reshape(count, B, G, R * rows, *x.shape[5:])

    def join(x: Array) -> Array:
        x = jnp.moveaxis(x.reshape(count, B, G, R, rows, *x.shape[4:]), 0, 3)
        return x.reshape(B, G, R, end - start, *x.shape[5:])

    def body(carry: Any, xs: tuple[Array, ...]) -> tuple[Any, Any]:
        first, *blocks = xs
        return step(carry, first + jnp.tile(jnp.arange(rows), R), *blocks)

    xs = (jnp.arange(start, end, rows), *map(split, arrays))
    carry, found = jax.lax.scan(body, carry, xs, unroll=count == 1)
    return carry, jax.tree.map(join, found)


def _forward(q_BxTxHxK: Array, k_BxTxGxK: Array, v_BxTxGxK: Array, causal: bool) -> tuple[Array, tuple[Array, ...]]:
    _, T, _, K = q_BxTxHxK.shape
    G = k_BxTxGxK.shape[2]
    rows, spans = _spans(T)
    q = _by_head(q_BxTxHxK * K**-0.5, G, spans[-1][1])
    k, v = k_BxTxGxK.swapaxes(1, 2), v_BxTxGxK.swapaxes(1, 2)

    def attend(keys: Array, values: Array, _: None, positions: Array, queries: Array) -> tuple[None, Any]:
        logits = _dot(queries, keys, over=(3, 3))
        if causal:
            logits = jnp.where(positions[:, None] >= jnp.arange(values.shape[2]), logits, -jnp.inf)
        largest = jnp.max(logits, axis=-1, keepdims=True)
        weights = jnp.exp(logits - largest)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        out = _dot(weights.astype(values.dtype), values, over=(3, 2)) / total
        return None, (out.astype(values.dtype), (largest + jnp.log(total))[..., 0])

    found = []
    for span in spans:
        seen = span[1] if causal else T
        step = partial(attend, k[:, :, :seen], v[:, :, :seen])
        found.append(_for_blocks(step, None, rows, span, q)[1])
    out, log_sum = (jnp.concatenate(parts, axis=3) for parts in zip(*found, strict=True))
    out_BxTxHxK = checkpoint_name(_by_time(out, T), SAVED)
    log_sum = checkpoint_name(log_sum, SAVED)
    return out_BxTxHxK, (q_BxTxHxK, k_BxTxGxK, v_BxTxGxK, out_BxTxHxK, log_sum)


def _backward(causal: bool, residuals: tuple[Array, ...], g_BxTxHxK: Array) -> tuple[Array, Array, Array]:
    q_BxTxHxK, k_BxTxGxK, v_BxTxGxK, out_BxTxHxK, log_sum = residuals
    _, T, _, K = q_BxTxHxK.shape
    G = k_BxTxGxK.shape[2]
    rows, spans = _spans(T)
    length = spans[-1][1]
    q, g = _by_head(q_BxTxHxK * K**-0.5, G, length), _by_head(g_BxTxHxK, G, length)
    k, v = k_BxTxGxK.swapaxes(1, 2), v_BxTxGxK.swapaxes(1, 2)
    # The gradient through the softmax's denominator: one number a query.
    shared_BxTxH = jnp.sum(g_BxTxHxK.astype(jnp.float32) * out_BxTxHxK.astype(jnp.float32), axis=-1)
    shared = _by_head(shared_BxTxH[..., None], G, length)[..., 0]

    def attend(
        keys: Array, values: Array, dkv: tuple[Array, Array], positions: Array, *of_queries: Array
    ) -> tuple[tuple[Array, Array], Array]:
        dk, dv = dkv
        queries, gs, log_sum, shared = of_queries
        end = keys.shape[2]
        logits = _dot(keys, queries, over=(3, 3))
        weights = jnp.exp(logits - log_sum[:, :, None])
        if causal:
            weights = jnp.where(jnp.arange(end)[:, None] <= positions, weights, 0)
        dweights = _dot(values, gs, over=(3, 3))
        dlogits = (weights * (dweights - shared[:, :, None])).astype(keys.dtype)
        dv = dv.at[:, :, :end].add(_dot(weights.astype(values.dtype), gs, over=(3, 2)))
        dk = dk.at[:, :, :end].add(_dot(dlogits, queries, over=(3, 2)))
        dq = _dot(keys, dlogits, over=(2, 2)).swapaxes(2, 3)
        return (dk, dv), dq

    dkv = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    found = []
    for span in spans:
        seen = span[1] if causal else T
        step = partial(attend, k[:, :, :seen], v[:, :, :seen])
        dkv, dq = _for_blocks(step, dkv, rows, span, q, g, log_sum, shared)
        found.append(dq)
    dk, dv = dkv
    return (
        _by_time(jnp.concatenate(found, axis=3) * K**-0.5, T).astype(q.dtype),
        dk.swapaxes(1, 2).astype(k.dtype),
        dv.swapaxes(1, 2).astype(v.dtype),
    )


blocked_attention.defvjp(_forward, _backward)
