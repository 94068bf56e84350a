"""The decoder over a cache of keys and values: new tokens attend to what was computed before.

The cache is a plain pytree, {"k", "v"} of (B, L, S, GK) in the compute dtype; a token's heads lie side by side, which
fills whole vectors. Slot s of a row holds its token at position s, so rows of different lengths share a batch exactly:
prompts are padded on the right, no token sees a later slot, and the tokens that follow a prompt overwrite its padding.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from spannorm_jax.config import ModelConfig
from spannorm_jax.model.block import Block
from spannorm_jax.model.decoder import Decoder
from spannorm_jax.model.kernels.attention import cached_attention
from spannorm_jax.model.moe.router import Stats
from spannorm_jax.parallel.mesh import constrain

Cache = dict[str, Array]
_AXES = ("batch", "layers", "time", "kv_heads")


def empty_cache(cfg: ModelConfig, rows: int, slots: int) -> Cache:
    """Zeros for `rows` sequences of up to `slots` tokens, of a resolved config."""
    shape = (rows, cfg.depth, slots, cfg.num_kv_heads * (cfg.width // cfg.num_heads))
    zeros = constrain(jnp.zeros(shape, cfg.dtype), _AXES)
    return {"k": zeros, "v": zeros}


def cache_bytes(cfg: ModelConfig, rows: int, slots: int) -> int:
    """What `empty_cache` takes, without making it."""
    values = 2 * cfg.depth * rows * slots * cfg.num_kv_heads * (cfg.width // cfg.num_heads)
    return values * jnp.dtype(cfg.dtype).itemsize


def cached_features(decoder: Decoder, tokens_BxT: Array, positions_BxT: Array, cache: Cache) -> tuple[Array, Cache]:
    """The features of tokens at these positions (0..S-1), given the cache of the tokens before them.

    Returns what the head reads, (B, T, D), and the cache with these tokens in it.
    """
    angles_BxTxK2 = decoder.angles(cache["k"].shape[2])[positions_BxT]

    def step(block: Block, stream: Any, layer: Array, angles: Any, cache: Cache) -> tuple[Any, Cache, Stats | None]:
        """The block itself; its attention also writes its keys and values into the cache of all."""

        def attn(x_BxTxD: Array) -> Array:
            nonlocal cache
            with jax.named_scope("attention"):
                q, k, v = block.attn.qkv(x_BxTxD, angles)
                heads = k.shape[2:]
                cache = {name: _write(cache[name], layer, positions_BxT, new) for name, new in (("k", k), ("v", v))}
                here = (jax.lax.dynamic_index_in_dim(cache[name], layer, 1, keepdims=False) for name in ("k", "v"))
                k, v = (x_BxSxGK.reshape(*x_BxSxGK.shape[:2], *heads) for x_BxSxGK in here)
                return block.attn.project(cached_attention(q, k, v, positions_BxT))

        stream, stats = block(stream, layer, attn, block.feed_forward)
        return stream, cache, stats

    passed = decoder.run(tokens_BxT, step, angles=angles_BxTxK2, carried=cache)
    return passed.features, passed.ys


def _write(slots_BxLxSxGK: Array, layer: Array, positions_BxT: Array, new_BxTxGxK: Array) -> Array:
    new_BxTxGK = new_BxTxGxK.reshape(*new_BxTxGxK.shape[:2], -1)
    # vmap keeps the batch a batch: rows stay on the device that holds them.
    written = jax.vmap(lambda slots, positions, new: slots.at[layer, positions].set(new))(
        slots_BxLxSxGK, positions_BxT, new_BxTxGK
    )
    return constrain(written, _AXES)
