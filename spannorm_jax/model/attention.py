"""Causal attention behind one function, whatever implementation the device runs best."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

_BLOCK, _MAX_BLOCKS = 64, 8  # query positions a block, as far as the unrolled blocks stay few


def _xla(q_BxTxHxK: Array, k_BxTxGxK: Array, v_BxTxGxK: Array) -> Array:
    return jax.nn.dot_product_attention(q_BxTxHxK, k_BxTxGxK, v_BxTxGxK, is_causal=True, implementation="xla")


def _blocked(q_BxTxHxK: Array, k_BxTxGxK: Array, v_BxTxGxK: Array) -> Array:
    """Blocks of queries, each against the keys up to its end: half of the square is never computed.

    On a CPU, which computes and stores every logit, this is several times as fast as `_xla`.
    """
    B, T, H, K = q_BxTxHxK.shape
    G = k_BxTxGxK.shape[2]
    q = (q_BxTxHxK * K**-0.5).reshape(B, T, G, H // G, K).transpose(0, 2, 3, 1, 4)
    k, v = k_BxTxGxK.swapaxes(1, 2), v_BxTxGxK.swapaxes(1, 2)
    num_blocks = max(n for n in range(1, _MAX_BLOCKS + 1) if T % n == 0 and (n == 1 or T // n >= _BLOCK))
    size = T // num_blocks
    outs = []
    for start in range(0, T, size):
        end = start + size
        logits = jnp.einsum(
            "bgrqk,bgsk->bgrqs", q[:, :, :, start:end], k[:, :, :end], preferred_element_type=jnp.float32
        )
        seen = jnp.arange(start, end)[:, None] >= jnp.arange(end)
        logits = jnp.where(seen, logits, -jnp.inf)
        # The maximum cancels in the softmax: no gradient flows through it.
        weights = jnp.exp(logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True)))
        total = jnp.sum(weights, axis=-1, keepdims=True)
        out = jnp.einsum(
            "bgrqs,bgsk->bgrqk", weights.astype(v.dtype), v[:, :, :end], preferred_element_type=jnp.float32
        )
        outs.append((out / total).astype(v.dtype))
    return jnp.concatenate(outs, axis=3).transpose(0, 3, 1, 2, 4).reshape(B, T, H, K)


IMPLEMENTATIONS: dict[str, Callable[[Array, Array, Array], Array]] = {"xla": _xla, "blocked": _blocked}
CHOICES = ("auto", *IMPLEMENTATIONS)


def chosen(name: str) -> str:
    """The implementation that runs here for a config's `model.attention`; `auto` is blocked on a CPU, else XLA's."""
    if name != "auto":
        return name
    return "blocked" if jax.default_backend() == "cpu" else "xla"


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
