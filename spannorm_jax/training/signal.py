"""Early warnings of the forward pass, as docs/signal.md defines them: a program of its own, which few steps call.

What a step adds of its own is the norm of its update, which nothing else sees.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from spannorm_jax.model.block import Block
from spannorm_jax.model.definition import ModelDef
from spannorm_jax.model.kernels.attention_logits import largest_logit
from spannorm_jax.model.stack import STACKS
from spannorm_jax.training.task import Batch, microbatches


def squares(tree: Any, keep: int) -> Array | int:
    """Sum of squares over all axes of all leaves, but for the first `keep`."""
    return sum(jnp.sum(jnp.square(x), axis=tuple(range(keep, x.ndim))) for x in jax.tree.leaves(tree))


def block_squares(model: ModelDef, tree: Any) -> Array:
    """(L,): the same of each block, of a tree shaped like the parameters."""
    blocks = jnp.zeros(model.cfg.depth)
    for name in STACKS.values():
        if name in tree:
            layers = model.weights[name]["attn"]["q"].layers
            blocks = blocks.at[jnp.array(layers)].set(squares(tree[name], keep=1))
    return blocks


def forward_signal(
    model: ModelDef,
    inputs: Callable[[Batch], Array],
    num_microbatches: int,
    params: Any,
    model_state: Any,
    batch: Batch,
) -> dict[str, Array]:
    """Of each block, (L,): `weight_norm`; and of the first microbatch, which takes no more memory than a step's,
    `stream_rms` of what leaves the block (of two streams the first) and `attention_logit_max`.

    Logits are computed from queries and keys a second time, since the kernels that run do not return them.
    """
    first = jax.tree.map(lambda x: x[0], microbatches(batch, num_microbatches))

    def step(block: Block, stream: Any, layer: Array, angles: Any, _: None) -> tuple[Any, dict[str, Array], None]:
        logit = jnp.zeros(())

        def attn(x_BxTxD: Array) -> Array:
            nonlocal logit
            q, k, _ = block.attn.qkv(x_BxTxD, angles)
            logit = largest_logit(q, k, block.attn.causal)
            return block.attn(x_BxTxD, angles)

        stream = block(stream, layer, attn, block.feed_forward)[0]
        x_BxTxD = jax.tree.leaves(stream)[0].astype(jnp.float32)
        return stream, {"rms": jnp.sqrt(jnp.mean(jnp.square(x_BxTxD))), "logit": logit}, None

    seen = model.bind(params, model_state).run(inputs(first), step).ys
    return OrderedDict(
        weight_norm=jnp.sqrt(block_squares(model, params)),
        stream_rms=seen["rms"],
        attention_logit_max=seen["logit"],
    )
