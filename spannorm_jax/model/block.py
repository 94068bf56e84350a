"""One Transformer block: two sub-layers, and the norms where the placement puts them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from spannorm_jax.config import ExecutionConfig, ModelConfig
from spannorm_jax.model.branches import multiplied_branches
from spannorm_jax.model.initialisation import branch_multipliers
from spannorm_jax.model.layers import Attention, FeedForward, Norms
from spannorm_jax.model.moe.layer import MoE
from spannorm_jax.model.moe.router import Stats
from spannorm_jax.model.placement import placement_of
from spannorm_jax.model.weights import ModelState


class Block(nnx.Module):
    """A block whose weights are declared, not drawn: `definition.make_block` draws those of one, `whole` runs it."""

    def __init__(self, cfg: ModelConfig, execution: ExecutionConfig, moe: bool = False, causal: bool = True):
        self.cfg = cfg
        self.attn = Attention(cfg, execution, causal)
        self.ffn = MoE(cfg, execution) if moe else FeedForward(cfg)
        placement = placement_of(cfg)
        self.norms = Norms(cfg, placement.block_norms, placement.block_gains)
        if cfg.branch_warmup_steps:
            self.warmup_factor = ModelState(jnp.zeros(()))

    def feed_forward(self, x_BxTxD: Array) -> tuple[Array, Stats | None]:
        """The block's own feed-forward branch, and what its router did if it has experts."""
        if isinstance(self.ffn, MoE):
            return self.ffn(x_BxTxD)
        return self.ffn(x_BxTxD), None

    def __call__(
        self,
        stream: Any,
        layer: Any,
        attn: Callable[[Array], Array],
        ffn: Callable[[Array], tuple[Array, Stats | None]],
    ) -> tuple[Any, Stats | None]:
        """The stream after the block, and what its router did.

        `attn` and `ffn` are this block's own sub-layers (`self.attn` with its angles,
        `self.feed_forward`), or something around them.
        """
        stats = None

        def branch(x_BxTxD: Array) -> Array:
            nonlocal stats
            out, stats = ffn(x_BxTxD)
            return out

        with jax.named_scope("block"):
            warmup = self.warmup_factor[...] if self.cfg.branch_warmup_steps else 1.0
            own = multiplied_branches(self.cfg, branch_multipliers(self.cfg), warmup, attn, branch, self.norms)
            return placement_of(self.cfg).block(stream, *own, layer, self.cfg), stats

    def whole(self, stream: Any, layer: Any, angles: Array | None, _: None = None) -> tuple[Any, None, Stats | None]:
        """The block itself, as a step of `Trunk.run_from`: the stream after it, nothing, what its router did."""
        stream, stats = self(stream, layer, lambda x_BxTxD: self.attn(x_BxTxD, angles), self.feed_forward)
        return stream, None, stats
