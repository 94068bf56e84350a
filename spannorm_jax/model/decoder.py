"""The decoder-only Transformer: embedding, a scan over blocks, head; and its weights as a plain pytree.

`define(cfg)` gives the model's structure and the table of its weights without allocating; `ModelDef.init` makes
the weights; `ModelDef.bind` puts a pytree of weights back into the modules. Everything outside this package works
on the pytree.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from spannorm_jax.config import ModelConfig
from spannorm_jax.model.attention import keep_attention
from spannorm_jax.model.layers import ROLES, Attention, FeedForward, Norms, rotary_angles, weight
from spannorm_jax.model.placement import PLACEMENTS
from spannorm_jax.model.scale_init import weight_stds
from spannorm_jax.parallel.mesh import LOGICAL_AXES, constrain

ACTIVATION = ("batch", "time", "activation")


class Block(nnx.Module):
    """One Transformer block: two sub-layers, and the norms where the placement puts them."""

    def __init__(self, cfg: ModelConfig, stds: dict[str, float], rngs: nnx.Rngs):
        self.placement, self.depth = cfg.placement, cfg.depth
        self.attn = Attention(cfg, stds, rngs)
        self.ffn = FeedForward(cfg, stds, rngs)
        self.norms = Norms(cfg, PLACEMENTS[cfg.placement].block_norms)

    def __call__(self, stream: Any, layer: Array, angles_TxK2: Array) -> Any:
        def attn(x_BxTxD: Array) -> Array:
            return self.attn(x_BxTxD, angles_TxK2)

        with jax.named_scope("block"):
            block = PLACEMENTS[self.placement].block
            return block(stream, attn, self.ffn, self.norms, layer, self.depth)


class Decoder(nnx.Module):
    """Tokens -> logits. The blocks' weights are stacked on a leading layer axis."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        self.cfg = cfg
        stds = weight_stds(cfg)
        V, D = cfg.vocab_size, cfg.width
        # Decay and FLOPs follow the role: a tied embedding is the head's matrix too.
        role = "output" if cfg.tied_head else "embedding"
        self.embed = weight(rngs, stds["embed"], (V, D), ("vocab", "embed"), role, "embed")

        @nnx.split_rngs(splits=cfg.depth)
        @nnx.vmap
        def stacked_blocks(rngs: nnx.Rngs) -> Block:
            return Block(cfg, stds, rngs)

        self.blocks = stacked_blocks(rngs)
        self.ends = Norms(cfg, PLACEMENTS[cfg.placement].end_norms)
        if not cfg.tied_head:
            self.head = weight(rngs, stds["head"], (D, V), ("embed", "vocab"), "output", "head")

    def embeddings(self, tokens_BxT: Array) -> Array:
        """What enters the placement's stream: (B, T, D) in the compute dtype."""
        cfg = self.cfg
        with jax.named_scope("embed"):
            # Gathered over `embed` first, as every weight is where it is used: the partitioner cannot look rows up in
            # a table that is split along the rows' width without replicating the result.
            table = constrain(self.embed[...].astype(cfg.dtype), ("vocab", "activation"))
            x = table[tokens_BxT]
            if cfg.tied_head:
                x = x * jnp.asarray(cfg.width**0.5, x.dtype)
            return constrain(x, ACTIVATION)

    def features(self, tokens_BxT: Array) -> Array:
        """What the head reads: (B, T, D) in the compute dtype."""
        cfg, placement = self.cfg, PLACEMENTS[self.cfg.placement]
        angles = rotary_angles(tokens_BxT.shape[1], cfg.width // cfg.num_heads, cfg.rope_theta)
        graph, stacked_weights = nnx.split(self.blocks)

        def block(stream: Any, layer_and_weights: tuple[Array, Any]) -> tuple[Any, None]:
            layer, weights = layer_and_weights
            stream = nnx.merge(graph, weights)(stream, layer, angles)
            return jax.tree.map(lambda x: constrain(x, ACTIVATION), stream), None

        stream, _ = jax.lax.scan(
            _remat(block, cfg.remat),
            placement.enter(self.embeddings(tokens_BxT), self.ends),
            (jnp.arange(cfg.depth), stacked_weights),
            unroll=cfg.scan_unroll,
        )
        return placement.leave(stream, self.ends)

    def head_matrix(self) -> Array:
        """(D, V) in float32."""
        return self.embed[...].T if self.cfg.tied_head else self.head[...]

    def logits(self, features: Array) -> Array:
        """(..., D) -> (..., V) in float32, whatever the compute dtype."""
        with jax.named_scope("head"):
            matrix = self.head_matrix().astype(features.dtype)
            return jnp.matmul(features, matrix, preferred_element_type=jnp.float32)

    def __call__(self, tokens_BxT: Array) -> Array:
        """Logits (B, T, V) in float32; position t sees tokens 0..t."""
        return self.logits(self.features(tokens_BxT))


def _remat(block: Any, policy: str) -> Any:
    if policy == "none":
        return block
    keep = jax.checkpoint_policies
    policies = {
        "block": keep.nothing_saveable,
        "dots": keep.save_from_both_policies(keep.dots_with_no_batch_dims_saveable, keep_attention),
    }
    # Inside a scan the compiler cannot merge the recomputation with the forward pass anyway.
    return jax.checkpoint(block, policy=policies[policy], prevent_cse=False)


@dataclass(frozen=True)
class WeightSpec:
    """What is known of a weight before it exists: shape, logical axes (one a dimension), role and site."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    role: str
    site: str


@dataclass(frozen=True)
class ModelDef:
    """A model's structure: `weights` is the table of its weights, shaped like its parameter pytree."""

    cfg: ModelConfig
    graph: nnx.GraphDef
    weights: dict[str, Any]

    def init(self, key: Array) -> dict[str, Any]:
        """Draws the weights, a nested dict of float32 arrays; call it under jit to make them sharded."""
        return nnx.to_pure_dict(nnx.state(Decoder(self.cfg, nnx.Rngs(params=key)), nnx.Param))

    def bind(self, params: dict[str, Any]) -> Decoder:
        return nnx.merge(self.graph, params)

    def map_weights(self, fn: Any, *rest: Any) -> Any:
        """`jax.tree.map` over the table, each WeightSpec a leaf."""
        return jax.tree.map(fn, self.weights, *rest, is_leaf=lambda x: isinstance(x, WeightSpec))

    def specs(self) -> list[WeightSpec]:
        return jax.tree.leaves(self.weights, is_leaf=lambda x: isinstance(x, WeightSpec))


def define(cfg: ModelConfig) -> ModelDef:
    """The structure of the model of a resolved config (no zeros or 'auto' left), allocating nothing.

    Raises:
      ValueError: a weight was declared with an unknown role or logical axis.
    """
    abstract = nnx.eval_shape(lambda: Decoder(cfg, nnx.Rngs(params=0)))
    graph, state = nnx.split(abstract)
    table: dict[str, Any] = {}
    for path, param in nnx.to_flat_state(state):
        meta = param.get_metadata()
        # Stacking by nnx.vmap adds a leading layer axis that the declaration does not name.
        axes = ("layers",) * (len(param.shape) - len(meta["axes"])) + meta["axes"]
        unknown = [axis for axis in axes if axis not in LOGICAL_AXES]
        if unknown or meta["role"] not in ROLES:
            raise ValueError(f"weight {path}: unknown axes {unknown} or role {meta['role']!r}")
        node = table
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = WeightSpec(param.shape, axes, meta["role"], meta["site"])
    return ModelDef(cfg, graph, table)


def count_params(model: ModelDef) -> int:
    return sum(math.prod(spec.shape) for spec in model.specs())


def flops_per_token(model: ModelDef, seq_len: int) -> int:
    """Training FLOPs (forward and backward) a token: 6 a matmul weight, plus causal attention's 6 L H K T.

    A lookup in an untied embedding costs none; recomputation by remat is not counted (as for MFU,
    Chowdhery et al. 2022, arXiv 2204.02311, appendix B).
    """
    matmul = sum(math.prod(spec.shape) for spec in model.specs() if spec.role in ("hidden", "output"))
    return 6 * matmul + 6 * model.cfg.depth * model.cfg.width * seq_len
