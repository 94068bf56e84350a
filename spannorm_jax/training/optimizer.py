"""Schedules, and optimisers by name: each after clipping by the global norm, with a decay mask by role.

Nothing here sees a config: what changes no shape comes as `Numbers`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import NamedSharding

from spannorm_jax.model.definition import ModelDef
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


Rate = Callable[[Array], Array]  # learning rate by the count of updates before, as optax has it


def _decayed(model: ModelDef) -> Any:
    return model.map_weights(lambda spec: spec.role in DECAYED_ROLES)


def adamw(model: ModelDef, numbers: Numbers, rate: Rate) -> optax.GradientTransformation:
    b1, b2, eps, weight_decay = numbers.b1, numbers.b2, numbers.eps, numbers.weight_decay
    return optax.adamw(rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=_decayed(model))


def lion(model: ModelDef, numbers: Numbers, rate: Rate) -> optax.GradientTransformation:
    """Chen et al. 2023 (arXiv 2302.06675): the sign of a mean of moment and gradient, and decay. It reads no eps."""
    b1, b2, weight_decay = numbers.b1, numbers.b2, numbers.weight_decay
    return optax.lion(rate, b1=b1, b2=b2, weight_decay=weight_decay, mask=_decayed(model))


OPTIMIZERS: dict[str, Callable[[ModelDef, Numbers, Rate], optax.GradientTransformation]] = {
    "adamw": adamw,
    "lion": lion,
}


def make_optimizer(name: str, schedule: str, model: ModelDef, numbers: Numbers) -> optax.GradientTransformation:
    """Clipping, then the optimiser of that name. `numbers` may be traced; its state's form depends on none of them."""

    def rate(count: Array) -> Array:
        return learning_rate(schedule, numbers, count + 1)  # optax counts from 0, updates from 1

    return optax.chain(optax.clip_by_global_norm(numbers.clip_norm), OPTIMIZERS[name](model, numbers, rate))


def optimizer_shardings(
    optimizer: optax.GradientTransformation, params: Any, shardings: Any, replicated: NamedSharding
) -> Any:
    """Shardings of the optimiser's state: moments lie as their weights do, counters are replicated."""
    return optax.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, params),
        shardings,
        transform_non_params=lambda _: replicated,
    )
