"""The router: float32 scores, top-k choice, balance losses and selection bias.

Shapes: N tokens, E experts, k experts a token, D width, P parts (2 of SwiGLU, else 1), F hidden units of an
expert. The router follows Shazeer et al. 2017 (arXiv 1701.06538) and, with sigmoid scores and a
selection bias, DeepSeek-V3 (arXiv 2412.19437, section 2.1.2).
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from spannorm_jax.config import MoEConfig
from spannorm_jax.parallel.mesh import LOGICAL_AXES

Stats = dict[str, Array]


def route(logits_NxE: Array, bias_E: Array | None, moe: MoEConfig) -> tuple[Array, Array, Array]:
    """Weights (N, k) and ids (N, k) of each token's experts, and its scores over all as probabilities (N, E).

    A bias takes part in the selection, and in nothing else. With `renormalize` the chosen
    weights sum to one. Values and gradients are finite for all finite logits.
    """
    # In logarithms: scores may all vanish in float32, and what is divided by their sum is then lost.
    log_scores = jax.nn.log_softmax(logits_NxE) if moe.scores == "softmax" else jax.nn.log_sigmoid(logits_NxE)
    # Without a bias by the logits, which have the order of the scores and stay apart where those are all 0 or all 1.
    preferred = logits_NxE if bias_E is None else jnp.exp(log_scores) + bias_E
    ids = _top_ids(jax.lax.stop_gradient(preferred), moe.top_k)
    chosen = jnp.take_along_axis(log_scores, ids, axis=-1)
    weights = jax.nn.softmax(chosen) if moe.renormalize else jnp.exp(chosen)
    return weights, ids, jax.nn.softmax(log_scores)


def _top_ids(preferred_NxE: Array, k: int) -> Array:
    """(N, k) int32, each device those of its own tokens: the partitioner would gather all on each."""

    def ids(preferred_NxE: Array) -> Array:
        return jax.lax.top_k(preferred_NxE, k)[1]

    if jax.sharding.get_abstract_mesh().empty:
        return ids(preferred_NxE)
    rows = PartitionSpec(LOGICAL_AXES["batch"])
    return jax.shard_map(ids, in_specs=rows, out_specs=rows, check_vma=False)(preferred_NxE)


def router_stats(logits_NxE: Array, ids_Nxk: Array, probs_NxE: Array) -> Stats:
    """Sums over tokens, so that they add up over microbatches: `counts` of assignments and `probs`, (E,); the square
    of log Z, `z`; the `entropy` of the probabilities, in nats; and `tokens`."""
    E = logits_NxE.shape[1]
    counts = jnp.zeros(E).at[ids_Nxk.reshape(-1)].add(1.0)
    return {
        "counts": jax.lax.stop_gradient(counts),
        "probs": jnp.sum(probs_NxE, axis=0),
        "z": jnp.sum(jnp.square(jax.nn.logsumexp(logits_NxE, axis=-1))),
        "entropy": jax.lax.stop_gradient(-jnp.sum(jax.scipy.special.xlogy(probs_NxE, probs_NxE))),
        "tokens": jnp.asarray(logits_NxE.shape[0], jnp.float32),
    }


def load_balance_loss(stats: Stats) -> Array:
    """E sum_e f_e P_e over the last axis: 1 if loads and probabilities are even (Fedus et al. 2021, arXiv 2101.03961,
    eq. 4, with f the share of assignments)."""
    E = stats["counts"].shape[-1]
    share = stats["counts"] / jnp.sum(stats["counts"], axis=-1, keepdims=True)
    return E * jnp.sum(share * stats["probs"], axis=-1) / stats["tokens"]


def balanced_bias(bias_LxE: Array, counts_LxE: Array, rate: ArrayLike) -> Array:
    """One step of the selection bias towards even loads (Wang et al. 2024, arXiv 2408.15664, algorithm 1)."""
    return bias_LxE + rate * jnp.sign(jnp.mean(counts_LxE, axis=-1, keepdims=True) - counts_LxE)
