"""The decoder-only Transformer: tokens in, logits out, and the trunk between them."""

import jax
import jax.numpy as jnp
from jax import Array

from spannorm_jax.config import ExecutionConfig, ModelConfig
from spannorm_jax.model.kernels.cross_entropy import head_logits
from spannorm_jax.model.layers import rotary_angles
from spannorm_jax.model.parametrisation import forward
from spannorm_jax.model.stack import ACTIVATION
from spannorm_jax.model.trunk import Trunk
from spannorm_jax.model.weights import weight
from spannorm_jax.parallel.mesh import constrain


class Decoder(Trunk):
    """Tokens (B, T) -> logits (B, T, V) in float32; position t sees tokens 0..t."""

    def __init__(self, cfg: ModelConfig, execution: ExecutionConfig):
        super().__init__(cfg, execution)
        V, D = cfg.vocab_size, cfg.width
        # Decay and FLOPs follow the role: a tied embedding is the head's matrix too.
        role = "output" if cfg.tied_head else "embedding"
        # A lookup sums one row, so that 1 / sqrt(fan_in) lets the stream start at unit variance. A tied embedding is
        # the head's matrix, and its rows enter times sqrt(D) to the same end (Vaswani et al. 2017, section 3.4).
        fans = {"fan_in": D, "fan_out": V} if cfg.tied_head else {"fan_in": 1, "fan_out": D}
        self.embed = weight((V, D), ("vocab", "embed"), role, "embed", **fans)
        if not cfg.tied_head:
            self.head = weight((D, V), ("embed", "vocab"), "output", "head", fan_in=D, fan_out=V)

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

    def angles(self, length: int) -> Array:
        return rotary_angles(length, self.cfg.width // self.cfg.num_heads, self.cfg.rope_theta)

    def head_inputs(self, features: Array) -> tuple[Array, Array]:
        """The factors of the logits: features (..., D) with their multiplier, and the head's matrix (D, V), float32."""
        multiplier = forward(self.cfg).logits
        features = features if multiplier == 1 else features * multiplier
        return features, self.embed[...].T if self.cfg.tied_head else self.head[...]

    def logits(self, features: Array) -> Array:
        """(..., D) -> (..., V) in float32, whatever the compute dtype."""
        with jax.named_scope("head"):
            features, matrix = self.head_inputs(features)
            return head_logits(features, matrix.astype(features.dtype))
