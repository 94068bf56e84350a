"""Weights as modules declare them: the one place that fixes shape, axes, fans, role and site of each.

A declaration draws nothing. `definition.py` gathers the declarations into a table, and draws the weights from it.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx

ROLES = ("embedding", "hidden", "output", "norm", "expert", "router")


@dataclass(frozen=True)
class WeightSpec:
    """What is known of a weight before it exists. Gains have no fans."""

    shape: tuple[int, ...]  # with a leading layer axis for a weight of stacked blocks
    axes: tuple[str, ...]  # logical axes, one a dimension; sharding reads them
    role: str  # one of ROLES; weight decay, FLOP counting and compute dtypes read it
    site: str  # the kind of weight (`q`, `ffn_out`, `after_attn`, ...); initialisation reads it
    fan_in: float  # inputs that one output sums; an integer, except after `parametrisation.at_base` rescaled it
    fan_out: float  # outputs that one input reaches
    start: float | None  # where every number starts, of a gain or a head; None for weights that are drawn
    layers: tuple[int, ...] = ()  # the blocks that own the slices of a stacked weight; () outside of blocks


class ModelState(nnx.Variable):
    """What a model keeps besides its weights: no gradient, no optimiser. The train step sets it."""


def weight(
    shape: tuple[int, ...],
    axes: tuple[str, ...],
    role: str,
    site: str,
    *,
    fan_in: int,
    fan_out: int,
    start: float | None = None,
) -> nnx.Param:
    """Declares a matrix. Without `start` it is drawn, with the initialisation's standard deviation."""
    return _declared(WeightSpec(shape, axes, role, site, fan_in, fan_out, start))


def gain(shape: tuple[int, ...], axes: tuple[str, ...], site: str, start: float = 1.0) -> nnx.Param:
    """Declares a gain, of a norm or by itself."""
    return _declared(WeightSpec(shape, axes, "norm", site, 0, 0, start))


def _declared(spec: WeightSpec) -> nnx.Param:
    return nnx.Param(jnp.full(spec.shape, spec.start or 0.0, jnp.float32), spec=spec)
