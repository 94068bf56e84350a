"""The Mixture-of-Experts feed-forward: a router, routed experts over the mesh, shared experts.

Shapes: N tokens, E experts, k experts a token, D width, P parts (2 of SwiGLU, 1 of GELU), F hidden units of an expert.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec

from spannorm_jax.config import ModelConfig, MoEConfig
from spannorm_jax.model.layers import FeedForward
from spannorm_jax.model.moe import experts
from spannorm_jax.model.moe.router import Stats, route, router_stats
from spannorm_jax.model.weights import weight
from spannorm_jax.parallel.mesh import LOGICAL_AXES, partition_spec


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
        run = partial(_experts_on_one_device, moe=self.cfg, kind=self.kind)
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


def _experts_on_one_device(
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
    args = (x, weights, ids, w_in, w_out, experts.ExpertOps(kind, moe.grouped_matmul))
    mode = experts.exchange_for(moe, x.shape[0], shards, x.shape[1], x.dtype.itemsize)
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
