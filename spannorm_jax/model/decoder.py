"""The decoder-only Transformer: embedding, a scan over blocks, head; and its weights as a plain pytree.

`define(cfg)` gives the model's structure and the table of its weights without allocating; `ModelDef.init` makes
the weights; `ModelDef.bind` puts a pytree of weights back into the modules. Everything outside this package works
on the pytree.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from spannorm_jax.config import ModelConfig
from spannorm_jax.model.kernels.attention import keep_attention
from spannorm_jax.model.layers import ROLES, Attention, FeedForward, Norms, rotary_angles, weight
from spannorm_jax.model.moe import experts
from spannorm_jax.model.moe.layer import MoE
from spannorm_jax.model.moe.router import Stats, moe_layers
from spannorm_jax.model.placement import PLACEMENTS
from spannorm_jax.model.scale_init import weight_stds
from spannorm_jax.parallel.mesh import LOGICAL_AXES, constrain

ACTIVATION = ("batch", "time", "activation")
NAMES = {False: "blocks", True: "moe_blocks"}  # has experts -> attribute of the stack


class Block(nnx.Module):
    """One Transformer block: two sub-layers, and the norms where the placement puts them."""

    def __init__(self, cfg: ModelConfig, stds: dict[str, float], rngs: nnx.Rngs, moe: bool = False):
        self.placement, self.depth = cfg.placement, cfg.depth
        self.attn = Attention(cfg, stds, rngs)
        self.ffn = (MoE if moe else FeedForward)(cfg, stds, rngs)
        self.norms = Norms(cfg, PLACEMENTS[cfg.placement].block_norms)

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


def _stacked_blocks(cfg: ModelConfig, stds: dict[str, float], rngs: nnx.Rngs, number: int, moe: bool) -> Block:
    @nnx.split_rngs(splits=number)
    @nnx.vmap
    def make(rngs: nnx.Rngs) -> Block:
        return Block(cfg, stds, rngs, moe)

    return make(rngs)


class Decoder(nnx.Module):
    """Tokens -> logits. The weights of the dense blocks, and of those with experts, are stacked on a layer axis."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        self.cfg = cfg
        stds = weight_stds(cfg)
        V, D = cfg.vocab_size, cfg.width
        # Decay and FLOPs follow the role: a tied embedding is the head's matrix too.
        role = "output" if cfg.tied_head else "embedding"
        self.embed = weight(rngs, stds["embed"], (V, D), ("vocab", "embed"), role, "embed")

        kinds = moe_layers(cfg)
        for moe, name in NAMES.items():
            if moe in kinds:
                setattr(self, name, _stacked_blocks(cfg, stds, rngs, kinds.count(moe), moe))
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
        return self.features_and_router(tokens_BxT)[0]

    def features_and_router(self, tokens_BxT: Array) -> tuple[Array, Stats | None]:
        """`features`, and the router's sums of each block with experts, stacked; None without any."""
        cfg, placement = self.cfg, PLACEMENTS[self.cfg.placement]
        angles = rotary_angles(tokens_BxT.shape[1], cfg.width // cfg.num_heads, cfg.rope_theta)

        def step(block: Block, stream: Any, layer: Array, _: None) -> tuple[Any, None, Stats | None]:
            stream, stats = block(stream, lambda x_BxTxD: block.attn(x_BxTxD, angles), layer)
            return stream, None, stats

        stream = placement.enter(self.embeddings(tokens_BxT), self.ends)
        stream, _, stats = over_blocks(self, step, stream, None)
        return placement.leave(stream, self.ends), stats

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


def over_blocks(decoder: Decoder, step: Callable, stream: Any, per_layer: Any) -> tuple[Any, Any, Stats | None]:
    """Runs step(block, stream, layer, x) -> (stream, y, stats) over all blocks; x is a slice of `per_layer`, (L, ...).

    Returns the stream, the ys (L, ...) and the stats of the blocks with experts. Compile time does not depend on the
    depth: blocks before the first period of dense and expert blocks are one scan, the periods another.
    """
    cfg = decoder.cfg
    kinds = moe_layers(cfg)
    lead = cfg.moe.first_dense if any(kinds) else 0
    period = kinds[lead : lead + cfg.moe.every] if any(kinds) else (False,)
    stacks = {moe: nnx.split(getattr(decoder, name)) for moe, name in NAMES.items() if moe in kinds}

    def parts(tree: Any, start: int, rounds: int, width: int) -> list[Any]:
        """Of (n, ...) from `start` on, every width-th, for each place in a period: `width` trees of (rounds, ...)."""

        def every(x: Array, i: int) -> Array:
            return x[start : start + rounds * width].reshape(rounds, width, *x.shape[1:])[:, i]

        return [jax.tree.map(partial(every, i=i), tree) for i in range(width)]

    def one(stream: Any, moe: bool, weights: Any, layer: Array, x: Any) -> Any:
        stream, y, stats = step(nnx.merge(stacks[moe][0], weights), stream, layer, x)
        return jax.tree.map(lambda x: constrain(x, ACTIVATION), stream), y, stats

    def scan(stream: Any, kinds: tuple[bool, ...], start: int, dense_start: int, rounds: int) -> Any:
        starts = {False: dense_start, True: 0}
        # Sliced outside of the loop: what its body computed of the weights would be kept for the backward pass.
        weights = {moe: iter(parts(stack, starts[moe], rounds, kinds.count(moe))) for moe, (_, stack) in stacks.items()}
        layers = parts(jnp.arange(cfg.depth), start, rounds, len(kinds))
        xs = parts(per_layer, start, rounds, len(kinds))
        inputs = [(next(weights[moe]), layer, x) for moe, layer, x in zip(kinds, layers, xs, strict=True)]

        def body(stream: Any, inputs: list[Any]) -> tuple[Any, Any]:
            ys, all_stats = [], []
            for moe, (own, layer, x) in zip(kinds, inputs, strict=True):
                stream, y, stats = _remat(partial(one, moe=moe), cfg.remat)(stream, weights=own, layer=layer, x=x)
                ys.append(y)
                all_stats += [stats] if moe else []
            return stream, tuple(jax.tree.map(lambda *a: jnp.stack(a), *v) if v else None for v in (ys, all_stats))

        unroll = cfg.scan_unroll if rounds % cfg.scan_unroll == 0 else 1
        stream, out = jax.lax.scan(body, stream, inputs, unroll=unroll)
        return stream, *(jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), v) for v in out)

    pieces = []
    if lead:
        stream, y, _ = scan(stream, (False,), 0, 0, lead)
        pieces.append(y)
    stream, y, stats = scan(stream, period, lead, lead, (cfg.depth - lead) // len(period))
    pieces.append(y)
    return stream, jax.tree.map(lambda *parts: jnp.concatenate(parts), *pieces), stats


def _remat(block: Any, policy: str) -> Any:
    if policy == "none":
        return block
    keep = jax.checkpoint_policies
    policies = {
        "block": keep.nothing_saveable,
        "dots": reduce(
            keep.save_from_both_policies,
            (keep.dots_with_no_batch_dims_saveable, keep_attention, keep.save_only_these_names(*experts.KEPT)),
        ),
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


def count_params(model: ModelDef, active: bool = False) -> int:
    """Weights; with `active`, those that a token meets: of routed experts, top_k."""
    return sum(_count(model, spec, active) for spec in model.specs() if spec.role != "router_state")


def _count(model: ModelDef, spec: WeightSpec, active: bool) -> int:
    n = math.prod(spec.shape)
    moe = model.cfg.moe
    return n // moe.num_experts * moe.top_k if active and spec.role == "expert" else n


def flops_per_token(model: ModelDef, seq_len: int) -> int:
    """Training FLOPs (forward and backward) a token: 6 an active matmul weight, plus causal attention's 6 L H K T.

    A lookup in an untied embedding costs none; recomputation by remat is not counted (as for MFU,
    Chowdhery et al. 2022, arXiv 2204.02311, appendix B).
    """
    roles = ("hidden", "output", "expert", "router")
    matmul = sum(_count(model, spec, active=True) for spec in model.specs() if spec.role in roles)
    return 6 * matmul + 6 * model.cfg.depth * model.cfg.width * seq_len
