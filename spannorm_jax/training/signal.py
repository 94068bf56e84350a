"""Early warnings of the forward pass, as docs/signal.md defines them: a program of its own, which few steps call.

The train step stays as it is, and so does its speed. A forward pass without a loss is about a fourth of a step.
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
from spannorm_jax.model.stack import over_blocks


def forward_signal(
    model: ModelDef, num_microbatches: int, params: Any, router: Any, tokens_BxT1: Array
) -> dict[str, Array]:
    """Of each block, (L,): `stream_rms` of what leaves it (of two streams the first), and
    `attention_logit_max`; over the first microbatch, which takes no more memory than a step's.

    Logits are computed from queries and keys a second time, since the kernels that run do not return them.
    """
    cfg, decoder = model.cfg, model.bind(params, router)
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
    return OrderedDict(stream_rms=found["rms"], attention_logit_max=found["logit"])
