"""A linear layer and GELU with backward passes that a CPU's compiler does not find; docs/speed.md has their gains."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from spannorm_jax.parallel.mesh import target_platform


@jax.custom_vjp
def linear(x: Array, w: Array) -> Array:
    """x (..., D) times w (D, *F): (..., *F), in the inputs' dtype.

    The weight's gradient is a product over all positions of which one factor must be transposed. Left to itself,
    XLA on a CPU transposes the output's gradient, reading what made it in strides; here it is the narrower of the two.
    """
    return _linear_forward(x, w)[0]


def _linear_forward(x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    return jax.lax.dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ()))), (x, w)


def _linear_backward(residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, w = residuals
    outputs = tuple(range(1, w.ndim))
    dx = jax.lax.dot_general(g, w, ((tuple(range(x.ndim - 1, g.ndim)), outputs), ((), ())))
    return dx, weight_gradient(x, g, w.dtype)


def weight_gradient(x: Array, g: Array, dtype: DTypeLike) -> Array:
    """(D, *F): the sum over positions of x (..., D) times g (..., *F)."""
    batch = tuple(range(x.ndim - 1))
    product = partial(
        jax.lax.dot_general, dimension_numbers=((batch, batch), ((), ())), preferred_element_type=np.dtype(dtype)
    )
    if x.shape[-1] <= math.prod(g.shape[x.ndim - 1 :]):
        return _untransposed(product(x, g))
    return jnp.moveaxis(_untransposed(product(g, x)), -1, 0)


def _untransposed(product: Array) -> Array:
    """Keeps a CPU's compiler from folding a later transpose into the product, which then takes its slow path."""
    return jax.lax.optimization_barrier(product) if target_platform() == "cpu" else product


linear.defvjp(_linear_forward, _linear_backward)


@jax.custom_vjp
def gelu(x: Array) -> Array:
    """x Phi(x), exact (Hendrycks & Gimpel 2016, arXiv 1606.08415), in x's dtype. Backward keeps x alone."""
    return _gelu_forward(x)[0]


def _normal_cdf(x: Array) -> Array:
    return 0.5 * (1 + jax.lax.erf(x / math.sqrt(2)))  # erfc is exact in the far tail too, and twice as slow


def _gelu_forward(x: Array) -> tuple[Array, Array]:
    y = x.astype(jnp.float32)
    return (y * _normal_cdf(y)).astype(x.dtype), x


def _gelu_backward(x: Array, g: Array) -> tuple[Array]:
    y = x.astype(jnp.float32)
    density = jnp.exp(-0.5 * jnp.square(y)) / math.sqrt(2 * math.pi)
    return ((g * (_normal_cdf(y) + y * density)).astype(x.dtype),)


gelu.defvjp(_gelu_forward, _gelu_backward)
