"""All that a run is, besides its config."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jax import Array


@partial(jax.tree_util.register_dataclass, data_fields=["step", "params", "opt_state", "router"], meta_fields=[])
@dataclass
class TrainState:
    """All that a run is, besides its config: updates made (int32), weights, optimiser state, router state.

    `router` is {} for all models but those that balance their experts by a bias.
    """

    step: Array
    params: Any
    opt_state: Any
    router: Any
