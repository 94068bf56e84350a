"""The numbers of a train step: options that change no shape, as one argument of the compiled program."""

from dataclasses import dataclass
from functools import partial

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh

from spannorm_jax.config import Config, flatten
from spannorm_jax.parallel.mesh import sharding
from spannorm_jax.training.program_key import NUMBERS

Number = Array | np.number  # on devices, and on the host

# Those that are no number by themselves: counts of updates are made of them, and the decay over the rate.
_PARTS = ("training.steps", "training.tokens", "optim.warmup_fraction", "optim.decay_fraction", "optim.decay_coupling")
_NAMES = {key.rpartition(".")[2]: key for key in NUMBERS if key not in _PARTS}
if len(_NAMES) + len(_PARTS) != len(NUMBERS):
    raise ValueError(f"two numbers of a step have one name: {NUMBERS}")


@partial(jax.tree_util.register_dataclass, data_fields=["values"], meta_fields=[])
@dataclass(frozen=True)
class Numbers:
    """Attributes by the last part of an option's key, of every option with `number=True`: 0-d arrays, or (K,) of K
    lanes, float32. But for `warmup_updates`, `stable_updates` and `decay_updates`, int32, which training.steps,
    optim.warmup_fraction and optim.decay_fraction make, and which add up to the updates of the run.

    `weight_decay` is over `lr` where optim.decay_coupling=independent; `clip_norm` is infinite where the option is 0.
    A step reads numbers from here and never from a config: so a sweep over them compiles once.
    """

    values: dict[str, Number]

    def __getattr__(self, name: str) -> Number:
        if name == "values" or name not in self.values:  # a copy has no values yet
            raise AttributeError(f"{name} is no number of a step")
        return self.values[name]


def numbers_of(config: Config) -> Numbers:
    """Those of a resolved config, on the host."""
    optim, steps, options = config.optim, config.training.steps, flatten(config)
    warmup = round(optim.warmup_fraction * steps)
    decay = steps - warmup
    if optim.schedule == "wsd":
        decay = min(round(optim.decay_fraction * steps), decay)  # both may have been rounded up
    values = {name: options[key] for name, key in _NAMES.items()}
    values["clip_norm"] = optim.clip_norm or np.inf  # 0: nothing is clipped
    if optim.decay_coupling == "independent":
        # An update shrinks weights by the rate times this: over the peak rate, by the schedule's shape alone.
        values["weight_decay"] = optim.weight_decay / optim.lr
    counts = {"warmup_updates": warmup, "stable_updates": steps - warmup - decay, "decay_updates": decay}
    numbers: dict[str, Number] = {name: np.float32(value) for name, value in values.items()}
    return Numbers(numbers | {name: np.int32(count) for name, count in counts.items()})


def on_devices(numbers: Numbers, mesh: Mesh, axes: tuple[str, ...] = ()) -> Numbers:
    """Those of the host on the devices of a mesh. (`jax.device_put` would have its processes wait for one another.)"""
    where = sharding(mesh, axes)
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, where, np.asarray(x).__getitem__), numbers)
