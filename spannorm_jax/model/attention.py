"""Causal attention behind one function, whatever implementation the device runs best."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array


def _xla(q_BxTxHxK: Array, k_BxTxGxK: Array, v_BxTxGxK: Array) -> Array:
    return jax.nn.dot_product_attention(q_BxTxHxK, k_BxTxGxK, v_BxTxGxK, is_causal=True, implementation="xla")


IMPLEMENTATIONS: dict[str, Callable[[Array, Array, Array], Array]] = {"xla": _xla}
CHOICES = ("auto", *IMPLEMENTATIONS)


def chosen(name: str) -> str:
    """The implementation that runs for a config's `model.attention`: `auto` is XLA's on every device so far."""
    return "xla" if name == "auto" else name


def attention(q_BxTxHxK: Array, k_BxTxGxK: Array, v_BxTxGxK: Array, implementation: str) -> Array:
    """Causal softmax attention with logits q.k / sqrt(K), softmax in float32.

    H query heads share G key-value heads (G divides H). Returns (B, T, H, K) in q's dtype.
    """
    with jax.named_scope("dot_product_attention"):
        return IMPLEMENTATIONS[chosen(implementation)](q_BxTxHxK, k_BxTxGxK, v_BxTxGxK)


def cached_attention(q_BxTxHxK: Array, k_BxSxGxK: Array, v_BxSxGxK: Array, positions_BxT: Array) -> Array:
    """Softmax attention over a cache: the query at position p sees the cache's slots 0..p, as `attention` does.

    Slots beyond p may hold anything finite. Returns (B, T, H, K) in q's dtype.
    """
    with jax.named_scope("dot_product_attention"):
        seen_BxTxS = jnp.arange(k_BxSxGxK.shape[1]) <= positions_BxT[..., None]
        return jax.nn.dot_product_attention(
            q_BxTxHxK, k_BxSxGxK, v_BxSxGxK, mask=seen_BxTxS[:, None], implementation="xla"
        )
