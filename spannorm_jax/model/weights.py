"""Weights as they are declared: the one place that fixes shape, logical axes, role and site of each."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

ROLES = ("embedding", "hidden", "output", "norm", "expert", "router", "router_state")


@dataclass(frozen=True)
class WeightSpec:
    """What is known of a weight before it exists: shape, logical axes (one a dimension), role and site."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    role: str
    site: str


def weight(
    rngs: nnx.Rngs, std: float, shape: tuple[int, ...], axes: tuple[str, ...], role: str, site: str
) -> nnx.Param:
    """Declares a weight, drawn from N(0, std^2): the one place that fixes its shape, axes, role and site.

    Sharding reads `axes` (logical axis names, one a dimension), weight decay and FLOP counting read `role`,
    initialisation reads `site`.
    """
    value = std * jax.random.normal(rngs.params(), shape, jnp.float32)
    return nnx.Param(value, axes=axes, role=role, site=site)


def gain(size: int, axis: str, site: str, start: float = 1.0) -> nnx.Param:
    """Declares a gain, of a norm or by itself; every number of it starts at `start`."""
    return nnx.Param(jnp.full((size,), start, jnp.float32), axes=(axis,), role="norm", site=site)
