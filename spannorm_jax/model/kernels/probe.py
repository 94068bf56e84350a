"""Asks whether a kernel compiles on this device, also while something else is traced."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp

from spannorm_jax.errors import one_line

_LONGEST = 200  # characters of a reason


def compile_problem(function: Callable[..., Any], *shapes: jax.ShapeDtypeStruct, gradients: int) -> str:
    """Why `function` and its gradient in the first `gradients` inputs do not compile for these shapes; "" if they do.

    JAX's traces and meshes belong to a thread, so that in one of its own the question meets none that is under way.
    """

    def attempt() -> str:
        gradient = jax.grad(lambda *inputs: jnp.sum(function(*inputs).astype(jnp.float32)), tuple(range(gradients)))
        try:
            jax.jit(gradient).lower(*shapes).compile()
        except Exception as error:  # whatever it is, it names a reason, and there is another implementation
            return one_line(error)[:_LONGEST]
        return ""

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(attempt).result()
