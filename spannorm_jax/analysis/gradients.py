"""Gradient norms of the stream and of each weight, and what one update changes; docs/signal.md defines each number.

The backward pass is the scan's own, block by block: blocks are recomputed, and what is kept is one stream a block.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from spannorm_jax.analysis.blocks import Model, first, mean_nll, with_first
from spannorm_jax.config import Config
from spannorm_jax.model.block import Block
from spannorm_jax.model.definition import ModelDef
from spannorm_jax.training.numbers import Numbers, numbers_of
from spannorm_jax.training.optimizer import make_optimizer


@jax.custom_vjp
def _metered(x: Array, meter: Array) -> Array:
    """x; the gradient by `meter` is the squared norm of that by x."""
    return x


_metered.defvjp(
    lambda x, meter: (x, None),
    lambda _, g: (g, jnp.sum(jnp.square(g.astype(jnp.float32)))),
)


def metered_features(model: Model, inputs: Array, meters_L: Array) -> Array:
    """The features, whose gradient by meter l is the squared norm of that by what enters block l."""

    def step(block: Block, stream: Any, layer: Array, angles: Any, meter: Array) -> tuple[Any, None, None]:
        stream = with_first(stream, _metered(first(stream), meter))
        return block.whole(stream, layer, angles)[0], None, None

    return model.run(inputs, step, meters_L, remat="block").features


def _squares(model: ModelDef, grads: Any) -> Any:
    """Of each weight the square of its gradient's norm, by block (its own layers,) where it is one of blocks'."""
    return model.map_weights(
        lambda spec, g: jnp.sum(jnp.square(g), axis=tuple(range(1 if spec.layers else 0, g.ndim))), grads
    )


def by_site(model: ModelDef, values: Any) -> dict[str, Any]:
    """Numbers of weights, as `_squares` has them, by site: a list over all blocks, null where one lacks it."""
    found: dict[str, Any] = {}

    def add(spec: Any, value: Any) -> None:
        if not spec.layers:
            found[spec.site] = float(value)
            return
        row = found.setdefault(spec.site, [None] * model.cfg.depth)
        for layer, number in zip(spec.layers, np.asarray(value, np.float64).tolist(), strict=True):
            row[layer] = number

    model.map_weights(add, values)
    return found


def of_loss(model: ModelDef, params: Any, model_state: Any, inputs: Array, targets: Array) -> tuple[Any, Array, Any]:
    """The gradient of the mean loss, the squared norms by what enters each block (L,), and `_squares` of it."""

    def loss(params: Any, meters_L: Array) -> Array:
        bound = model.bind(params, model_state)
        return mean_nll(bound, metered_features(bound, inputs, meters_L), targets)

    grads, meters = jax.grad(loss, argnums=(0, 1))(params, jnp.zeros(model.cfg.depth))
    return grads, meters, _squares(model, grads)


def of_probe(model: ModelDef, params: Any, model_state: Any, inputs: Array, key: Array) -> tuple[Array, Any]:
    """As `of_loss`, but the gradient itself, for an isotropic gradient of norm 1 at what the head reads."""

    def product(params: Any, meters_L: Array) -> Array:
        features = metered_features(model.bind(params, model_state), inputs, meters_L).astype(jnp.float32)
        g = jax.random.normal(key, features.shape)
        return jnp.sum(features * (g / jnp.linalg.norm(g)))

    grads, meters = jax.grad(product, argnums=(0, 1))(params, jnp.zeros(model.cfg.depth))
    return meters, _squares(model, grads)


def updated(config: Config, model: ModelDef, params: Any, grads: Any) -> Any:
    """The weights after one step of the config's optimiser from moments of zero, at its peak learning rate."""
    at_peak = {"warmup_updates": np.int32(0), "stable_updates": np.int32(2**30), "decay_updates": np.int32(0)}
    numbers = Numbers(numbers_of(config).values | at_peak)
    optimizer = make_optimizer(config.optim, model, numbers)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    return jax.tree.map(jnp.add, params, updates)
