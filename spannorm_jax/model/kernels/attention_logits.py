"""Measures attention's logits in pieces, never all at once."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

_QUERIES = 128  # at once


def over_logits(fn: Callable[[Array, Array], Any], q_BxTxHxK: Array, k_BxTxGxK: Array, causal: bool) -> Any:
    """fn(logits_BxHxCxT, visible_CxT) of the logits q.k / sqrt(K) in float32, a piece of C queries at a time.

    Returns what it returns, (B, H, C, ...) leaves joined to (B, H, T, ...). If `causal`, a query
    sees keys up to its own position; other logits are there, and are not `visible`. Memory O(B H C T).
    """
    B, T, H, K = q_BxTxHxK.shape
    G = k_BxTxGxK.shape[2]
    size = min(_QUERIES, T)
    count = -(-T // size)
    padded = jnp.pad(q_BxTxHxK, ((0, 0), (0, count * size - T), (0, 0), (0, 0)))
    pieces = padded.reshape(B, count, size, G, H // G, K).swapaxes(0, 1)

    def piece(args: tuple[Array, Array]) -> Any:
        q_BxCxGxRxK, first = args
        logits = jnp.einsum("bcgrk,btgk->bgrct", q_BxCxGxRxK, k_BxTxGxK, preferred_element_type=jnp.float32)
        visible = jnp.arange(T) <= first + jnp.arange(size)[:, None] if causal else jnp.ones((size, T), bool)
        return fn(logits.reshape(B, H, size, T) * K**-0.5, visible)

    def joined(x: Array) -> Array:  # (pieces, B, H, C, ...) -> (B, H, T, ...)
        x = jnp.moveaxis(x, 0, 2)
        return x.reshape(B, H, count * size, *x.shape[4:])[:, :, :T]

    return jax.tree.map(joined, jax.lax.map(piece, (pieces, jnp.arange(count) * size)))


def largest_logit(q_BxTxHxK: Array, k_BxTxGxK: Array, causal: bool = True) -> Array:
    """The largest logit that takes part in attention."""

    def of_query(logits: Array, visible: Array) -> Array:
        return jnp.max(jnp.where(visible, logits, -jnp.inf), axis=-1)

    return jnp.max(over_logits(of_query, q_BxTxHxK, k_BxTxGxK, causal))


def entropies(q_BxTxHxK: Array, k_BxTxGxK: Array, causal: bool = True) -> Array:
    """(B, H, T): the entropy of each query's attention weights, in nats."""

    def of_query(logits: Array, visible: Array) -> Array:
        log_weights = jax.nn.log_softmax(jnp.where(visible, logits, -jnp.inf), axis=-1)
        return -jnp.sum(jnp.where(visible, jnp.exp(log_weights) * log_weights, 0.0), axis=-1)

    return over_logits(of_query, q_BxTxHxK, k_BxTxGxK, causal)
