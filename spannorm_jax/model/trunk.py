"""What a model has between its ends: blocks, a scan over them all, and the placement's norms before and behind."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax import Array

from spannorm_jax.config import ExecutionConfig, ModelConfig, moe_layers
from spannorm_jax.model.block import Block
from spannorm_jax.model.layers import Norms
from spannorm_jax.model.moe.router import Stats
from spannorm_jax.model.placement import placement_of
from spannorm_jax.model.stack import ACTIVATION, STACKS, Stacks, Step, over_blocks
from spannorm_jax.parallel.mesh import constrain


class Pass(NamedTuple):
    """What one pass over the blocks leaves."""

    features: Array  # (B, T, D) in the compute dtype: what the head reads
    stream: Any  # what leaves the last block
    ys: Any  # (L, ...): what each step returns beside its stream
    stats: Stats | None  # the router's sums of each block with experts, stacked; None without any


class Trunk(nnx.Module):
    """Embeddings -> features. A model adds its ends: `embeddings` of its inputs, (B, T, D), and `logits` of features.

    It declares one dense block and one with experts. `ModelDef.bind` fills them with the weights of all, stacked on a
    layer axis.
    """

    embeddings: Callable[[Array], Array]
    logits: Callable[[Array], Array]

    def __init__(self, cfg: ModelConfig, execution: ExecutionConfig, causal: bool = True):
        self.cfg, self.execution, self.causal = cfg, execution, causal
        kinds = moe_layers(cfg)
        for moe, name in STACKS.items():
            if moe in kinds:
                setattr(self, name, Block(cfg, execution, moe, causal))
        self.ends = Norms(cfg, placement_of(cfg).end_norms)

    @property
    def stacks(self) -> Stacks:
        return {moe: getattr(self, name) for moe, name in STACKS.items() if hasattr(self, name)}

    def angles(self, length: int) -> Array | None:
        """Rotary angles (T, K / 2) of the positions 0..length-1; None where attention has none."""
        return None

    def __call__(self, inputs: Array) -> Array:
        return self.logits(self.run(inputs).features)

    def enter(self, x_BxTxD: Array) -> Any:
        """The stream that enters the first block, of the embeddings."""
        return placement_of(self.cfg).enter(x_BxTxD, self.ends)

    def leave(self, stream: Any) -> Array:
        """What the head reads, (B, T, D), of the stream that leaves the last block."""
        return placement_of(self.cfg).leave(stream, self.ends)

    def run(
        self,
        inputs: Array,
        step: Step | None = None,
        per_layer: Any = None,
        angles: Array | None = None,
        remat: str = "",
        carried: Any = None,
    ) -> Pass:
        """One pass over inputs (B, T, ...), at positions 0..T-1 unless `angles` say others; `run_from` has the rest."""
        if angles is None:
            angles = self.angles(inputs.shape[1])
        return self.run_from(self.enter(self.embeddings(inputs)), angles, step, per_layer, remat, carried)

    def run_from(
        self,
        stream: Any,
        angles: Array | None,
        step: Step | None = None,
        per_layer: Any = None,
        remat: str = "",
        carried: Any = None,
    ) -> Pass:
        """Runs step(block, stream, layer, angles, x) -> (stream, y, stats) over all blocks, from `enter`'s stream on.

        Args:
          angles: of the rotary positions, (..., T, K / 2); every step gets them.
          step: by default the block itself, `Block.whole`.
          per_layer: a tree of (L, ...); x is a block's slice of it.
          remat: instead of the execution's, if given.
          carried: a tree that goes from block to block beside the stream: x is what the block before returned as its
            y, and `Pass.ys` what the last one returned. A loop's carry is updated in place, where xs and ys are copied.
        """
        execution = dataclasses.replace(self.execution, remat=remat) if remat else self.execution
        step = step or Block.whole

        def bound(block: Block, carry: Any, layer: Array, x: Any) -> tuple[Any, Any, Stats | None]:
            stream, y, stats = step(block, carry[0], layer, angles, x if carried is None else carry[1])
            stream = jax.tree.map(lambda x: constrain(x, ACTIVATION), stream)
            return ((stream, None), y, stats) if carried is None else ((stream, y), None, stats)

        carry, ys, stats = over_blocks(self.stacks, self.cfg, execution, bound, (stream, carried), per_layer)
        return Pass(self.leave(carry[0]), carry[0], ys if carried is None else carry[1], stats)
