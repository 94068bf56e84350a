"""The Vision Transformer (Dosovitskiy et al. 2021, arXiv 2010.11929): images in, classes out, and the trunk between.

As in Beyer et al. 2022 (arXiv 2205.01580): fixed sines and cosines for positions, the mean of all patches for the head,
which starts at zero. Attention has no mask and no rotary positions.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from spannorm_jax.config import ExecutionConfig, ImageConfig, ModelConfig
from spannorm_jax.model.parametrisation import forward
from spannorm_jax.model.stack import ACTIVATION
from spannorm_jax.model.trunk import Trunk
from spannorm_jax.model.weights import weight
from spannorm_jax.parallel.mesh import constrain


class Encoder(Trunk):
    """Images, (B, S, S, C) of bytes -> float32 logits (B, classes), of which there are `vocab_size`."""

    def __init__(self, cfg: ModelConfig, execution: ExecutionConfig, image: ImageConfig):
        super().__init__(cfg, execution, causal=False)
        D, C, F = cfg.width, cfg.vocab_size, image.patch**2 * image.channels
        self.image = image
        self.embed = weight((F, D), ("parts", "embed"), "embedding", "embed", fan_in=F, fan_out=D)
        if image.positions == "learned":
            N = (image.size // image.patch) ** 2
            self.positions = weight((N, D), ("parts", "embed"), "embedding", "positions", fan_in=D, fan_out=D)
        if image.pool == "token":
            self.token = weight((1, D), ("parts", "embed"), "embedding", "token", fan_in=1, fan_out=D, start=0.0)
        self.head = weight((D, C), ("embed", "vocab"), "output", "head", fan_in=D, fan_out=C, start=0.0)

    def embeddings(self, images_BxSxSxC: Array) -> Array:
        """What enters the stream: (B, T, D) in the compute dtype, T the patches and the token, if any."""
        cfg, image = self.cfg, self.image
        with jax.named_scope("embed"):
            x = patches(images_BxSxSxC, image.patch).astype(cfg.dtype) @ self.embed[...].astype(cfg.dtype)
            learned = image.positions == "learned"
            positions = self.positions[...] if learned else sincos2d(image.size // image.patch, cfg.width)
            x = x + jnp.asarray(positions, x.dtype)
            if image.pool == "token":
                token = jnp.broadcast_to(self.token[...].astype(x.dtype), (len(x), 1, cfg.width))
                x = jnp.concatenate([token, x], axis=1)
            return constrain(x, ACTIVATION)

    def logits(self, features_BxTxD: Array) -> Array:
        """(B, C) in float32, of the mean over the patches or of the token's features."""
        with jax.named_scope("head"):
            token = self.image.pool == "token"
            pooled = features_BxTxD[:, 0] if token else jnp.mean(features_BxTxD, axis=1, dtype=jnp.float32)
            product = pooled.astype(features_BxTxD.dtype) @ self.head[...].astype(features_BxTxD.dtype)
            return product.astype(jnp.float32) * forward(self.cfg).logits


def patches(images_BxSxSxC: Array, patch: int) -> Array:
    """(B, N, patch^2 C) float32 from -1 to 1, row by row of the image, of numbers up to 255."""
    B, S, _, C = images_BxSxSxC.shape
    n = S // patch
    x = images_BxSxSxC.astype(jnp.float32) / 127.5 - 1
    return x.reshape(B, n, patch, n, patch, C).swapaxes(2, 3).reshape(B, n * n, patch * patch * C)


def sincos2d(side: int, width: int) -> np.ndarray:
    """(side^2, width): sines, cosines of column, then row (Chen et al. 2021, arXiv 2104.02057)."""
    omega = 1e4 ** -np.linspace(0, 1, width // 4)
    row, column = (np.outer(index.ravel(), omega) for index in np.mgrid[:side, :side])
    return np.concatenate([np.sin(column), np.cos(column), np.sin(row), np.cos(row)], axis=1).astype(np.float32)
