"""Attention: one function picks the implementation that the device runs best."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from spannorm_jax.config import ExecutionConfig, ModelConfig
from spannorm_jax.errors import UserError
from spannorm_jax.model.kernels.blocked_attention import SAVED, blocked_attention
from spannorm_jax.model.kernels.probe import compile_problem
from spannorm_jax.parallel.mesh import partition_spec, target_platform

_SPLASH_MAX_KEYS = 1024  # of a block whose logits fit in a core's memory
_SPLASH_MULTIPLE = 128  # positions; others are filled up
_CUDNN_FORWARD = "dot_product_attention_fwd_wrapper"  # JAX's primitive


def _xla(q_BxTxHxK: Array, k_BxTxGxK: Array, v_BxTxGxK: Array, causal: bool) -> Array:
    out = jax.nn.dot_product_attention(q_BxTxHxK, k_BxTxGxK, v_BxTxGxK, is_causal=causal, implementation="xla")
    return checkpoint_name(out, SAVED)


def _cudnn(q_BxTxHxK: Array, k_BxTxGxK: Array, v_BxTxGxK: Array, causal: bool) -> Array:
    return jax.nn.dot_product_attention(q_BxTxHxK, k_BxTxGxK, v_BxTxGxK, is_causal=causal, implementation="cudnn")


def _splash(q_BxTxHxK: Array, k_BxTxGxK: Array, v_BxTxGxK: Array, causal: bool) -> Array:
    """JAX's TPU kernel, one call a device: the compiler cannot partition it. Elsewhere it is interpreted, slowly."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    length, K = q_BxTxHxK.shape[1], q_BxTxHxK.shape[3]
    T = -(-length // _SPLASH_MULTIPLE) * _SPLASH_MULTIPLE
    block = next(size for size in (512, 256, 128) if T % size == 0)
    # One kernel for all gradients leaves a part of the queries' for each block of keys: it pays where that is one.
    fused = T <= _SPLASH_MAX_KEYS
    dkv, dq = (T, None) if fused else (block, block)
    sizes = splash.BlockSizes(
        block_q=block, block_kv=block, block_q_dkv=dkv, block_kv_dkv=dkv, block_q_dq=dq, block_kv_dq=dq,
        use_fused_bwd_kernel=fused,
    )  # fmt: skip
    # A causal mask hides the positions that fill up T from all others. Without one they are another segment.
    mask = splash.CausalMask((T, T)) if causal else splash.FullMask((T, T))
    segments_T = None if causal or length == T else (jnp.arange(T) >= length).astype(jnp.int32)

    def attention_on_one_device(q_BxTxHxK: Array, k_BxTxGxK: Array, v_BxTxGxK: Array) -> Array:
        kernel = splash.make_splash_mha(
            splash.MultiHeadMask([mask] * q_BxTxHxK.shape[2]),
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=1,
            residual_checkpoint_name=SAVED,
            interpret=target_platform() != "tpu",
        )
        filled = (jnp.pad(x, ((0, 0), (0, T - length), (0, 0), (0, 0))) for x in (q_BxTxHxK, k_BxTxGxK, v_BxTxGxK))
        q, k, v = (x.swapaxes(1, 2) for x in filled)
        segments = None if segments_T is None else splash.SegmentIds(segments_T, segments_T)
        out = jax.vmap(lambda q, k, v: kernel(q, k, v, segments))(q * K**-0.5, k, v)
        return out.swapaxes(1, 2)[:, :length]

    if not jax.sharding.get_abstract_mesh().empty:
        q_spec, kv_spec = (partition_spec(("batch", "time", heads, "head_dim")) for heads in ("heads", "kv_heads"))
        attention_on_one_device = jax.shard_map(
            attention_on_one_device, in_specs=(q_spec, kv_spec, kv_spec), out_specs=q_spec, check_vma=False
        )
    return attention_on_one_device(q_BxTxHxK, k_BxTxGxK, v_BxTxGxK)


IMPLEMENTATIONS: dict[str, Callable[[Array, Array, Array, bool], Array]] = {
    "xla": _xla,
    "blocked": blocked_attention,
    "cudnn": _cudnn,
    "splash": _splash,
}
_BEST = {"cpu": "blocked", "gpu": "cudnn", "tpu": "splash"}


def attention_for(execution: ExecutionConfig, cfg: ModelConfig, seq_len: int) -> tuple[str, str]:
    """The implementation that runs here, and why it is not the device's best, if `execution.attention=auto` had to.

    `auto` is blocked on a CPU, cuDNN's on a GPU, splash attention on a TPU, and XLA's where that one cannot run.

    Raises:
      UserError: the one that is asked for by name cannot run here.
    """
    shapes = (seq_len, cfg.num_heads, cfg.num_kv_heads, cfg.width // cfg.num_heads)
    name, why = _choose(execution.attention, *shapes, cfg.dtype)
    if why and execution.attention != "auto":
        raise UserError(f"config key execution.attention={name} cannot run here: {why}; write execution.attention=auto")
    return name, why


def _choose(name: str, T: int, H: int, G: int, K: int, dtype: str) -> tuple[str, str]:
    platform = target_platform()
    best = _BEST[platform] if name == "auto" else name
    why = ""
    if best == "cudnn":
        why = _cudnn_problem(T, H, G, K, dtype, platform)
    elif best == "splash":
        why = "it is a TPU's kernel" if platform == "gpu" else ""
    return ("xla" if why and name == "auto" else best), why


@cache
def _cudnn_problem(T: int, H: int, G: int, K: int, dtype: str, platform: str) -> str:
    """Why cuDNN cannot run it, or nothing: found by compiling forward and backward for one row."""
    if platform != "gpu":
        return "there is no GPU"
    if jax.default_backend() != "gpu":  # of a topology no more is known than what JAX refuses while it traces
        return "its backward pass takes an even number of positions" if T % 2 else ""
    q, kv = (jax.ShapeDtypeStruct((1, T, heads, K), dtype) for heads in (H, G))
    return compile_problem(partial(_cudnn, causal=True), q, kv, kv, gradients=3)


def keep_attention(primitive: Any, *_: Any, **params: Any) -> bool:
    """A remat policy: attention's output and log-sum-exp are kept, so that its forward pass runs once.

    cuDNN's is known by its primitive: a name on its output would not keep what its backward pass reads.
    """
    return primitive.name == _CUDNN_FORWARD or (primitive.name == "name" and params["name"] == SAVED)


def attention(q_BxTxHxK: Array, k_BxTxGxK: Array, v_BxTxGxK: Array, implementation: str, causal: bool = True) -> Array:
    """Softmax attention with logits q.k / sqrt(K), softmax in float32; causal, or of every position to all.

    H query heads share G key-value heads (G divides H). Returns (B, T, H, K) in q's dtype.
    """
    _, T, H, K = q_BxTxHxK.shape
    name, _ = _choose(implementation, T, H, k_BxTxGxK.shape[2], K, np.dtype(q_BxTxHxK.dtype).name)
    with jax.named_scope("dot_product_attention"):
        return IMPLEMENTATIONS[name](q_BxTxHxK, k_BxTxGxK, v_BxTxGxK, causal)


def cached_attention(q_BxTxHxK: Array, k_BxSxGxK: Array, v_BxSxGxK: Array, positions_BxT: Array) -> Array:
    """Softmax attention over a cache: the query at position p sees the cache's slots 0..p, as `attention` does.

    Slots beyond p may hold anything finite. Returns (B, T, H, K) in q's dtype.
    """
    with jax.named_scope("dot_product_attention"):
        seen_BxTxS = jnp.arange(k_BxSxGxK.shape[1]) <= positions_BxT[..., None]
        return jax.nn.dot_product_attention(
            q_BxTxHxK, k_BxSxGxK, v_BxSxGxK, mask=seen_BxTxS[:, None], implementation="xla"
        )
