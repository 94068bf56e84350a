"""A model before it has weights: its structure, the table of its weights, and what is counted from that.

`define(cfg)` allocates nothing; `ModelDef.init` draws the weights; `ModelDef.bind` puts a pytree of weights back into
the modules. Everything outside this package works on the pytree.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from spannorm_jax.config import ModelConfig
from spannorm_jax.model.decoder import Decoder
from spannorm_jax.model.weights import ROLES, WeightSpec
from spannorm_jax.parallel.mesh import LOGICAL_AXES, sharding


@dataclass(frozen=True)
class ModelDef:
    """A model's structure: `weights` is the table of its weights, shaped like its parameter pytree."""

    cfg: ModelConfig
    graph: nnx.GraphDef
    weights: dict[str, Any]

    def init(self, key: Array) -> dict[str, Any]:
        """Draws the weights, a nested dict of float32 arrays; call it under jit to make them sharded."""
        return nnx.to_pure_dict(nnx.state(Decoder(self.cfg, nnx.Rngs(params=key)), nnx.Param))

    def bind(self, params: dict[str, Any]) -> Decoder:
        return nnx.merge(self.graph, params)

    def map_weights(self, fn: Any, *rest: Any) -> Any:
        """`jax.tree.map` over the table, each WeightSpec a leaf."""
        return jax.tree.map(fn, self.weights, *rest, is_leaf=lambda x: isinstance(x, WeightSpec))

    def specs(self) -> list[WeightSpec]:
        return jax.tree.leaves(self.weights, is_leaf=lambda x: isinstance(x, WeightSpec))


def define(cfg: ModelConfig) -> ModelDef:
    """The structure of the model of a resolved config (no zeros or 'auto' left), allocating nothing.

    Raises:
      ValueError: a weight was declared with an unknown role or logical axis.
    """
    abstract = nnx.eval_shape(lambda: Decoder(cfg, nnx.Rngs(params=0)))
    graph, state = nnx.split(abstract)
    table: dict[str, Any] = {}
    for path, param in nnx.to_flat_state(state):
        meta = param.get_metadata()
        # Stacking by nnx.vmap adds a leading layer axis that the declaration does not name.
        axes = ("layers",) * (len(param.shape) - len(meta["axes"])) + meta["axes"]
        unknown = [axis for axis in axes if axis not in LOGICAL_AXES]
        if unknown or meta["role"] not in ROLES:
            raise ValueError(f"weight {path}: unknown axes {unknown} or role {meta['role']!r}")
        node = table
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = WeightSpec(param.shape, axes, meta["role"], meta["site"])
    return ModelDef(cfg, graph, table)


def abstract_params(model: ModelDef, mesh: Mesh) -> Any:
    """The parameters' shapes, float32, with their shardings on a mesh, as ShapeDtypeStructs."""
    return model.map_weights(
        lambda spec: jax.ShapeDtypeStruct(spec.shape, jnp.float32, sharding=sharding(mesh, spec.axes))
    )


def count_params(model: ModelDef, active: bool = False) -> int:
    """Weights; with `active`, those that a token meets: of routed experts, top_k."""
    return sum(_count(model, spec, active) for spec in model.specs() if spec.role != "router_state")


def _count(model: ModelDef, spec: WeightSpec, active: bool) -> int:
    n = math.prod(spec.shape)
    moe = model.cfg.moe
    return n // moe.num_experts * moe.top_k if active and spec.role == "expert" else n


def flops_per_token(model: ModelDef, seq_len: int) -> int:
    """Training FLOPs (forward and backward) a token: 6 an active matmul weight, plus causal attention's 6 L H K T.

    A lookup in an untied embedding costs none; recomputation by remat is not counted (as for MFU,
    Chowdhery et al. 2022, arXiv 2204.02311, appendix B).
    """
    roles = ("hidden", "output", "expert", "router")
    matmul = sum(_count(model, spec, active=True) for spec in model.specs() if spec.role in roles)
    return 6 * matmul + 6 * model.cfg.depth * model.cfg.width * seq_len
