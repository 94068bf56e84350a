"""Norms, attention and feed-forward as modules that own their weights. No layer has a bias.

Shapes stand in names: B batch, T time, D width, H query heads, G key-value heads, K head size, F hidden units.
Weights are float32 and are cast to the compute dtype where they are used; norms compute in float32.
"""

from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from spannorm_jax.config import ExecutionConfig, ModelConfig
from spannorm_jax.model.kernels.attention import attention
from spannorm_jax.model.kernels.cpu import gelu, linear
from spannorm_jax.model.parametrisation import base_config, forward
from spannorm_jax.model.placement import inner_norms, placement_of
from spannorm_jax.model.weights import gain, weight
from spannorm_jax.parallel.mesh import target_platform


def inverse_rms(mean_squares: Array, eps: float) -> Array:
    """1 / sqrt(mean_squares + eps), and 0 for a row of zeros, which stays one and passes no gradient.

    The gradient would be multiplied by eps^(-1/2) in each norm, and overflow within a dozen blocks. It has no bound
    that holds for all placements but this: some multiply their skip by a power of the depth before the norm.
    """
    return jnp.where(mean_squares == 0, 0.0, jax.lax.rsqrt(mean_squares + eps))


class Norm(nnx.Module):
    """RMSNorm (Zhang & Sennrich 2019) or LayerNorm without bias, over the last axis, in float32."""

    def __init__(self, kind: str, size: int, eps: float, site: str, axis: str = "gain"):
        self.kind, self.eps, self.site = kind, eps, site  # the site tells norms apart in a profile
        self.gain = gain((size,), (axis,), site)

    def __call__(self, x: Array) -> Array:
        with jax.named_scope("norm"), jax.named_scope(self.site):
            y = x.astype(jnp.float32)
            if self.kind == "layernorm":
                y = y - jnp.mean(y, axis=-1, keepdims=True)
            y = y * inverse_rms(jnp.mean(jnp.square(y), axis=-1, keepdims=True), self.eps)
            return (y * self.gain[...]).astype(x.dtype)


class Gain(nnx.Module):
    """A gain without a norm, over the last axis, in the input's dtype; of size 1 it is one number for all of it."""

    def __init__(self, size: int, site: str, start: float):
        self.site = site
        self.gain = gain((size,), ("scalar" if size == 1 else "gain",), site, start)

    def __call__(self, x: Array) -> Array:
        with jax.named_scope("gain"), jax.named_scope(self.site):
            return x * self.gain[...].astype(x.dtype)


class Norms(nnx.Module):
    """Norms of a block or of the model's ends, and a block's gains without a norm, named by the placement."""

    def __init__(self, cfg: ModelConfig, names: Iterable[str], gains: Iterable[str] = ()):
        placement = placement_of(cfg)
        for name in names:
            setattr(self, name, Norm(cfg.norm, cfg.width, cfg.norm_eps, name))
        for name in gains:
            size = 1 if name in placement.scalar_gains else cfg.width
            setattr(self, name, Gain(size, name, placement.block_gains[name](base_config(cfg))))


def rotary_angles(length: int, head_dim: int, theta: float) -> Array:
    """(T, K/2) float32 angles: position times theta^(-2i/K) (Su et al. 2021, arXiv 2104.09864, eq. 15)."""
    with jax.named_scope("rope"):
        frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
        return jnp.arange(length, dtype=jnp.float32)[:, None] * frequencies


def rotate(x_BxTxHxK: Array, angles_TxK2: Array) -> Array:
    """Turns the pairs (i, i + K/2) of each head by the angles, in float32; the angles may differ by row (B, T, K/2)."""
    cos, sin = jnp.cos(angles_TxK2)[..., None, :], jnp.sin(angles_TxK2)[..., None, :]
    if target_platform() == "tpu":  # half a head is no whole vector there: its other half comes by a matmul, exactly
        K = x_BxTxHxK.shape[-1]
        swap_KxK = np.roll(np.eye(K), K // 2, axis=1).astype(x_BxTxHxK.dtype)
        turned = jnp.matmul(x_BxTxHxK, swap_KxK, precision=jax.lax.Precision.HIGHEST)  # else float32 is cut to bfloat16
        cos, sin = jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)
        return (x_BxTxHxK.astype(jnp.float32) * cos + turned.astype(jnp.float32) * sin).astype(x_BxTxHxK.dtype)
    a, b = jnp.split(x_BxTxHxK.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x_BxTxHxK.dtype)


