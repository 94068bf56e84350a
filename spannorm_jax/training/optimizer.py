"""Schedule and optimiser: AdamW with a decay mask by role, after clipping by the global norm."""

import jax
import optax
from jax import Array

from spannorm_jax.config import Config
from spannorm_jax.model.definition import ModelDef

DECAYED_ROLES = ("hidden", "output", "expert")


def learning_rate(config: Config, update: Array | int) -> Array:
    """Learning rate of update 1..steps: linear warm-up that reaches the peak, then a decay to the final rate.

    `cosine` decays at once; `wsd` stays at the peak and decays linearly over the last updates (Hu et al. 2024,
    arXiv 2404.06395; linear after Hägele et al. 2024, arXiv 2405.18392). `config` is resolved.
    """
    optim, steps = config.optim, config.training.steps
    warmup = round(optim.warmup_fraction * steps)
    stable = 0
    decay = optax.cosine_decay_schedule(optim.lr, max(steps - warmup, 1), optim.final_lr_fraction)
    if optim.schedule == "wsd":
        last = min(round(optim.decay_fraction * steps), steps - warmup)  # both may have been rounded up
        stable = steps - warmup - last
        decay = optax.linear_schedule(optim.lr, optim.lr * optim.final_lr_fraction, last)
    schedule = optax.join_schedules(
        [optax.linear_schedule(0.0, optim.lr, warmup), optax.constant_schedule(optim.lr), decay],
        [warmup, warmup + stable],
    )
    return schedule(update)


def make_optimizer(config: Config, model: ModelDef) -> optax.GradientTransformation:
    optim = config.optim
    decayed = model.map_weights(lambda spec: spec.role in DECAYED_ROLES)
    adamw = optax.adamw(
        lambda count: learning_rate(config, count + 1),  # optax counts from 0, updates from 1
        b1=optim.b1,
        b2=optim.b2,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        mask=decayed,
    )
    if optim.clip_norm == 0:
        return adamw
    return optax.chain(optax.clip_by_global_norm(optim.clip_norm), adamw)


def optimizer_shardings(optimizer: optax.GradientTransformation, params, shardings, replicated):
    """Shardings of the optimiser's state: moments lie as their weights do, counters are replicated."""
    return optax.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, params),
        shardings,
        transform_non_params=lambda _: replicated,
    )
