"""Early warnings of the forward pass, as docs/signal.md defines them: a program of its own, which few steps call.

What a step adds of its own is the norm of its update, which nothing else sees.
"""

from collections import OrderedDict
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from spannorm_jax.model.block import Block
from spannorm_jax.model.definition import ModelDef
from spannorm_jax.model.kernels.attention_logits import largest_logit
from spannorm_jax.model.layers import rotary_angles
from spannorm_jax.model.placement import PLACEMENTS
from spannorm_jax.model.stack import STACKS, over_blocks


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
    model: ModelDef, num_microbatches: int, params: Any, model_state: Any, tokens_BxT1: Array
) -> dict[str, Array]:
    """Of each block, (L,): `weight_norm`; and of the first microbatch, which takes no more memory than a step's,
    `stream_rms` of what leaves the block (of two streams the first) and `attention_logit_max`.

    Logits are computed from queries and keys a second time, since the kernels that run do not return them.
    """
    cfg, decoder = model.cfg, model.bind(params, model_state)
    B, T1 = tokens_BxT1.shape
    tokens = tokens_BxT1.reshape(B // num_microbatches, num_microbatches, T1)[:, 0, :-1]
    angles = rotary_angles(T1 - 1, cfg.width // cfg.num_heads, cfg.rope_theta)

    def step(block: Block, stream: Any, layer: Array, _: None) -> tuple[Any, dict[str, Array], None]:
        logit = jnp.zeros(())

        def attn(x_BxTxD: Array) -> Array:
            nonlocal logit
            q, k, _ = block.attn.qkv(x_BxTxD, angles)
            logit = largest_logit(q, k)
            return block.attn(x_BxTxD, angles)

        stream = block(stream, layer, attn, block.feed_forward)[0]
        x_BxTxD = jax.tree.leaves(stream)[0].astype(jnp.float32)
        return stream, {"rms": jnp.sqrt(jnp.mean(jnp.square(x_BxTxD))), "logit": logit}, None

    stream = PLACEMENTS[cfg.placement].enter(decoder.embeddings(tokens), decoder.ends)
    _, found, _ = over_blocks(decoder.stacks, cfg, decoder.execution, step, stream, None)
    return OrderedDict(
        weight_norm=jnp.sqrt(block_squares(model, params)),
        stream_rms=found["rms"],
        attention_logit_max=found["logit"],
    )
