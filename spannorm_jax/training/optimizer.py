"""Schedules, and optimisers by name: each after clipping by the global norm, with decay and rates by weight.

Options that change no shape come as `Numbers`. Only options that change the compiled program are read from a config.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import NamedSharding

from spannorm_jax.config import ModelConfig, OptimConfig
from spannorm_jax.model.definition import ModelDef
from spannorm_jax.model.initialisation import with_experts
from spannorm_jax.model.parametrisation import Multipliers, multipliers
from spannorm_jax.model.placement import EVERY_GAIN
from spannorm_jax.model.weights import WeightSpec
from spannorm_jax.training.muon import muon, muon_multipliers
from spannorm_jax.training.numbers import Numbers

DECAYED_ROLES = ("hidden", "output", "expert")


def learning_rate(schedule: str, numbers: Numbers, update: Array | int) -> Array:
    """Learning rate of update 1..steps: linear warm-up that reaches the peak, then a decay to the final rate.

    `cosine` decays at once; `wsd` stays at the peak and decays linearly over the last updates (Hu et al. 2024,
    arXiv 2404.06395; linear after Hägele et al. 2024, arXiv 2405.18392).
    """
    warmup, stable, decay = numbers.warmup_updates, numbers.stable_updates, numbers.decay_updates
    # Without a warm-up or a decay the share is divided by 1, and no update of the run reads it but as 0.
    warm = update / jnp.maximum(warmup, 1)
    done = jnp.clip((update - warmup - stable) / jnp.maximum(decay, 1), 0, 1)
    left = (1 + jnp.cos(jnp.pi * done)) / 2 if schedule == "cosine" else 1 - done
    # Written so that it is exactly 1 at the peak and exactly the final fraction at the end.
    decayed = left + numbers.final_lr_fraction * (1 - left)
    return numbers.lr * jnp.where(update < warmup, warm, decayed)


@dataclass(frozen=True)
class Optimizer:
    """An optimiser by name.

    Attributes:
      direction: (model, numbers) -> transformations of the gradient into what decay is added to,
        before it is multiplied by minus the learning rate. The form of their state depends on no number.
      multipliers: (model's config, WeightSpec) -> what the parametrisation makes of rate, decay and eps.
    """

    direction: Callable[[ModelDef, Numbers], list[optax.GradientTransformation]]
    multipliers: Callable[[ModelConfig, WeightSpec], Multipliers] = multipliers


def adamw(model: ModelDef, numbers: Numbers) -> list[optax.GradientTransformation]:
    return [optax.scale_by_adam(b1=numbers.b1, b2=numbers.b2, eps=numbers.eps)]


def lion(model: ModelDef, numbers: Numbers) -> list[optax.GradientTransformation]:
    """Chen et al. 2023 (arXiv 2302.06675): the sign of a mean of moment and gradient. It reads no eps."""
    return [optax.scale_by_lion(b1=numbers.b1, b2=numbers.b2)]


OPTIMIZERS = {"adamw": Optimizer(adamw), "lion": Optimizer(lion), "muon": Optimizer(muon, muon_multipliers)}


def make_optimizer(optim: OptimConfig, model: ModelDef, numbers: Numbers) -> optax.GradientTransformation:
    """Clipping, the optimiser's direction, decay, the learning rate.

    Of `optim` it reads `name`, `schedule`, `decay_gains` and `hold_norms`. `numbers` may be traced; the state's form
    depends on none of them. Where all multipliers of the weights are 1, as in the standard parametrisation, they add
    no operation.
    """
    made = OPTIMIZERS[optim.name]
    weights = model.map_weights(lambda spec: made.multipliers(model.cfg, spec))

    def each(fn: Callable[[Multipliers], float]) -> Any:
        return jax.tree.map(fn, weights)

    def rate(count: Array) -> Array:
        return learning_rate(optim.schedule, numbers, count + 1)  # optax counts from 0, updates from 1

    decays = model.map_weights(lambda spec: _decays(spec, optim.decay_gains))
    return optax.chain(
        optax.clip_by_global_norm(numbers.clip_norm),
        optax.chain(
            # Adam with gradients / c and eps is Adam with eps x c: m / c / (sqrt(v) / c + eps).
            *_times(each(lambda of: 1 / of.eps)),
            *made.direction(model, numbers),
            _decay(numbers.weight_decay, decays, each(lambda of: of.decay)),
            *_times(each(lambda of: of.lr)),
            optax.scale_by_learning_rate(rate),
            *_holding(model, with_experts(optim.hold_norms)),
        ),
    )


def _holding(model: ModelDef, sites: Collection[str]) -> list[optax.GradientTransformation]:
    """Scales the updated weights of these sites, layer by layer, to the norm that they had; nothing without sites."""
    if not sites:
        return []
    held = model.map_weights(lambda spec: spec.site in sites)

    def hold(update: Array, weight: Array, held: bool) -> Array:
        if not held:
            return update
        new = weight + update
        norm, new_norm = (jnp.sqrt(jnp.sum(w**2, tuple(range(1, w.ndim)), keepdims=True)) for w in (weight, new))
        return new * (norm / new_norm) - weight

    return [optax.stateless(lambda updates, params: jax.tree.map(hold, updates, params, held))]


def _decays(spec: WeightSpec, gains: tuple[str, ...]) -> bool:
    return spec.role in DECAYED_ROLES or (spec.role == "norm" and (spec.site in gains or EVERY_GAIN in gains))


def _decay(weight_decay: Any, decays: Any, factors: Any) -> optax.GradientTransformation:
    """Adds weight_decay times each weight's factor times the weight, where it decays."""
    if all(factor == 1 for factor in jax.tree.leaves(factors)):
        return optax.add_decayed_weights(weight_decay, mask=decays)

    def add(update: Array, weight: Array, decays: bool, factor: float) -> Array:
        return update + weight_decay * factor * weight if decays else update

    return optax.stateless(lambda updates, params: jax.tree.map(add, updates, params, decays, factors))


def _times(factors: Any) -> list[optax.GradientTransformation]:
    """Updates times a factor of each weight; nothing where all are 1."""
    if all(factor == 1 for factor in jax.tree.leaves(factors)):
        return []
    return [optax.stateless(lambda updates, _: jax.tree.map(lambda u, f: u if f == 1 else u * f, updates, factors))]


def optimizer_shardings(
    optimizer: optax.GradientTransformation, params: Any, replicated: NamedSharding
) -> tuple[Any, int]:
    """Shardings of the optimiser's state, and the bytes of it that every device holds whole.

    What has a weight's path and shape, as moments have, lies as its weight does. All else is replicated: counters, and
    what a factored or preconditioned optimiser keeps of a weight in another shape.

    Args:
      params: the weights' shapes, with their shardings.
    """
    weights = {_names(path): x for path, x in jax.tree_util.tree_leaves_with_path(params)}
    state = jax.eval_shape(optimizer.init, params)

    def of(path: tuple[Any, ...], x: jax.ShapeDtypeStruct) -> NamedSharding:
        names = _names(path)
        parts = (names[i:j] for i in range(len(names)) for j in range(i + 1, len(names) + 1))
        own = next((weights[part] for part in parts if part in weights), None)
        return own.sharding if own is not None and own.shape == x.shape else replicated

    shardings = jax.tree_util.tree_map_with_path(of, state)
    whole = jax.tree.map(lambda x, s: x.size * x.dtype.itemsize if s is replicated and x.ndim else 0, state, shardings)
    return shardings, sum(jax.tree.leaves(whole))


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
