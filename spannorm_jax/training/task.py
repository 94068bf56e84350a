"""A task: what a run is trained on and judged by, behind one value."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh

from spannorm_jax.config import Config
from spannorm_jax.model.definition import ModelDef
from spannorm_jax.parallel.mesh import sharding

Batch = dict[str, Array]
Rows = dict[str, np.ndarray]  # of a batch, on the host
LossSums = Callable[..., dict[str, Any]]  # of a model with weights (`ModelDef.bind`), a batch and, if any, z_loss
SUMMED = ("nll", "correct", "count")  # what held-out batches add up of the loss sums


@dataclass(frozen=True)
class Field:
    """An array of a batch: its shape, its type and its logical axes, of which the first is `batch`."""

    shape: tuple[int, ...]
    dtype: str
    axes: tuple[str, ...]


Fields = dict[str, Field]


@dataclass(frozen=True)
class Task:
    """What a run is trained on and judged by; the loop, the step, lanes and records know nothing else of it.

    `config` is resolved everywhere but in `open`; `data` is what `open` returns.

    Attributes:
      open: config -> (data, the config resolved against them and the platform). Raises UserError if they are not those
        asked for.
      check: (config, data) raises UserError if they leave nothing to judge by, though only evaluation may ask for it.
      define: config -> the model's structure.
      positions: config -> T, what a row has for attention; FLOPs count these.
      counted: config -> what metrics count, and how many of it a row has: `tokens`, or `images`, of which it is one.
      train_fields, eval_fields: config -> the arrays of a batch of training, and of a held-out one.
      rows: (config, data) -> (step, start, stop) -> rows of a step's batch, a pure function of seed and step.
      inputs: batch -> what the model's `run` takes.
      targets: batch -> what its logits are to predict.
      sample: (a split of data, T, B, flag) -> a batch of B rows of length T, spread evenly over the split. Raises
        UserError, which names the flag, if there are not so many.
      loss_sums: (config, the mesh's shape, rows that pass at once) -> `LossSums`: sums over what counts, `nll` (nats),
        `log_z`, `z` (its square), `correct` and `count`; `objective`, which is nll + z_loss z and alone has a gradient;
        of a model with experts also `router`, what its routers did.
      held_out: (config, data) -> each held-out batch in turn, and counts of its own (`bytes`), always the same.
      measures: the totals of SUMMED and of the counts -> what evaluation reports, by name.
      logged: those of the measures that training logs, as held_out_NAME.
      facts: data -> what a record says of them; reports read `unigram_entropy`, nats, the least loss without inputs.
      files: data -> what a run's folder keeps of them for evaluation, name -> text.
      announced: (config, data) -> the line that says what is trained on.
      warn: (config, data) says what speaks against a held-out measure.
      floors: (config, data, measures) -> losses that need no network, on the same predictions, by name, and what
        else these reach (`linear_accuracy`); {} if there are too many.
      summary: what an evaluation found (its line of eval.jsonl) -> the line that is printed of it.
    """

    open: Callable[[Config], tuple[Any, Config]]
    check: Callable[[Config, Any], None]
    define: Callable[[Config], ModelDef]
    positions: Callable[[Config], int]
    counted: Callable[[Config], tuple[str, int]]
    train_fields: Callable[[Config], Fields]
    eval_fields: Callable[[Config], Fields]
    rows: Callable[[Config, Any], Callable[[int, int, int], Rows]]
    inputs: Callable[[Batch], Array]
    targets: Callable[[Batch], Array]
    sample: Callable[[Any, int, int, str], Rows]
    loss_sums: Callable[[Config, dict[str, int], int], LossSums]
    held_out: Callable[[Config, Any], Iterator[tuple[Rows, dict[str, int]]]]
    measures: Callable[[dict[str, float]], dict[str, float]]
    logged: tuple[str, ...]
    facts: Callable[[Any], dict[str, Any]]
    files: Callable[[Any], dict[str, str]]
    announced: Callable[[Config, Any], str]
    warn: Callable[[Config, Any], None]
    floors: Callable[[Config, Any, dict[str, float]], dict[str, float]]
    summary: Callable[[dict[str, Any]], str]


def abstract_batch(fields: Fields, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays of a batch with their shardings."""
    return {
        name: jax.ShapeDtypeStruct(field.shape, field.dtype, sharding=sharding(mesh, field.axes))
        for name, field in fields.items()
    }


def microbatches(batch: Batch, k: int) -> Batch:
    """(B, ...) -> (k, B / k, ...). Microbatch i takes rows i, i + k, ...: rows stay on the device that holds them."""
    return jax.tree.map(lambda x: x.reshape(x.shape[0] // k, k, *x.shape[1:]).swapaxes(0, 1), batch)
