"""One Transformer block: two sub-layers, and the norms where the placement puts them."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax import Array

from spannorm_jax.config import ModelConfig
from spannorm_jax.model.initialisation import gain_starts
from spannorm_jax.model.layers import Attention, FeedForward, Norms
from spannorm_jax.model.moe.layer import MoE
from spannorm_jax.model.moe.router import Stats
from spannorm_jax.model.placement import PLACEMENTS


class Block(nnx.Module):
    """One Transformer block: two sub-layers, and the norms where the placement puts them."""

    def __init__(self, cfg: ModelConfig, stds: dict[str, float], rngs: nnx.Rngs, moe: bool = False):
        self.placement, self.depth = cfg.placement, cfg.depth
        self.attn = Attention(cfg, stds, rngs)
        self.ffn = (MoE if moe else FeedForward)(cfg, stds, rngs)
        placement = PLACEMENTS[cfg.placement]
        self.norms = Norms(cfg, placement.block_norms, placement.block_gains, gain_starts(cfg))

    def __call__(self, stream: Any, attn: Callable[[Array], Array], layer: Array) -> tuple[Any, Stats | None]:
        """The stream after the block, and what its router did if it has experts. `attn` wraps this block's own."""
        stats = None

        def ffn(x_BxTxD: Array) -> Array:
            nonlocal stats
            out = self.ffn(x_BxTxD)
            if isinstance(self.ffn, MoE):
                out, stats = out
            return out

        with jax.named_scope("block"):
            block = PLACEMENTS[self.placement].block
            return block(stream, attn, ffn, self.norms, layer, self.depth), stats
