"""A model before it has weights: its structure, the table of its weights, and what is counted from that.

`define(cfg)` allocates nothing; `ModelDef.init` draws the weights from the table; `ModelDef.bind` puts a pytree of
weights into the modules. Everything outside this package works on the pytree.
"""

import dataclasses
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import unflatten_dict
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from spannorm_jax.config import ExecutionConfig, ModelConfig, moe_layers
from spannorm_jax.model.block import Block
from spannorm_jax.model.branches import warmup_factor
from spannorm_jax.model.decoder import Decoder
from spannorm_jax.model.initialisation import initial_size
from spannorm_jax.model.stack import STACKS
from spannorm_jax.model.trunk import Trunk
from spannorm_jax.model.weights import ROLES, ModelState, WeightSpec
from spannorm_jax.parallel.mesh import LOGICAL_AXES, sharding


@dataclass(frozen=True, eq=False)  # by identity, so that programs can be kept for it
class ModelDef:
    """A model's structure."""

    cfg: ModelConfig
    graph: nnx.GraphDef  # its modules, without arrays
    causal: bool  # whether attention is: FLOPs count what is visible
    weights: dict[str, Any]  # the table of its weights, WeightSpec, nested as its parameters are
    model_state: dict[str, Any]  # shapes of what it keeps besides: biases of routers, blocks' `warmup_factor`; often {}

    def init(self, key: Array) -> dict[str, Any]:
        """Draws the weights, a nested dict of float32 arrays; call it under jit to make them sharded.

        Each weight of each block has a key of its own, by its name and its block's index: it is the
        same whatever the depth, the norms, or the kind of the other blocks.
        """

        def draw(path: tuple[Any, ...], spec: WeightSpec) -> Array:
            return _draw(key, [entry.key for entry in path], spec, initial_size(self.cfg, spec))

        return jax.tree.map_with_path(draw, self.weights)

    def init_model_state(self) -> dict[str, Any]:
        """Biases of zero, and the warm-up's factors in the first update."""
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self.model_state)
        return self.next_model_state(zeros, 1, lambda bias_LxE: bias_LxE)

    def next_model_state(
        self, model_state: dict[str, Any], update: ArrayLike, balanced: Callable[[Array], Array]
    ) -> dict[str, Any]:
        """The state that an update (from 1) is made with: `balanced` of each router's bias, (blocks, E)."""
        layers = stack_layers(self.cfg)

        def of(path: tuple[Any, ...], old: Array) -> Array:
            stack, *_, name = [entry.key for entry in path]
            if name == "warmup_factor":
                return warmup_factor(self.cfg, update, np.array(layers[stack]))
            return balanced(old)

        return jax.tree.map_with_path(of, model_state)

    def bind(self, params: dict[str, Any], model_state: dict[str, Any] | None = None) -> Any:
        """The modules with these weights and this state, which most models lack."""
        return nnx.merge(self.graph, params, model_state or {})

    def map_weights(self, fn: Any, *rest: Any) -> Any:
        """`jax.tree.map` over the table, each WeightSpec a leaf."""
        return jax.tree.map(fn, self.weights, *rest)

    def specs(self) -> list[WeightSpec]:
        return jax.tree.leaves(self.weights)


def _draw(key: Array, path: list[str], spec: WeightSpec, size: float | np.ndarray) -> Array:
    """Gains are `size`, other weights are drawn from N(0, size^2); `size` may differ by layer, (L,)."""
    per_layer = np.reshape(size, (-1, *(1,) * (len(spec.shape) - 1))).astype(np.float32)
    if spec.start is not None:
        return jnp.broadcast_to(per_layer, spec.shape)
    name = "/".join(part for part in path if part not in STACKS.values())
    key = jax.random.fold_in(key, zlib.crc32(name.encode()))
    if not spec.layers:
        return _drawn(key, spec.shape, spec.axes) * per_layer
    keys = jax.vmap(lambda layer: jax.random.fold_in(key, layer))(jnp.array(spec.layers))
    return jax.vmap(lambda key: _drawn(key, spec.shape[1:], spec.axes[1:]))(keys) * per_layer


def _drawn(key: Array, shape: tuple[int, ...], axes: tuple[str, ...]) -> Array:
    """Standard normal numbers, drawn as if `parts` came after the inputs: in that order all records were made."""
    if "parts" not in axes:
        return jax.random.normal(key, shape, jnp.float32)
    part = axes.index("parts")
    drawn = (*shape[:part], shape[part + 1], shape[part], *shape[part + 2 :])
    return jax.random.normal(key, drawn, jnp.float32).swapaxes(part, part + 1)


