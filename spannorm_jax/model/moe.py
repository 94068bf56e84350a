"""Mixture-of-Experts feed-forward: a float32 router, top-k experts a token, no token ever dropped.

Shapes: N tokens, E experts, k experts a token, M = N k assignments, D width, P parts (2 of SwiGLU, 1 of GELU), F
hidden units of an expert. The router follows Shazeer et al. 2017 (arXiv 1701.06538) and, with sigmoid scores and a
selection bias, DeepSeek-V3 (arXiv 2412.19437, section 2.1.2).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec

from spannorm_jax.config import ModelConfig, MoEConfig
from spannorm_jax.model.grouped_matmul import grouped_matmul
from spannorm_jax.model.layers import FeedForward, activation, weight
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

    The bias takes part in the selection alone. With `renormalize` the chosen weights sum to one.
    """
    if moe.scores == "softmax":
        scores = probs = jax.nn.softmax(logits_NxE, axis=-1)
    else:
        scores = jax.nn.sigmoid(logits_NxE)
        probs = scores / jnp.sum(scores, axis=-1, keepdims=True)
    _, ids = jax.lax.top_k(jax.lax.stop_gradient(scores + bias_E), moe.top_k)
    weights = jnp.take_along_axis(scores, ids, axis=-1)
    if moe.renormalize:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return weights, ids, probs


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


@jax.custom_vjp
def _permute(x_MxD: Array, order_M: Array, inverse_M: Array) -> Array:
    """Rows in another order; backward is the inverse permutation, which needs no scatter."""
    return x_MxD[order_M]


_permute.defvjp(
    lambda x, order, inverse: (x[order], (order, inverse)),
    lambda residuals, g: (g[residuals[1]], None, None),
)


def expert_outputs(
    x_NxD: Array, weights_Nxk: Array, ids_Nxk: Array, in_ExDxPxF: Array, out_ExFxD: Array, kind: str, matmul: str
) -> Array:
    """Each token's experts, weighted and summed in float32: (N, D) in x's dtype. Memory is O(N k (D + P F))."""
    N, k = ids_Nxk.shape
    E, D, P, F = in_ExDxPxF.shape
    with jax.named_scope("dispatch"):
        expert_M = ids_Nxk.reshape(-1)
        order = jnp.argsort(expert_M)
        inverse = jnp.argsort(order)
        sizes_E = jnp.bincount(expert_M, length=E).astype(jnp.int32)
        rows_MxD = _permute(jnp.repeat(x_NxD, k, axis=0), order, inverse)
    with jax.named_scope("experts"):
        hidden = grouped_matmul(rows_MxD, in_ExDxPxF.reshape(E, D, P * F), sizes_E, matmul).reshape(N * k, P, F)
        out_MxD = grouped_matmul(activation(hidden, kind), out_ExFxD, sizes_E, matmul)
    with jax.named_scope("combine"):
        out_NxkxD = _permute(out_MxD, inverse, order).reshape(N, k, D).astype(jnp.float32)
        return jnp.sum(out_NxkxD * weights_Nxk[..., None], axis=1).astype(x_NxD.dtype)


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
            out = self._experts(x_BxTxD, weights, ids)
            if self.cfg.num_shared:
                with jax.named_scope("shared"):
                    out = out + self.shared(x_BxTxD)
            return out, stats

    def _experts(self, x_BxTxD: Array, weights_Nxk: Array, ids_Nxk: Array) -> Array:
        """The routed experts, each device on its own tokens and its part of the hidden units."""
        routing = (a.reshape(*x_BxTxD.shape[:2], -1) for a in (weights_Nxk, ids_Nxk))
        run = partial(_on_a_device, kind=self.kind, matmul=self.cfg.grouped_matmul)
        if not jax.sharding.get_abstract_mesh().empty:
            rows = partition_spec(("batch", "time", "activation"))
            hidden = LOGICAL_AXES["ffn"]
            # Weights come whole but for the hidden units: what fsdp splits is gathered here, where it is used.
            specs = (rows, rows, rows, PartitionSpec(None, None, None, hidden), PartitionSpec(None, hidden, None))
            run = jax.shard_map(partial(run, sum_over=hidden), in_specs=specs, out_specs=rows, check_vma=False)
        dtype = x_BxTxD.dtype
        return run(x_BxTxD, *routing, self.in_[...].astype(dtype), self.out[...].astype(dtype))


def _on_a_device(
    x: Array, weights: Array, ids: Array, w_in: Array, w_out: Array, kind: str, matmul: str, sum_over: Any = None
) -> Array:
    flat = (a.reshape(-1, a.shape[-1]) for a in (x, weights, ids))
    out = expert_outputs(*flat, w_in, w_out, kind, matmul).reshape(x.shape)
    return out if sum_over is None else jax.lax.psum(out, sum_over)
