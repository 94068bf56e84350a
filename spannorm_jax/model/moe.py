"""Mixture-of-Experts feed-forward: a float32 router, top-k experts a token, no token ever dropped.

Shapes: N tokens, E experts, k experts a token, D width, P parts (2 of SwiGLU, 1 of GELU), F hidden units of an
expert. The router follows Shazeer et al. 2017 (arXiv 1701.06538) and, with sigmoid scores and a
selection bias, DeepSeek-V3 (arXiv 2412.19437, section 2.1.2).
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec

from spannorm_jax.config import ModelConfig, MoEConfig
from spannorm_jax.model import experts
from spannorm_jax.model.layers import FeedForward, weight
from spannorm_jax.parallel.mesh import LOGICAL_AXES, partition_spec

Stats = dict[str, Array]


def moe_layers(cfg: ModelConfig) -> tuple[bool, ...]:
    """Which blocks have experts: after the first `first_dense`, each `every`-th."""
    moe = cfg.moe
    if not moe.num_experts:
        return (False,) * cfg.depth
    return tuple(i >= moe.first_dense and (i - moe.first_dense + 1) % moe.every == 0 for i in range(cfg.depth))


def route(logits_NxE: Array, bias_E: Array, moe: MoEConfig) -> tuple[Array, Array, Array]:
    """Weights (N, k) and ids (N, k) of each token's experts, and its scores over all as probabilities (N, E).

    With `balance` "bias" the bias takes part in the selection, and in nothing else. With `renormalize` the chosen
    weights sum to one. Values and gradients are finite for all finite logits.
    """
    # In logarithms: scores may all vanish in float32, and what is divided by their sum is then lost.
    log_scores = jax.nn.log_softmax(logits_NxE) if moe.scores == "softmax" else jax.nn.log_sigmoid(logits_NxE)
    # Without a bias by the logits, which have the order of the scores and stay apart where those are all 0 or all 1.
    preferred = jnp.exp(log_scores) + bias_E if moe.balance == "bias" else logits_NxE
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


def balanced_bias(bias_LxE: Array, counts_LxE: Array, rate: float) -> Array:
    """One step of the selection bias towards even loads (Wang et al. 2024, arXiv 2408.15664, algorithm 1)."""
    return bias_LxE + rate * jnp.sign(jnp.mean(counts_LxE, axis=-1, keepdims=True) - counts_LxE)


class MoE(nnx.Module):
    """Routed experts, and shared ones that see every token. Returns the branch and the router's sums."""

    def __init__(self, cfg: ModelConfig, stds: dict[str, float], rngs: nnx.Rngs):
        moe, D = cfg.moe, cfg.width
        E, F, P = moe.num_experts, moe.expert_dim, 2 if cfg.ffn == "swiglu" else 1
        self.cfg, self.kind = moe, cfg.ffn
        self.router = weight(rngs, stds["router"], (D, E), ("embed", "choices"), "router", "router")
        self.bias = nnx.Param(jnp.zeros((E,)), axes=("choices",), role="router_state", site="router_bias")
        axes_in, axes_out = ("experts", "embed", "parts", "ffn"), ("experts", "ffn", "embed")
        self.in_ = weight(rngs, stds["expert_in"], (E, D, P, F), axes_in, "expert", "expert_in")
        self.out = weight(rngs, stds["expert_out"], (E, F, D), axes_out, "expert", "expert_out")
        if moe.num_shared:
            shared_stds = stds | {"ffn_in": stds["expert_in"], "ffn_out": stds["expert_out"]}
            self.shared = FeedForward(cfg, shared_stds, rngs, hidden=moe.num_shared * F)

    def __call__(self, x_BxTxD: Array) -> tuple[Array, Stats]:
        with jax.named_scope("moe"):
            with jax.named_scope("router"):
                x = x_BxTxD.astype(jnp.float32)
                logits = jnp.matmul(x, self.router[...], precision=jax.lax.Precision.HIGHEST)
                logits_NxE = logits.reshape(-1, self.cfg.num_experts)
                weights, ids, probs = route(logits_NxE, jax.lax.stop_gradient(self.bias[...]), self.cfg)
                stats = router_stats(logits_NxE, ids, probs)
            out, overflow = self._experts(x_BxTxD, weights, ids)
            stats["overflow"] = overflow
            if self.cfg.num_shared:
                with jax.named_scope("shared"):
                    out = out + self.shared(x_BxTxD)
            return out, stats

    def _experts(self, x_BxTxD: Array, weights_Nxk: Array, ids_Nxk: Array) -> tuple[Array, Array]:
        """The routed experts, each device with its own tokens, experts and part of the hidden units; and the number of
        assignments beyond the capacity of `all_to_all`."""
        dtype = x_BxTxD.dtype
        routing = (a.reshape(*x_BxTxD.shape[:2], -1) for a in (weights_Nxk, ids_Nxk))
        args = (x_BxTxD, *routing, self.in_[...].astype(dtype), self.out[...].astype(dtype))
        run = partial(_on_a_device, moe=self.cfg, kind=self.kind)
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty:
            return run(*args)
        rows, hidden = partition_spec(("batch", "time", "activation")), LOGICAL_AXES["ffn"]
        # Weights come whole but for experts and hidden units: what fsdp splits is gathered here, where it is used.
        specs = (
            *(rows, rows, rows),
            PartitionSpec(LOGICAL_AXES["experts"], None, None, hidden),
            PartitionSpec(LOGICAL_AXES["experts"], hidden, None),
        )
        run = partial(run, shards=mesh.shape[experts.AXIS], sum_over=hidden, count_over=LOGICAL_AXES["batch"])
        return jax.shard_map(run, in_specs=specs, out_specs=(rows, PartitionSpec()), check_vma=False)(*args)


def _on_a_device(
    x_BxTxD: Array,
    weights_BxTxk: Array,
    ids_BxTxk: Array,
    w_in: Array,
    w_out: Array,
    moe: MoEConfig,
    kind: str,
    shards: int = 1,
    sum_over: tuple[str, ...] = (),
    count_over: tuple[str, ...] = (),
) -> tuple[Array, Array]:
    x, weights, ids = (a.reshape(-1, a.shape[-1]) for a in (x_BxTxD, weights_BxTxk, ids_BxTxk))
    args = (x, weights, ids, w_in, w_out, experts.Compute(kind, moe.grouped_matmul))
    mode = experts.chosen(moe, x.shape[0], shards, x.shape[1], x.dtype.itemsize)
    overflow = jnp.zeros((), jnp.int32)
    if mode == "local":
        out = experts.local(*args)
    elif mode == "ring":
        out = experts.ring(*args)
    else:
        out, overflow = experts.all_to_all(*args, experts.capacity_rows(moe, x.shape[0], shards))
    if sum_over:
        out, overflow = jax.lax.psum(out, sum_over), jax.lax.psum(overflow, count_over)
    return out.reshape(x_BxTxD.shape), overflow.astype(jnp.float32)
