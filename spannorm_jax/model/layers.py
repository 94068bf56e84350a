"""Norms, attention and feed-forward as modules that own their weights. No layer has a bias.

Shapes stand in names: B batch, T time, D width, H query heads, G key-value heads, K head size, F hidden units.
Weights are float32 and are cast to the compute dtype where they are used; norms compute in float32.
"""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from spannorm_jax.config import ModelConfig
from spannorm_jax.model.kernels.attention import attention
from spannorm_jax.model.kernels.cpu import gelu, linear
from spannorm_jax.model.placement import PLACEMENTS
from spannorm_jax.model.weights import gain, weight


class Norm(nnx.Module):
    """RMSNorm (Zhang & Sennrich 2019) or LayerNorm without bias, over the last axis, in float32."""

    def __init__(self, kind: str, size: int, eps: float, site: str, axis: str = "embed", start: float = 1.0):
        self.kind, self.eps, self.site = kind, eps, site  # the site tells norms apart in a profile
        self.gain = gain(size, axis, site, start)

    def __call__(self, x: Array) -> Array:
        with jax.named_scope("norm"), jax.named_scope(self.site):
            y = x.astype(jnp.float32)
            if self.kind == "layernorm":
                y = y - jnp.mean(y, axis=-1, keepdims=True)
            y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
            return (y * self.gain[...]).astype(x.dtype)


class Gain(nnx.Module):
    """A gain without a norm, over the last axis, in the input's dtype."""

    def __init__(self, size: int, site: str, start: float):
        self.site = site
        self.gain = gain(size, "embed", site, start)

    def __call__(self, x: Array) -> Array:
        with jax.named_scope("gain"), jax.named_scope(self.site):
            return x * self.gain[...].astype(x.dtype)


class Norms(nnx.Module):
    """The norms of a block, or of the model's ends, and gains without a norm, named by the placement.

    `starts` says where gains start: those of norms at 1 unless they are in it.
    """

    def __init__(
        self, cfg: ModelConfig, names: Iterable[str], gains: Iterable[str] = (), starts: dict[str, float] | None = None
    ):
        starts = starts or {}
        for name in names:
            setattr(self, name, Norm(cfg.norm, cfg.width, cfg.norm_eps, name, start=starts.get(name, 1.0)))
        for name in gains:
            setattr(self, name, Gain(cfg.width, name, starts[name]))


def rotary_angles(length: int, head_dim: int, theta: float) -> Array:
    """(T, K/2) float32 angles: position times theta^(-2i/K) (Su et al. 2021, arXiv 2104.09864, eq. 15)."""
    with jax.named_scope("rope"):
        frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
        return jnp.arange(length, dtype=jnp.float32)[:, None] * frequencies


def rotate(x_BxTxHxK: Array, angles_TxK2: Array) -> Array:
    """Turns the pairs (i, i + K/2) of each head by the angles, in float32; the angles may differ by row (B, T, K/2)."""
    cos, sin = jnp.cos(angles_TxK2)[..., None, :], jnp.sin(angles_TxK2)[..., None, :]
    a, b = jnp.split(x_BxTxHxK.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x_BxTxHxK.dtype)


def inner_norms(cfg: ModelConfig) -> tuple[str, ...]:
    """Which of `q`, `k`, `v` have a norm: those of the placement, and queries and keys with `qk_norm`."""
    wanted = {*PLACEMENTS[cfg.placement].inner_norms, *("qk" if cfg.qk_norm else "")}
    return tuple(name for name in "qkv" if name in wanted)


class Attention(nnx.Module):
    """Causal self-attention: RoPE, grouped queries, optional norms of queries, keys and values (Henry et al. 2020)."""

    def __init__(self, cfg: ModelConfig, stds: dict[str, float], rngs: nnx.Rngs):
        D, H, G = cfg.width, cfg.num_heads, cfg.num_kv_heads
        K = D // H
        self.implementation = cfg.attention
        self.q = weight(rngs, stds["q"], (D, H, K), ("embed", "heads", "head_dim"), "hidden", "q")
        self.k = weight(rngs, stds["k"], (D, G, K), ("embed", "kv_heads", "head_dim"), "hidden", "k")
        self.v = weight(rngs, stds["v"], (D, G, K), ("embed", "kv_heads", "head_dim"), "hidden", "v")
        self.out = weight(rngs, stds["attn_out"], (H, K, D), ("heads", "head_dim", "embed"), "hidden", "attn_out")
        # Heads share one gain: RMSNorm whatever `norm` is, since a mean over a head has no meaning here.
        self.inner_norms = inner_norms(cfg)
        for name in self.inner_norms:
            setattr(self, f"{name}_norm", Norm("rmsnorm", K, cfg.norm_eps, f"{name}_norm", axis="head_dim"))

    def __call__(self, x_BxTxD: Array, angles_TxK2: Array) -> Array:
        with jax.named_scope("attention"):
            q, k, v = self.qkv(x_BxTxD, angles_TxK2)
            return self.project(attention(q, k, v, self.implementation))

    def qkv(self, x_BxTxD: Array, angles: Array) -> tuple[Array, Array, Array]:
        """Queries (B, T, H, K), keys and values (B, T, G, K), turned by the angles (T, K/2) or (B, T, K/2)."""
        dtype = x_BxTxD.dtype
        with jax.named_scope("qkv"):
            heads = {name: linear(x_BxTxD, getattr(self, name)[...].astype(dtype)) for name in "qkv"}
        for name in self.inner_norms:
            heads[name] = getattr(self, f"{name}_norm")(heads[name])
        q, k, v = heads.values()
        with jax.named_scope("rope"):
            return rotate(q, angles), rotate(k, angles), v

    def project(self, heads_BxTxHxK: Array) -> Array:
        with jax.named_scope("out"):
            H, K, D = self.out.shape
            w = self.out[...].astype(heads_BxTxHxK.dtype).reshape(H * K, D)
            return linear(heads_BxTxHxK.reshape(*heads_BxTxHxK.shape[:2], H * K), w)


def activation(hidden_xPxF: Array, kind: str) -> Array:
    """(..., P, F) -> (..., F): silu(a) b of the two parts of SwiGLU, gelu(a) of the one of GELU."""
    if kind == "swiglu":
        return jax.nn.silu(hidden_xPxF[..., 0, :]) * hidden_xPxF[..., 1, :]
    return gelu(hidden_xPxF[..., 0, :])


class FeedForward(nnx.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202): out(silu(a) * b), or GELU: out(gelu(a)). `hidden` units: ffn_dim."""

    def __init__(self, cfg: ModelConfig, stds: dict[str, float], rngs: nnx.Rngs, hidden: int = 0):
        D, F = cfg.width, hidden or cfg.ffn_dim
        self.kind = cfg.ffn
        parts = 2 if cfg.ffn == "swiglu" else 1  # a and b of SwiGLU come from one matmul
        self.in_ = weight(rngs, stds["ffn_in"], (D, parts, F), ("embed", "parts", "ffn"), "hidden", "ffn_in")
        self.out = weight(rngs, stds["ffn_out"], (F, D), ("ffn", "embed"), "hidden", "ffn_out")

    def __call__(self, x_BxTxD: Array) -> Array:
        with jax.named_scope("ffn"):
            dtype = x_BxTxD.dtype
            h_BxTxF = activation(linear(x_BxTxD, self.in_[...].astype(dtype)), self.kind)
            return linear(h_BxTxF, self.out[...].astype(dtype))
