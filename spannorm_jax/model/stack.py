"""Blocks stacked on a layer axis, those with experts apart, and one scan over them all."""

from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from spannorm_jax.config import ModelConfig
from spannorm_jax.model.block import Block
from spannorm_jax.model.kernels.attention import keep_attention
from spannorm_jax.model.moe import experts
from spannorm_jax.model.moe.router import Stats, moe_layers
from spannorm_jax.parallel.mesh import constrain

ACTIVATION = ("batch", "time", "activation")
STACKS = {False: "blocks", True: "moe_blocks"}  # has experts -> attribute of the stack
Stacks = dict[bool, Block]  # has experts -> its blocks, every weight with a leading layer axis


def stacked_blocks(cfg: ModelConfig, stds: dict[str, float], rngs: nnx.Rngs, number: int, moe: bool) -> Block:
    """`number` blocks, drawn each from a key of its own."""

    @nnx.split_rngs(splits=number)
    @nnx.vmap
    def make(rngs: nnx.Rngs) -> Block:
        return Block(cfg, stds, rngs, moe)

    return make(rngs)


def over_blocks(
    stacks: Stacks, cfg: ModelConfig, step: Callable, stream: Any, per_layer: Any
) -> tuple[Any, Any, Stats | None]:
    """Runs step(block, stream, layer, x) -> (stream, y, stats) over all blocks; x is a slice of `per_layer`, (L, ...).

    Returns the stream, the ys (L, ...) and the stats of the blocks with experts. Compile time does not depend on the
    depth: blocks before the first period of dense and expert blocks are one scan, the periods another.
    """
    kinds = moe_layers(cfg)
    lead = cfg.moe.first_dense if any(kinds) else 0
    period = kinds[lead : lead + cfg.moe.every] if any(kinds) else (False,)
    split = {moe: nnx.split(stack) for moe, stack in stacks.items()}

    def parts(tree: Any, start: int, rounds: int, width: int) -> list[Any]:
        """Of (n, ...) from `start` on, every width-th, for each place in a period: `width` trees of (rounds, ...)."""

        def every(x: Array, i: int) -> Array:
            return x[start : start + rounds * width].reshape(rounds, width, *x.shape[1:])[:, i]

        return [jax.tree.map(partial(every, i=i), tree) for i in range(width)]

    def one(stream: Any, moe: bool, weights: Any, layer: Array, x: Any) -> Any:
        stream, y, stats = step(nnx.merge(split[moe][0], weights), stream, layer, x)
        return jax.tree.map(lambda x: constrain(x, ACTIVATION), stream), y, stats

    def scan(stream: Any, kinds: tuple[bool, ...], start: int, dense_start: int, rounds: int) -> Any:
        starts = {False: dense_start, True: 0}
        # Sliced outside of the loop: what its body computed of the weights would be kept for the backward pass.
        weights = {moe: iter(parts(stack, starts[moe], rounds, kinds.count(moe))) for moe, (_, stack) in split.items()}
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
