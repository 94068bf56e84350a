"""The decoder-only Transformer: embedding, a scan over blocks, head."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from spannorm_jax.config import ExecutionConfig, ModelConfig, moe_layers
from spannorm_jax.model.block import Block
from spannorm_jax.model.kernels.cpu import linear
from spannorm_jax.model.layers import Norms, rotary_angles
from spannorm_jax.model.moe.router import Stats
from spannorm_jax.model.parametrisation import forward
from spannorm_jax.model.placement import PLACEMENTS
from spannorm_jax.model.stack import ACTIVATION, STACKS, Stacks, over_blocks
from spannorm_jax.model.weights import weight
from spannorm_jax.parallel.mesh import constrain


class Decoder(nnx.Module):
    """Tokens -> logits.

    It declares one dense block and one with experts. `ModelDef.bind` fills them with the weights of
    all, stacked on a layer axis.
    """

    def __init__(self, cfg: ModelConfig, execution: ExecutionConfig):
        self.cfg, self.execution = cfg, execution
        V, D = cfg.vocab_size, cfg.width
        # Decay and FLOPs follow the role: a tied embedding is the head's matrix too.
        role = "output" if cfg.tied_head else "embedding"
        # A lookup sums one row, so that 1 / sqrt(fan_in) lets the stream start at unit variance. A tied embedding is
        # the head's matrix, and its rows enter times sqrt(D) to the same end (Vaswani et al. 2017, section 3.4).
        fans = {"fan_in": D, "fan_out": V} if cfg.tied_head else {"fan_in": 1, "fan_out": D}
        self.embed = weight((V, D), ("vocab", "embed"), role, "embed", **fans)

        kinds = moe_layers(cfg)
        for moe, name in STACKS.items():
            if moe in kinds:
                setattr(self, name, Block(cfg, execution, moe))
        self.ends = Norms(cfg, PLACEMENTS[cfg.placement].end_norms)
        if not cfg.tied_head:
            self.head = weight((D, V), ("embed", "vocab"), "output", "head", fan_in=D, fan_out=V)

    @property
    def stacks(self) -> Stacks:
        return {moe: getattr(self, name) for moe, name in STACKS.items() if hasattr(self, name)}

    def embeddings(self, tokens_BxT: Array) -> Array:
        """What enters the placement's stream: (B, T, D) in the compute dtype."""
        cfg = self.cfg
        with jax.named_scope("embed"):
            # Gathered over `embed` first, as every weight is where it is used: the partitioner cannot look rows up in
            # a table that is split along the rows' width without replicating the result.
            table = constrain(self.embed[...].astype(cfg.dtype), ("vocab", "activation"))
            x = table[tokens_BxT]
            if cfg.tied_head:
                x = x * jnp.asarray(cfg.width**0.5 * forward(cfg).embedding, x.dtype)
            return constrain(x, ACTIVATION)

    def features(self, tokens_BxT: Array) -> Array:
        """What the head reads: (B, T, D) in the compute dtype."""
        return self.features_and_router(tokens_BxT)[0]

    def features_and_router(self, tokens_BxT: Array) -> tuple[Array, Stats | None]:
        """`features`, and the router's sums of each block with experts, stacked; None without any."""
        cfg, placement = self.cfg, PLACEMENTS[self.cfg.placement]
        angles = rotary_angles(tokens_BxT.shape[1], cfg.width // cfg.num_heads, cfg.rope_theta)

        def step(block: Block, stream: Any, layer: Array, _: None) -> tuple[Any, None, Stats | None]:
            stream, stats = block(stream, layer, lambda x_BxTxD: block.attn(x_BxTxD, angles), block.feed_forward)
            return stream, None, stats

        stream = placement.enter(self.embeddings(tokens_BxT), self.ends)
        stream, _, stats = over_blocks(self.stacks, cfg, self.execution, step, stream, None)
        return placement.leave(stream, self.ends), stats

    def head_matrix(self) -> Array:
        """(D, V) in float32."""
        return self.embed[...].T if self.cfg.tied_head else self.head[...]

    def logits(self, features: Array) -> Array:
        """(..., D) -> (..., V) in float32, whatever the compute dtype."""
        with jax.named_scope("head"):
            matrix, multiplier = self.head_matrix().astype(features.dtype), forward(self.cfg).logits
            features = features if multiplier == 1 else features * multiplier
            if features.dtype == jnp.float32:
                return linear(features, matrix)
            return jnp.matmul(features, matrix, preferred_element_type=jnp.float32)

    def __call__(self, tokens_BxT: Array) -> Array:
        """Logits (B, T, V) in float32; position t sees tokens 0..t."""
        return self.logits(self.features(tokens_BxT))