class Attention(nnx.Module):
    """Self-attention, causal or not: RoPE where there are angles, grouped queries, the placement's inner norms.

    Those are RMSNorms whatever `norm` is. Queries, keys and values are normed by head, with one
    gain for all heads (Henry et al. 2020); `heads` is a norm over all heads' outputs together,
    before their projection (SubLN, Wang et al. 2022, arXiv 2210.06423).
    """

    def __init__(self, cfg: ModelConfig, execution: ExecutionConfig, causal: bool = True):
        D, H, G = cfg.width, cfg.num_heads, cfg.num_kv_heads
        K = D // H
        self.implementation, self.causal = execution.attention, causal
        self.logit_multiplier = forward(cfg).attention
        by_head, by_kv_head = ("embed", "heads", "head_dim"), ("embed", "kv_heads", "head_dim")
        self.q = weight((D, H, K), by_head, "hidden", "q", fan_in=D, fan_out=H * K)
        self.k = weight((D, G, K), by_kv_head, "hidden", "k", fan_in=D, fan_out=G * K)
        self.v = weight((D, G, K), by_kv_head, "hidden", "v", fan_in=D, fan_out=G * K)
        self.out = weight((H, K, D), ("heads", "head_dim", "embed"), "hidden", "attn_out", fan_in=H * K, fan_out=D)
        norms = inner_norms(cfg)
        self.normed = tuple(name for name in "qkv" if name in norms)
        for name in self.normed:
            setattr(self, f"{name}_norm", Norm("rmsnorm", K, cfg.norm_eps, f"{name}_norm", axis="head_dim"))
        if "heads" in norms:
            self.heads_norm = Norm("rmsnorm", H * K, cfg.norm_eps, "heads_norm", axis="heads")

    def __call__(self, x_BxTxD: Array, angles_TxK2: Array | None) -> Array:
        with jax.named_scope("attention"):
            q, k, v = self.qkv(x_BxTxD, angles_TxK2)
            return self.project(attention(q, k, v, self.implementation, self.causal))

    def qkv(self, x_BxTxD: Array, angles: Array | None) -> tuple[Array, Array, Array]:
        """Queries (B, T, H, K), keys and values (B, T, G, K), turned by the angles (T, K/2) or (B, T, K/2), if any."""
        dtype = x_BxTxD.dtype
        with jax.named_scope("qkv"):
            heads = {name: linear(x_BxTxD, getattr(self, name)[...].astype(dtype)) for name in "qkv"}
        for name in self.normed:
            heads[name] = getattr(self, f"{name}_norm")(heads[name])
        q, k, v = heads.values()
        with jax.named_scope("rope"):
            if angles is not None:
                q, k = rotate(q, angles), rotate(k, angles)
            return q if self.logit_multiplier == 1 else q * self.logit_multiplier, k, v

    def project(self, heads_BxTxHxK: Array) -> Array:
        H, K, D = self.out.shape
        x = heads_BxTxHxK.reshape(*heads_BxTxHxK.shape[:2], H * K)
        if hasattr(self, "heads_norm"):
            x = self.heads_norm(x)
        with jax.named_scope("out"):
            return linear(x, self.out[...].astype(x.dtype).reshape(H * K, D))


def parts(kind: str) -> int:
    """P: the matmul that enters a feed-forward makes a and b of SwiGLU, or a alone of GELU and ReLU."""
    return 2 if kind == "swiglu" else 1


def activation(hidden: Sequence[Array], kind: str) -> Array:
    """P of (..., F) -> (..., F): silu(a) b of the two parts of SwiGLU; gelu(a) or relu(a) of one."""
    if kind == "swiglu":
        return jax.nn.silu(hidden[0]) * hidden[1]
    return (gelu if kind == "gelu" else jax.nn.relu)(hidden[0])


class FeedForward(nnx.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202): out(silu(a) * b); GELU: out(gelu(a)); ReLU: out(relu(a)).

    The inner norm `hidden` is an RMSNorm of what `out` reads. `copies` of `hidden` units each may be
    summed, which a Mixture of Experts calls shared experts; their weights are sites of their own.
    """

    def __init__(self, cfg: ModelConfig, site: str = "ffn", hidden: int = 0, copies: int = 1):
        D, F = cfg.width, hidden or cfg.ffn_dim
        self.kind = cfg.ffn
        P = parts(cfg.ffn)
        # Parts come first: with two in the second last place, a TPU's tiles of (8, 128) would hold 2 of 8 rows.
        axes_in, axes_out = ("parts", "embed", "ffn"), ("ffn", "embed")
        self.in_ = weight((P, D, copies * F), axes_in, "hidden", f"{site}_in", fan_in=D, fan_out=P * F)
        self.out = weight((copies * F, D), axes_out, "hidden", f"{site}_out", fan_in=F, fan_out=D)
        if "hidden" in inner_norms(cfg):
            self.hidden_norm = Norm("rmsnorm", copies * F, cfg.norm_eps, f"{site}_hidden_norm", axis="ffn")

    def __call__(self, x_BxTxD: Array) -> Array:
        with jax.named_scope("ffn"):
            return linear(self.hidden(x_BxTxD), self.out[...].astype(x_BxTxD.dtype))

    def hidden(self, x_BxTxD: Array) -> Array:
        """What `out` reads, (B, T, copies F)."""
        in_PxDxF = self.in_[...].astype(x_BxTxD.dtype)
        h_BxTxF = activation([linear(x_BxTxD, in_DxF) for in_DxF in in_PxDxF], self.kind)
        return self.hidden_norm(h_BxTxF) if hasattr(self, "hidden_norm") else h_BxTxF
