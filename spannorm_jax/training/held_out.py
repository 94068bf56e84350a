"""A model judged on a fixed part of the held-out split, for evaluation and within training."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from spannorm_jax.config import Config
from spannorm_jax.training.task import SUMMED, Batch, abstract_batch
from spannorm_jax.training.tasks import task_of


def held_out(
    config: Config,
    mesh: Mesh,
    evaluate: Callable[[Any, Any, Batch], dict[str, Any]],
    data: Any,
    params: Any,
    model_state: Any,
) -> dict[str, float]:
    """The task's measures over that part of the split.

    `evaluate` is what `training.step.make_evaluate` returns for the same config and mesh.

    Raises:
      UserError: there is nothing to judge by.
    """
    task = task_of(config)
    task.check(config, data)
    fields = abstract_batch(task.eval_fields(config), mesh)
    totals: dict[str, float] = defaultdict(float)
    for rows, counts in task.held_out(config, data):
        batch: Batch = {  # each process the rows of its own devices
            name: jax.make_array_from_callback(field.shape, field.sharding, rows[name].__getitem__)
            for name, field in fields.items()
        }
        sums = jax.device_get(evaluate(params, model_state, batch))
        for name, value in ({name: float(sums[name]) for name in SUMMED} | counts).items():
            totals[name] += value
    return task.measures(totals)
