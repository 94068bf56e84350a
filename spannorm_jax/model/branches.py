"""What multiplies a block's branches on their way to the stream: constants of the model, and a warm-up in training."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from spannorm_jax.config import ModelConfig
from spannorm_jax.model.parametrisation import forward
from spannorm_jax.model.placement import placement_of


def warmup_factor(cfg: ModelConfig, update: ArrayLike, layer: ArrayLike) -> Array:
    """min(1, t / (T l)), of update t, from 1, and block l = layer + 1: shallow blocks come in first.

    T is `branch_warmup_steps`. Source: ProRes (arXiv 2603.05369), its linear schedule.
    """
    return jnp.minimum(1.0, update / (cfg.branch_warmup_steps * (jnp.asarray(layer) + 1.0)))


def multiplied_branches(
    cfg: ModelConfig, factors: dict[str, float], warmup: Any, attn: Any, ffn: Any, norms: Any
) -> tuple[Any, Any, Any]:
    """A block's sub-layers and norms, with what multiplies them.

    `factors` are constants of the initialisation, by branch (`attn`, `ffn`). Each branch that is
    added to the stream is also multiplied by `Forward.branch` and by `warmup`, which is 1.0 or the
    block's `warmup_factor`. `Placement.additions` says which branches are added. SpanNorm's
    attention is not: it reaches the stream through the feed-forward alone. A branch that ends in a
    norm is multiplied after the norm.
    """
    placement, constant = placement_of(cfg), forward(cfg).branch

    def added(layer: Callable[[Any], Any]) -> Callable[[Any], Any]:
        return _times(_times(layer, constant), warmup)

    branches = {name: _times(layer, factors.get(name, 1.0)) for name, layer in (("attn", attn), ("ffn", ffn))}
    own_norms = {name: getattr(norms, name) for name in (*placement.block_norms, *placement.block_gains)}
    for branch, size in placement.additions.items():
        if size in placement.block_norms:
            own_norms[size] = added(own_norms[size])
        else:
            branches[branch] = added(branches[branch])
    return branches["attn"], branches["ffn"], SimpleNamespace(**own_norms)


def _times(layer: Callable[[Any], Any], factor: Any) -> Callable[[Any], Any]:
    if isinstance(factor, float):
        return layer if factor == 1 else lambda x: layer(x) * factor

    def multiplied(x: Any) -> Any:
        out = layer(x)
        return out * factor.astype(out.dtype)  # a float32 factor would turn a bfloat16 stream into float32

    return multiplied
