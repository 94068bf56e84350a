"""The compiled programs of a config, made from shapes alone: a mesh's devices need not be here."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from spannorm_jax.config import Config
from spannorm_jax.inference.sampling import as_computed, choose, decode, prefill
from spannorm_jax.model.definition import abstract_model_state, abstract_params
from spannorm_jax.parallel.mesh import LANE, batch_shards, make_mesh
from spannorm_jax.training.lanes import LaneProgram
from spannorm_jax.training.numbers import numbers_of
from spannorm_jax.training.step import make_program
from spannorm_jax.training.task import abstract_batch
from spannorm_jax.training.tasks import task_of

SAMPLED_ROWS = 8  # texts that `sample` continues side by side
Programs = Iterator[tuple[str, Callable[[], jax.stages.Compiled]]]


def compile_programs(kind: str, config: Config, devices: list[Any], num_lanes: int = 1) -> Programs:
    """Names of the programs of a kind, each with what compiles it; `config` is resolved.

    A kind is train, evaluate, signal, sample or lanes.
    `sample` is two: `prefill` reads prompts of an eighth of data.seq_len, `decode` makes one token of each row.

    Raises:
      UserError: the mesh does not fit the devices.
    """
    mesh = make_mesh(config.mesh, devices, num_lanes if kind == "lanes" else 1)
    with jax.set_mesh(mesh):
        if kind == "sample":
            yield from _sample(config, mesh)
        elif kind == "lanes":
            yield from _lanes(config, mesh, num_lanes)
        else:
            yield from _steps(kind, config, mesh)


def _steps(kind: str, config: Config, mesh: Mesh) -> Programs:
    task = task_of(config)
    program = make_program(config, task.define(config), mesh)
    weights = program.abstract_state.params, program.abstract_state.model_state
    if kind == "train":
        lowered = program.train.lower(program.abstract_state, program.abstract_batch, numbers_of(config))
    elif kind == "signal":
        lowered = program.signal.lower(*weights, program.abstract_batch)
    else:
        lowered = program.evaluate.lower(*weights, abstract_batch(task.eval_fields(config), mesh))
    yield kind, lowered.compile


def _lanes(config: Config, mesh: Mesh, num_lanes: int) -> Programs:
    model = task_of(config).define(config)
    program = make_program(config, model, mesh)
    laned = LaneProgram(config, model, program, num_lanes)
    by_lane = NamedSharding(mesh, PartitionSpec(LANE))
    numbers = jax.tree.map(
        lambda _: jax.ShapeDtypeStruct((num_lanes,), jnp.float32, sharding=by_lane), numbers_of(config)
    )
    state = jax.eval_shape(
        lambda state: jax.tree.map(lambda x: jnp.stack([x] * num_lanes), state), program.abstract_state
    )
    yield f"{num_lanes} lanes", laned.train.lower(state, laned.abstract_batch, numbers).compile


def _sample(config: Config, mesh: Mesh) -> Programs:
    model = task_of(config).define(config)
    params = abstract_params(model, mesh)
    cast = jax.eval_shape(partial(as_computed, model), params)
    params = jax.tree.map(lambda x, p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=p.sharding), cast, params)
    weights = params, abstract_model_state(model, mesh)
    pick = partial(choose, temperature=1.0, top_k=0, vocab_size=config.model.vocab_size)
    shards = batch_shards(dict(mesh.shape))
    B, T = -(-SAMPLED_ROWS // shards) * shards, config.data.seq_len
    whole = NamedSharding(mesh, PartitionSpec())
    tokens, lengths, seed = (
        jax.ShapeDtypeStruct(shape, jnp.int32, sharding=whole) for shape in ((B, max(1, T // 8)), (B,), ())
    )
    compiled: Any = jax.jit(partial(prefill, model, pick, T)).lower(*weights, tokens, lengths, seed).compile()
    yield "prefill", lambda: compiled
    rows = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), compiled.out_info, compiled.output_shardings
    )
    yield "decode", jax.jit(partial(decode, model, pick), donate_argnums=2).lower(*weights, rows).compile
