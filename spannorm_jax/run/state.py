"""All that a run is, besides its config."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jax import Array


@partial(jax.tree_util.register_dataclass, data_fields=["step", "params", "opt_state", "model_state"], meta_fields=[])
@dataclass
class TrainState:
    """All that a run is, besides its config: updates made (int32), weights, optimiser state, model state.

    `model_state` is what the model keeps besides weights (`ModelDef.model_state`), for the update that comes next; {}
    for most models.
    """

    step: Array
    params: Any
    opt_state: Any
    model_state: Any
