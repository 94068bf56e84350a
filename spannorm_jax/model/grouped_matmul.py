"""Products of rows with the matrix of their group, behind one function, whatever the device runs best.

Rows are sorted by group, groups may be of any size, and no row is ever dropped: M rows (M, D), E matrices (E, D, F),
`sizes` (E,) rows of each group, in order, that sum to M.
"""

import importlib
from collections.abc import Callable
from functools import cache

import jax
import jax.numpy as jnp
from jax import Array

from spannorm_jax.errors import UserError, one_line

_MIN_BLOCK, _MAX_BLOCK = 32, 256


# ---- padded blocks in plain JAX ------------------------------------------------------------------


def _block_rows(M: int, E: int) -> int:
    """Rows of a block: about a quarter of an even group, so that padding costs little and blocks are few."""
    wanted = max(1, M // (4 * E))
    return min(max(_MIN_BLOCK, 1 << (wanted.bit_length() - 1)), _MAX_BLOCK)


def _layout(M: int, sizes_E: Array) -> tuple[Array, Array, Array]:
    """Groups padded to whole blocks: each block's group (N,), its rows (N, R) with M for padding, each row's slot (M,).

    N is the least number of blocks of R rows that always suffices: M // R + E.
    """
    E = sizes_E.shape[0]
    R = _block_rows(M, E)
    num_blocks = M // R + E
    blocks_E = -(-sizes_E // R)
    last_E, start_E = jnp.cumsum(blocks_E), jnp.cumsum(sizes_E) - sizes_E
    first_E = last_E - blocks_E
    block = jnp.arange(num_blocks)
    group_N = jnp.minimum(jnp.searchsorted(last_E, block, side="right"), E - 1)
    within_NxR = (block - first_E[group_N])[:, None] * R + jnp.arange(R)
    row_NxR = jnp.where(within_NxR < sizes_E[group_N, None], start_E[group_N, None] + within_NxR, M)
    group_M = jnp.searchsorted(jnp.cumsum(sizes_E), jnp.arange(M), side="right")
    slot_M = first_E[group_M] * R + jnp.arange(M) - start_E[group_M]
    return group_N, row_NxR, slot_M


def _blocks(x_MxD: Array, row_NxR: Array) -> Array:
    return x_MxD.at[row_NxR].get(mode="fill", fill_value=0)


def _per_block(x_NxRxD: Array, w_ExDxF: Array, group_N: Array, contract: int) -> Array:
    """Each block times its group's matrix, over axis `contract` (0 or 1) of that matrix."""

    def one(block_and_group: tuple[Array, Array]) -> Array:
        x_RxD, group = block_and_group
        return jax.lax.dot_general(x_RxD, w_ExDxF[group], (((1,), (contract,)), ((), ())))

    return jax.lax.map(one, (x_NxRxD, group_N))


@jax.custom_vjp
def _padded(x_MxD: Array, w_ExDxF: Array, sizes_E: Array) -> Array:
    return _padded_forward(x_MxD, w_ExDxF, sizes_E)[0]


def _padded_forward(x_MxD: Array, w_ExDxF: Array, sizes_E: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    group_N, row_NxR, slot_M = _layout(x_MxD.shape[0], sizes_E)
    y_NxRxF = _per_block(_blocks(x_MxD, row_NxR), w_ExDxF, group_N, contract=0)
    return y_NxRxF.reshape(-1, w_ExDxF.shape[2])[slot_M], (x_MxD, w_ExDxF, sizes_E)


def _padded_backward(residuals: tuple[Array, Array, Array], g_MxF: Array) -> tuple[Array, Array, None]:
    x_MxD, w_ExDxF, sizes_E = residuals
    group_N, row_NxR, slot_M = _layout(x_MxD.shape[0], sizes_E)
    g_NxRxF = _blocks(g_MxF, row_NxR)
    dx_NxRxD = _per_block(g_NxRxF, w_ExDxF, group_N, contract=1)

    def add(dw_ExDxF: Array, block: tuple[Array, Array, Array]) -> tuple[Array, None]:
        x_RxD, g_RxF, group = block
        product = jax.lax.dot_general(x_RxD, g_RxF, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        return dw_ExDxF.at[group].add(product), None  # in place: the sum never exists twice

    zeros = jnp.zeros(w_ExDxF.shape, jnp.float32)
    dw_ExDxF, _ = jax.lax.scan(add, zeros, (_blocks(x_MxD, row_NxR), g_NxRxF, group_N))
    return dx_NxRxD.reshape(-1, x_MxD.shape[1])[slot_M], dw_ExDxF.astype(w_ExDxF.dtype), None


_padded.defvjp(_padded_forward, _padded_backward)


# ---- the others, and the choice ---------------------------------------------------------------------


def _tokamax(x_MxD: Array, w_ExDxF: Array, sizes_E: Array) -> Array:
    return importlib.import_module("tokamax").ragged_dot(x_MxD, w_ExDxF, sizes_E)


IMPLEMENTATIONS: dict[str, Callable[[Array, Array, Array], Array]] = {
    "padded": _padded,
    "ragged_dot": jax.lax.ragged_dot,
    "tokamax": _tokamax,
}
CHOICES = ("auto", *IMPLEMENTATIONS)
# XLA turns ragged_dot into a dense product over all groups, but for TPUs; tokamax is for NVIDIA's Hopper.
_BEST = {"cpu": "padded", "gpu": "tokamax", "tpu": "ragged_dot"}


def chosen(name: str) -> tuple[str, str]:
    """The implementation that runs here for a config's name, and why it is not the device's best, if `auto` had to.

    Raises:
      UserError: the one that is asked for by name cannot run here.
    """
    best = _BEST[jax.default_backend()] if name == "auto" else name
    why = _tokamax_problem() if best == "tokamax" else ""
    if why and name != "auto":
        raise UserError(
            f"config key model.moe.grouped_matmul={name} cannot run here: {why}; write model.moe.grouped_matmul=auto"
        )
    return ("padded" if why else best), why


@cache
def _tokamax_problem() -> str:
    if jax.default_backend() != "gpu":
        return "there is no GPU"
    try:
        importlib.import_module("tokamax")
    except Exception as error:  # whatever fails while it is imported, padded blocks always run
        return f"tokamax cannot be imported ({one_line(error)[:150]})"
    return ""


def grouped_matmul(x_MxD: Array, w_ExDxF: Array, sizes_E: Array, implementation: str) -> Array:
    """(M, F) in the inputs' dtype: row m of group e times w[e]. `sizes_E` is int32 and sums to M."""
    return IMPLEMENTATIONS[chosen(implementation)[0]](x_MxD, w_ExDxF, sizes_E)