Modules = Callable[[ModelConfig, ExecutionConfig], Trunk]  # a trunk and its ends


def define(cfg: ModelConfig, execution: ExecutionConfig | None = None, modules: Modules = Decoder) -> ModelDef:
    """The structure of a resolved config's model; allocates nothing, and `execution` changes no number of it.

    Raises ValueError for a weight that was declared with an unknown role or logical axis.
    """
    layers = stack_layers(cfg)
    # The modules declare one block of each kind; the tables stack as many as there are.
    declared = nnx.eval_shape(lambda: modules(cfg, execution or ExecutionConfig()))
    graph, params, model_state = cast(
        tuple[nnx.GraphDef, nnx.State, nnx.State], nnx.split(declared, nnx.Param, ModelState)
    )

    def spec_of(path: tuple[Any, ...], param: nnx.Variable) -> WeightSpec:
        spec = param.get_metadata()["spec"]
        unknown = [axis for axis in spec.axes if axis not in LOGICAL_AXES]
        if unknown or spec.role not in ROLES:
            raise ValueError(f"weight {path}: unknown axes {unknown} or role {spec.role!r}")
        own = layers.get(path[0], ())
        if not own:
            return spec
        return dataclasses.replace(spec, shape=(len(own), *spec.shape), axes=("layers", *spec.axes), layers=own)

    def stacked(path: tuple[Any, ...], state: nnx.Variable) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((len(layers[path[0]]), *state.shape), state.dtype)

    return ModelDef(cfg, graph, declared.causal, _nested(params, spec_of), _nested(model_state, stacked))


def make_block(cfg: ModelConfig, layer: int, key: Array, causal: bool = True) -> Block:
    """Block `layer` (from 0) of a resolved config's model by itself, its weights drawn: a module for models of others.

    They are the weights that `ModelDef.init` gives that block with this key. `block.whole(stream, layer, angles)`
    returns the stream after it, nothing, and what its router did; angles are `rotary_angles`, or None for no positions.
    A branch warm-up is over.
    """
    moe = moe_layers(cfg)[layer]
    block = Block(cfg, ExecutionConfig(), moe, causal)

    def draw(path: tuple[Any, ...], spec: WeightSpec) -> Array:
        own = dataclasses.replace(spec, shape=(1, *spec.shape[1:]), layers=(layer,))
        return _draw(key, [entry.key for entry in path], own, initial_size(cfg, own))[0]

    drawn = jax.tree.map_with_path(draw, define(cfg).weights[STACKS[moe]])
    nnx.update(block, drawn)
    if cfg.branch_warmup_steps:
        block.warmup_factor[...] = jnp.ones(())
    return block


def stack_layers(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The blocks of each stack, from 0."""
    kinds = moe_layers(cfg)
    return {name: tuple(i for i, kind in enumerate(kinds) if kind == moe) for moe, name in STACKS.items()}


def _nested(state: nnx.State, fn: Any) -> dict[str, Any]:
    """A nested dict of fn(path, variable)."""
    return unflatten_dict({path: fn(path, variable) for path, variable in nnx.to_flat_state(state)})


def abstract_params(model: ModelDef, mesh: Mesh) -> Any:
    """The parameters' shapes, float32, with their shardings on a mesh, as ShapeDtypeStructs."""
    return model.map_weights(
        lambda spec: jax.ShapeDtypeStruct(spec.shape, jnp.float32, sharding=sharding(mesh, spec.axes))
    )


def abstract_model_state(model: ModelDef, mesh: Mesh) -> Any:
    """The model state's shapes, replicated over a mesh, as ShapeDtypeStructs."""
    replicated = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), model.model_state)


def count_params(model: ModelDef, active: bool = False) -> int:
    """Weights; with `active`, those that a token meets: of routed experts, top_k."""
    return sum(_count(model, spec, active) for spec in model.specs())


def _count(model: ModelDef, spec: WeightSpec, active: bool) -> int:
    n = math.prod(spec.shape)
    moe = model.cfg.moe
    return n // moe.num_experts * moe.top_k if active and spec.role == "expert" else n


def flops_per_token(model: ModelDef, seq_len: int) -> int:
    """Training FLOPs (forward and backward) a token: 6 an active matmul weight, plus attention's.

    Those are 6 L H K T if it is causal, else twice as many.

    Remat's recomputation is not counted (as for MFU, Chowdhery et al. 2022, arXiv 2204.02311, appendix B).
    """
    roles = ("hidden", "output", "expert", "router")
    matmul = sum(_count(model, spec, active=True) for spec in model.specs() if spec.role in roles)
    return 6 * matmul + (6 if model.causal else 12) * model.cfg.depth * model.cfg.width * seq_len
