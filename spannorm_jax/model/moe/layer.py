"""The Mixture-of-Experts feed-forward: a router, routed experts over the mesh, shared experts.

Shapes: N tokens, E experts, k experts a token, D width, P parts (2 of SwiGLU, else 1), F hidden units of an expert.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec

from spannorm_jax.config import ExecutionConfig, ModelConfig
from spannorm_jax.model.layers import FeedForward, parts
from spannorm_jax.model.moe import experts
from spannorm_jax.model.moe.router import Stats, route, router_stats
from spannorm_jax.model.placement import inner_norms
from spannorm_jax.model.weights import ModelState, gain, weight
from spannorm_jax.parallel.mesh import LOGICAL_AXES, partition_spec


class MoE(nnx.Module):
    """Routed experts, and shared ones that see every token. Returns the branch and the router's sums.

    The inner norm `hidden` is an RMSNorm of each expert's hidden units, with a gain of its own.
    """

    def __init__(self, cfg: ModelConfig, execution: ExecutionConfig):
        moe, D = cfg.moe, cfg.width
        E, F, P = moe.num_experts, moe.expert_dim, parts(cfg.ffn)
        self.cfg, self.execution = cfg, execution
        self.router = weight((D, E), ("embed", "choices"), "router", "router", fan_in=D, fan_out=E)
        if moe.balance == "bias":
            self.bias = ModelState(jnp.zeros(E))
        axes_in, axes_out = ("experts", "parts", "embed", "ffn"), ("experts", "ffn", "embed")
        self.in_ = weight((E, P, D, F), axes_in, "expert", "expert_in", fan_in=D, fan_out=P * F)
        self.out = weight((E, F, D), axes_out, "expert", "expert_out", fan_in=F, fan_out=D)
        if "hidden" in inner_norms(cfg):
            self.hidden_gain = gain((E, F), ("experts", "ffn"), "expert_hidden_norm")
        if moe.num_shared:
            self.shared = FeedForward(cfg, "shared", F, copies=moe.num_shared)

    def __call__(self, x_BxTxD: Array) -> tuple[Array, Stats]:
        with jax.named_scope("moe"):
            weights, ids, stats = self.routing(x_BxTxD)
            out, overflow = self._experts(x_BxTxD, weights, ids)
            stats["overflow"] = overflow
            if hasattr(self, "shared"):
                with jax.named_scope("shared"):
                    out = out + self.shared(x_BxTxD)
            return out, stats

    def routing(self, x_BxTxD: Array) -> tuple[Array, Array, Stats]:
        """Weights (N, k) and ids (N, k) of each token's experts, and the router's sums."""
        with jax.named_scope("router"):
            x = x_BxTxD.astype(jnp.float32)
            logits = jnp.matmul(x, self.router[...], precision=jax.lax.Precision.HIGHEST)
            logits_NxE = logits.reshape(-1, self.cfg.moe.num_experts)
            bias_E = self.bias[...] if hasattr(self, "bias") else None
            weights, ids, probs = route(logits_NxE, bias_E, self.cfg.moe)
            return weights, ids, router_stats(logits_NxE, ids, probs)

    def _experts(self, x_BxTxD: Array, weights_Nxk: Array, ids_Nxk: Array) -> tuple[Array, Array]:
        """The routed experts, each device with its own tokens, experts and part of the hidden units; and the number of
        assignments beyond the capacity of `all_to_all`."""
        dtype, execution = x_BxTxD.dtype, self.execution
        routing = (a.reshape(*x_BxTxD.shape[:2], -1) for a in (weights_Nxk, ids_Nxk))
        how, out_ExFxD = experts.ExpertOps(self.cfg.ffn, execution.grouped_matmul), self.out[...]
        if hasattr(self, "hidden_gain"):  # rows are normed without it: on their way out it is a factor of the matrix
            how, out_ExFxD = replace(how, norm_eps=self.cfg.norm_eps), out_ExFxD * self.hidden_gain[...][..., None]
        args = (x_BxTxD, *routing, self.in_[...].astype(dtype), out_ExFxD.astype(dtype))
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty:
            return _experts_on_one_device(execution, how, 1, *args)
        rows, hidden = partition_spec(("batch", "time", "activation")), LOGICAL_AXES["ffn"]
        # Weights come whole but for experts and hidden units: what fsdp splits is gathered here, where it is used.
        specs = (
            *(rows, rows, rows),
            PartitionSpec(LOGICAL_AXES["experts"], None, None, hidden),
            PartitionSpec(LOGICAL_AXES["experts"], hidden, None),
        )
        run = partial(_experts_on_one_device, execution, replace(how, hidden_axes=hidden), mesh.shape[experts.AXIS])
        return jax.shard_map(run, in_specs=specs, out_specs=(rows, PartitionSpec()), check_vma=False)(*args)


def _experts_on_one_device(
    execution: ExecutionConfig, how: experts.ExpertOps, shards: int, *arrays: Array
) -> tuple[Array, Array]:
    x, weights, ids = (a.reshape(-1, a.shape[-1]) for a in arrays[:3])
    w_in, w_out = arrays[3:]
    args, top_k = (x, weights, ids, w_in, w_out, how), ids.shape[1]
    capacity = experts.capacity_rows(execution.capacity, ids.size, shards)
    mode = execution.expert_parallel
    if mode == "auto" or shards == 1:
        mode = experts.exchange_for(top_k, capacity, x.shape[0], shards, x.shape[1], x.dtype.itemsize)
    overflow = jnp.zeros((), jnp.int32)
    if mode == "local":
        out = experts.local(*args)
    elif mode == "ring":
        out = experts.ring(*args)
    else:
        out, overflow = experts.all_to_all(*args, capacity)
    if how.hidden_axes:
        out, overflow = jax.lax.psum(out, how.hidden_axes), jax.lax.psum(overflow, LOGICAL_AXES["batch"])
    return out.reshape(arrays[0].shape), overflow.astype(jnp.float32)
