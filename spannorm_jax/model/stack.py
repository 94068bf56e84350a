"""Blocks stacked on a layer axis, those with experts apart, and scans over them all."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from spannorm_jax.config import ExecutionConfig, ModelConfig
from spannorm_jax.model.block import Block
from spannorm_jax.model.kernels.attention import keep_attention
from spannorm_jax.model.moe import experts
from spannorm_jax.model.moe.router import Stats
from spannorm_jax.parallel.mesh import target_platform

ACTIVATION = ("batch", "time", "activation")
STACKS = {False: "blocks", True: "moe_blocks"}  # has experts -> attribute of the stack
Stacks = dict[bool, Block]  # has experts -> its blocks, every weight with a leading layer axis
BoundStep = Callable[[Block, Any, Array, Any], tuple[Any, Any, Stats | None]]
Step = Callable[[Block, Any, Array, Array | None, Any], tuple[Any, Any, Stats | None]]  # with the angles


@dataclass(frozen=True)
class Stride:
    """A place in the pattern of blocks that a scan repeats: its layers, and their rows in the stack of their kind."""

    moe: bool
    layers: range
    rows: range


def scans(cfg: ModelConfig) -> list[list[Stride]]:
    """The scans that run all blocks in order, each the places of its pattern.

    Dense blocks that stand before the first period of dense and expert blocks are a scan of their
    own; the periods are another.
    """
    depth, moe = cfg.depth, cfg.moe
    if not moe.num_experts:
        return [[Stride(False, range(depth), range(depth))]]
    lead, dense = moe.first_dense, moe.every - 1  # dense blocks at the start, and of a period
    periods = (depth - lead) // moe.every
    pattern = [
        Stride(False, range(lead + i, depth, moe.every), range(lead + i, lead + periods * dense, dense))
        for i in range(dense)
    ]
    pattern.append(Stride(True, range(lead + dense, depth, moe.every), range(periods)))
    return [[Stride(False, range(lead), range(lead))], pattern] if lead else [pattern]


def over_blocks(
    stacks: Stacks, cfg: ModelConfig, execution: ExecutionConfig, step: BoundStep, stream: Any, per_layer: Any
) -> tuple[Any, Any, Stats | None]:
    """Runs step(block, carry, layer, x) -> (carry, y, stats) over all blocks; x is a slice of `per_layer`, (L, ...).

    Returns the carry, the ys (L, ...) and the stats of the blocks with experts. Compile time does
    not depend on the depth: `scans(cfg)` are one program each.
    """
    all_ys, all_stats = [], []
    for places in scans(cfg):
        stream, ys, stats = _scan(stacks, execution, step, places, stream, per_layer)
        all_ys.append(_interleaved(ys))
        all_stats += [stats] if stats else []
    return stream, _joined(all_ys), _joined(all_stats) if all_stats else None


def _scan(
    stacks: Stacks, execution: ExecutionConfig, step: BoundStep, places: list[Stride], stream: Any, per_layer: Any
) -> tuple[Any, list[Any], Stats | None]:
    """Runs the blocks of all places, a period an iteration.

    Returns the stream, each place's ys (periods, ...), and the stats of the one place with experts.
    """
    parts = {place.moe: nnx.split(stacks[place.moe]) for place in places}
    # Sliced before the scan: slices that its body makes would be saved for the backward pass.
    inputs = [
        (_slice(parts[place.moe][1], place.rows), np.array(place.layers), _slice(per_layer, place.layers))
        for place in places
    ]

    def run(place: Stride, stream: Any, weights: Any, layer: Array, x: Any) -> tuple[Any, Any, Stats | None]:
        return step(nnx.merge(parts[place.moe][0], weights), stream, layer, x)

    def period(stream: Any, inputs: list[Any]) -> tuple[Any, Any]:
        ys, of_experts = [], None
        for place, own in zip(places, inputs, strict=True):
            stream, y, stats = _remat(partial(run, place), execution.remat)(stream, *own)
            ys.append(y)
            of_experts = stats if place.moe else of_experts
        return stream, (ys, of_experts)

    periods = len(places[0].layers)
    unroll = execution.scan_unroll if periods % execution.scan_unroll == 0 else 1
    stream, (ys, stats) = jax.lax.scan(period, stream, inputs, unroll=unroll)
    return stream, ys, stats


def _slice(tree: Any, rows: range) -> Any:
    return jax.tree.map(lambda x: x[rows.start : rows.stop : rows.step], tree)


def _interleaved(trees: list[Any]) -> Any:
    """Trees of (periods, ...), one a place -> one of (periods x places, ...), in the order of the layers."""
    return jax.tree.map(lambda *xs: jnp.stack(xs, axis=1).reshape(-1, *xs[0].shape[1:]), *trees)


def _joined(trees: Sequence[Any]) -> Any:
    return trees[0] if len(trees) == 1 else jax.tree.map(lambda *xs: jnp.concatenate(xs), *trees)


def remat_for(policy: str, platform: str) -> str:
    """The policy that runs on a platform. A TPU makes activations again faster than it fetches them, a GPU makes those
    between its matmuls again, and a CPU is slowed by either. docs/speed.md has the compilers' plans."""
    return {"cpu": "none", "gpu": "dots", "tpu": "block"}[platform] if policy == "auto" else policy


def _remat(block: Any, policy: str) -> Any:
    policy = remat_for(policy, target_platform())
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
