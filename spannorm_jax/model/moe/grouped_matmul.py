"""Multiplies rows by the matrix of their group; one function picks what the device runs best.

Rows are sorted by group and no row is ever dropped: P rows (P, D), E matrices (E, D, F), `sizes` (E,) the rows of
each group, in order, each a multiple of `row_multiple`. They may sum to less than P; what comes out for the rows after
the last group is not specified.
"""

import importlib
import importlib.util
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_batching import sequential_vmap

from spannorm_jax.errors import UserError
from spannorm_jax.model.kernels.probe import compile_problem
from spannorm_jax.parallel.mesh import target_platform

# ---- padded blocks in plain JAX ------------------------------------------------------------------
#
# Under vmap (lanes) one product follows another: the counts of blocks differ, and a batched loop would take the longest
# for all, and copy what it carries at each turn.

_BLOCKS = (512, 256, 128, 64, 32)  # rows of a block: large ones for speed, a small one so that padding costs little


def _over_blocks(start: Array, size: Array, P: int, body: Callable[[Array, int, Any], Any], carry: Any) -> Any:
    """body(first row, rows, carry) for the fewest blocks that make up `size` of P rows, counted at run time."""
    for rows in (b for b in _BLOCKS if b <= P):
        number = size // rows
        carry = jax.lax.fori_loop(0, number, lambda i, c, r=rows, s=start: body(s + i * r, r, c), carry)
        start, size = start + number * rows, size % rows
    return carry


def _rows(x: Array, start: Array, rows: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, start, rows)


def _times(x_PxD: Array, w_ExDxF: Array, sizes_E: Array, contract: int) -> Array:
    """Each group's rows times its matrix, over axis `contract` (0 or 1) of that matrix; other rows are zeros."""
    return sequential_vmap(partial(_times_alone, contract))(x_PxD, w_ExDxF, sizes_E)


def _times_alone(contract: int, x_PxD: Array, w_ExDxF: Array, sizes_E: Array) -> Array:
    def group(y_PxF: Array, inputs: tuple[Array, Array, Array]) -> tuple[Array, None]:
        w_DxF, start, size = inputs

        def block(first: Array, rows: int, y_PxF: Array) -> Array:
            product = jax.lax.dot_general(_rows(x_PxD, first, rows), w_DxF, (((1,), (contract,)), ((), ())))
            return jax.lax.dynamic_update_slice_in_dim(y_PxF, product, first, 0)

        return _over_blocks(start, size, x_PxD.shape[0], block, y_PxF), None

    zeros = jnp.zeros((x_PxD.shape[0], w_ExDxF.shape[2 - contract]), x_PxD.dtype)
    return jax.lax.scan(group, zeros, (w_ExDxF, jnp.cumsum(sizes_E) - sizes_E, sizes_E))[0]


@jax.custom_vjp
def _padded(x_PxD: Array, w_ExDxF: Array, sizes_E: Array) -> Array:
    return _padded_forward(x_PxD, w_ExDxF, sizes_E)[0]


def _padded_forward(x_PxD: Array, w_ExDxF: Array, sizes_E: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    return _times(x_PxD, w_ExDxF, sizes_E, contract=0), (x_PxD, w_ExDxF, sizes_E)


def _padded_backward(residuals: tuple[Array, Array, Array], g_PxF: Array) -> tuple[Array, Array, None]:
    x_PxD, w_ExDxF, sizes_E = residuals
    dw_ExDxF = sequential_vmap(_times_by_group)(x_PxD, g_PxF, sizes_E)
    return _times(g_PxF, w_ExDxF, sizes_E, contract=1), dw_ExDxF.astype(w_ExDxF.dtype), None


def _times_by_group(x_PxD: Array, g_PxF: Array, sizes_E: Array) -> Array:
    """(E, D, F), in the inputs' dtype: per group, x_rows.T @ g_rows."""

    def group(_: None, inputs: tuple[Array, Array]) -> tuple[None, Array]:
        def block(first: Array, rows: int, dw_DxF: Array) -> Array:
            factors = _rows(x_PxD, first, rows), _rows(g_PxF, first, rows)
            return dw_DxF + jax.lax.dot_general(*factors, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)

        zeros = jnp.zeros((x_PxD.shape[1], g_PxF.shape[1]), jnp.float32)
        return None, _over_blocks(*inputs, x_PxD.shape[0], block, zeros).astype(x_PxD.dtype)

    return jax.lax.scan(group, None, (jnp.cumsum(sizes_E) - sizes_E, sizes_E))[1]


_padded.defvjp(_padded_forward, _padded_backward)


# ---- the others, and the choice ---------------------------------------------------------------------


def _tokamax(x_PxD: Array, w_ExDxF: Array, sizes_E: Array) -> Array:
    from absl import flags

    if not flags.FLAGS.is_parsed():  # it would read our command's options as its own
        flags.FLAGS.mark_as_parsed()
    # Its kernels by name: left to itself, it would take XLA's dense product where they cannot run, and not say so.
    ragged_dot = importlib.import_module("tokamax").ragged_dot
    return ragged_dot(x_PxD, w_ExDxF, sizes_E, implementation=("mosaic", "triton"))


_Product = Callable[[Array, Array, Array], Array]
IMPLEMENTATIONS: dict[str, _Product] = {"padded": _padded, "ragged_dot": jax.lax.ragged_dot, "tokamax": _tokamax}
# XLA turns ragged_dot into a dense product over all groups, but for TPUs; tokamax is for NVIDIA's Hopper.
_BEST = {"cpu": "padded", "gpu": "tokamax", "tpu": "ragged_dot"}


def grouped_matmul_for(name: str) -> tuple[str, str]:
    """The implementation that runs here for a config's name, and why it is not the device's best, if `auto` had to.

    Raises:
      UserError: the one that is asked for by name cannot run here.
    """
    best = _BEST[target_platform()] if name == "auto" else name
    why = _tokamax_problem(target_platform()) if best == "tokamax" else ""
    if why and name != "auto":
        raise UserError(
            f"config key execution.grouped_matmul={name} cannot run here: {why}; write execution.grouped_matmul=auto"
        )
    return ("padded" if why else best), why


@cache
def _tokamax_problem(platform: str) -> str:
    """Why tokamax cannot run, or nothing: found by compiling forward and backward."""
    if platform != "gpu":
        return "there is no GPU"
    if jax.default_backend() != "gpu":  # of a topology no more is known than whether it is installed
        return "" if importlib.util.find_spec("tokamax") else "tokamax is not installed"
    x, w = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((512, 256), (2, 256, 512)))
    sizes = jax.ShapeDtypeStruct((2,), jnp.int32)
    why = compile_problem(_tokamax, x, w, sizes, gradients=2)
    return f"tokamax cannot run ({why})" if why else ""


def row_multiple(implementation: str) -> int:
    """What the rows of each group must be a multiple of."""
    return _BLOCKS[-1] if grouped_matmul_for(implementation)[0] == "padded" else 1


def grouped_matmul(x_PxD: Array, w_ExDxF: Array, sizes_E: Array, implementation: str) -> Array:
    """(P, F) in the inputs' dtype: a row of group e times w[e]. `sizes_E` is int32."""
    return IMPLEMENTATIONS[grouped_matmul_for(implementation)[0]](x_PxD, w_ExDxF, sizes_E)
