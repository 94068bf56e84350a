"""The numbers of a train step: options that change no shape, as one argument of the compiled program."""

from typing import NamedTuple

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh

from spannorm_jax.config import Config
from spannorm_jax.parallel.mesh import sharding

Number = Array | np.number  # on devices, and on the host


class Numbers(NamedTuple):
    """0-d arrays, or (K,) of K lanes, float32 but for the counts of updates, which are int32; each is an option of its
    name, if no other is named. The three counts add up to the updates of the run.

    A step reads them from here and never from a config: so a sweep over them compiles once.
    """

    lr: Number
    warmup_updates: Number  # training.steps, optim.warmup_fraction
    stable_updates: Number  # what the other two leave
    decay_updates: Number  # training.steps, optim.decay_fraction
    final_lr_fraction: Number
    b1: Number
    b2: Number
    muon_momentum: Number
    eps: Number
    weight_decay: Number  # over lr, where optim.decay_coupling=independent
    clip_norm: Number  # infinite where the option is 0: nothing is clipped
    z_loss: Number
    aux_loss: Number
    router_z_loss: Number
    bias_rate: Number


def numbers_of(config: Config) -> Numbers:
    """Those of a resolved config, on the host."""
    optim, moe, steps = config.optim, config.model.moe, config.training.steps
    warmup = round(optim.warmup_fraction * steps)
    decay = steps - warmup
    if optim.schedule == "wsd":
        decay = min(round(optim.decay_fraction * steps), decay)  # both may have been rounded up
    return Numbers(
        lr=np.float32(optim.lr),
        warmup_updates=np.int32(warmup),
        stable_updates=np.int32(steps - warmup - decay),
        decay_updates=np.int32(decay),
        final_lr_fraction=np.float32(optim.final_lr_fraction),
        b1=np.float32(optim.b1),
        b2=np.float32(optim.b2),
        muon_momentum=np.float32(optim.muon_momentum),
        eps=np.float32(optim.eps),
        # An update shrinks weights by the rate times this: over the peak rate, by the schedule's shape alone.
        weight_decay=np.float32(optim.weight_decay / (optim.lr if optim.decay_coupling == "independent" else 1)),
        clip_norm=np.float32(optim.clip_norm or np.inf),
        z_loss=np.float32(config.training.z_loss),
        aux_loss=np.float32(moe.aux_loss),
        router_z_loss=np.float32(moe.router_z_loss),
        bias_rate=np.float32(moe.bias_rate),
    )


def on_devices(numbers: Numbers, mesh: Mesh, axes: tuple[str, ...] = ()) -> Numbers:
    """Those of the host on the devices of a mesh. (`jax.device_put` would have its processes wait for one another.)"""
    where = sharding(mesh, axes)
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, where, np.asarray(x).__getitem__), numbers)
