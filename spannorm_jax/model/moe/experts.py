"""Routed experts: rows sorted by expert, two grouped matmuls, rows unsorted; and both over the mesh axis `expert`.

Shapes: N tokens here, k experts a token, M = N k assignments, n devices along `expert`, E experts and P rows here, D
width, F hidden units. A row that has no place (padding, or an expert elsewhere) has an index past the end: reading it
gives zeros. No assignment is ever dropped: `all_to_all` sends buffers of a fixed size, and where one would overflow the
whole group of devices takes the ring instead.
"""

import math
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from spannorm_jax.model.layers import activation, inverse_rms
from spannorm_jax.model.moe.grouped_matmul import grouped_matmul, row_multiple

AXIS = "expert"
# What remat=dots keeps: without the rows it would repeat the exchange between devices, without the others the matmuls.
KEPT = ("expert_rows", "expert_hidden", "expert_out")


@dataclass(frozen=True)
class ExpertOps:
    """How experts compute."""

    kind: str  # of their activation
    matmul: str  # the implementation of `grouped_matmul`
    norm_eps: float = 0.0  # hidden units are divided by their root mean square, with this eps; 0: they are not
    hidden_axes: tuple[str, ...] = ()  # mesh axes that split the hidden units
    named: bool = True  # whether what KEPT lists bears its name

    def normed(self, hidden_PxF: Array) -> Array:
        if not self.norm_eps:
            return hidden_PxF
        h = hidden_PxF.astype(jnp.float32)
        mean = jnp.mean(jnp.square(h), axis=-1, keepdims=True)
        if self.hidden_axes:
            mean = jax.lax.pmean(mean, self.hidden_axes)
        return (h * inverse_rms(mean, self.norm_eps)).astype(hidden_PxF.dtype)

    def name(self, x: Array, name: str) -> Array:
        return checkpoint_name(x, name) if self.named else x


# ---- rows and their order ---------------------------------------------------------------------------


def _take(x: Array, index: Array) -> Array:
    return x.at[index].get(mode="fill", fill_value=0)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _spread(x_NxD: Array, source_P: Array, slot_M: Array, k: int) -> Array:
    """(P, D): the token of each row's assignment. Backward is a gather too, where AD would scatter."""
    return _take(x_NxD, source_P // k)


_spread.defvjp(
    lambda x, source, slot, k: (_take(x, source // k), slot),
    lambda k, slot, g: (jnp.sum(_take(g, slot).reshape(-1, k, g.shape[1]), axis=1, dtype=g.dtype), None, None),
)


@jax.custom_vjp
def _collect(y_PxD: Array, source_P: Array, slot_M: Array) -> Array:
    """(M, D): the row of each assignment; again a gather in both directions."""
    return _take(y_PxD, slot_M)


_collect.defvjp(
    lambda y, source, slot: (_take(y, slot), source),
    lambda source, g: (_take(g, source), None, None),
)


def _places(group_M: Array, starts_G: Array, room_G: Array, num_rows: int) -> tuple[Array, Array]:
    """Each row's assignment `source` (P,) and each assignment's row `slot` (M,), groups in order from their starts.

    Assignments of group G, or beyond their group's room, get no row.
    """
    M, G = group_M.shape[0], starts_G.shape[0]
    order_M = jnp.argsort(group_M)
    sorted_M = group_M[order_M]
    rank_M = jnp.arange(M) - jnp.searchsorted(sorted_M, jnp.arange(G + 1))[sorted_M]
    fits_M = rank_M < jnp.append(room_G, 0)[sorted_M]
    row_M = jnp.where(fits_M, jnp.append(starts_G, 0)[sorted_M] + rank_M, num_rows)
    source_P = jnp.full(num_rows, M).at[row_M].set(order_M, mode="drop")
    slot_M = jnp.zeros(M, row_M.dtype).at[order_M].set(row_M)
    return source_P, slot_M


def _sizes(group_M: Array, num_groups: int) -> Array:
    return jnp.bincount(group_M, length=num_groups).astype(jnp.int32)  # those past the end are not counted


# ---- one device -------------------------------------------------------------------------------------


def _run(x_NxD: Array, expert_M: Array, w_in_ExPxDxF: Array, w_out_ExFxD: Array, how: ExpertOps) -> Array:
    """(M, D): for each assignment, M / N a token, its expert's output; zeros if that is not here (E or more)."""
    M, (E, P, *_) = expert_M.shape[0], w_in_ExPxDxF.shape
    with jax.named_scope("dispatch"):
        multiple = row_multiple(how.matmul)
        num_rows = -(-(M + E * (multiple - 1)) // multiple) * multiple
        counts_E = _sizes(expert_M, E)
        sizes_E = -(-counts_E // multiple) * multiple
        source, slot = _places(expert_M, jnp.cumsum(sizes_E) - sizes_E, sizes_E, num_rows)
        rows_PxD = how.name(_spread(x_NxD, source, slot, M // x_NxD.shape[0]), "expert_rows")
    with jax.named_scope("experts"):
        hidden = [grouped_matmul(rows_PxD, w_in_ExPxDxF[:, part], sizes_E, how.matmul) for part in range(P)]
        hidden = [how.name(part, "expert_hidden") for part in hidden]
        out_PxD = grouped_matmul(how.normed(activation(hidden, how.kind)), w_out_ExFxD, sizes_E, how.matmul)
    with jax.named_scope("combine"):
        return _collect(out_PxD, source, slot)


def _weighted(out_MxD: Array, weights_Nxk: Array, how: ExpertOps) -> Array:
    """(N, D): the sum over a token's experts, in float32 and returned in the outputs' dtype."""
    out_NxkxD = how.name(out_MxD, "expert_out").reshape(*weights_Nxk.shape, -1)
    return jnp.sum(out_NxkxD.astype(jnp.float32) * weights_Nxk[..., None], axis=1).astype(out_MxD.dtype)


def local(
    x_NxD: Array, weights_Nxk: Array, ids_Nxk: Array, w_in_ExPxDxF: Array, w_out_ExFxD: Array, how: ExpertOps
) -> Array:
    """(N, D): each token's experts, weighted and summed; those that are not here give nothing. Memory O(M (D + F))."""
    return _weighted(_run(x_NxD, ids_Nxk.reshape(-1), w_in_ExPxDxF, w_out_ExFxD, how), weights_Nxk, how)


# ---- over the mesh axis `expert`, inside shard_map ----------------------------------------------------


def ring(
    x_NxD: Array, weights_Nxk: Array, ids_Nxk: Array, w_in_ExPxDxF: Array, w_out_ExFxD: Array, how: ExpertOps
) -> Array:
    """All tokens to all devices, each runs its experts, sums are scattered back. Memory O(n M (D + F))."""
    E = w_in_ExPxDxF.shape[0]

    def gather(a: Array) -> Array:
        return how.name(jax.lax.all_gather(a, AXIS, tiled=True), "expert_rows")

    ids = gather(ids_Nxk) - jax.lax.axis_index(AXIS) * E
    here = jnp.where((ids >= 0) & (ids < E), ids, E)
    out = local(gather(x_NxD), gather(weights_Nxk), here, w_in_ExPxDxF, w_out_ExFxD, how)
    return how.name(jax.lax.psum_scatter(out, AXIS, scatter_dimension=0, tiled=True), "expert_out")


def capacity_rows(capacity: float, num_assignments: int, num_shards: int) -> int:
    """Rows that a device sends to each of `num_shards`: `capacity` times an even share of its assignments."""
    return math.ceil(capacity * num_assignments / num_shards)


def all_to_all(
    x_NxD: Array,
    weights_Nxk: Array,
    ids_Nxk: Array,
    w_in_ExPxDxF: Array,
    w_out_ExFxD: Array,
    how: ExpertOps,
    capacity: int,
) -> tuple[Array, Array]:
    """Each token to the devices of its experts and back, `capacity` rows a pair of devices; and how many did not fit.

    If any did not, on any device, all devices of the axis compute by the ring instead. Memory O(n capacity (D + F)).
    """
    n, E = jax.lax.axis_size(AXIS), w_in_ExPxDxF.shape[0]
    expert_M = ids_Nxk.reshape(-1)
    overflow = jnp.sum(jnp.maximum(_sizes(expert_M // E, n) - capacity, 0))
    exchange = partial(jax.lax.all_to_all, axis_name=AXIS, split_axis=0, concat_axis=0, tiled=True)

    def exchanged(x_NxD: Array, weights_Nxk: Array, w_in_ExPxDxF: Array, w_out_ExFxD: Array) -> Array:
        with jax.named_scope("dispatch"):
            starts_n = jnp.arange(n) * capacity
            source, slot = _places(expert_M // E, starts_n, jnp.full(n, capacity), n * capacity)
            rows = exchange(_spread(x_NxD, source, slot, ids_Nxk.shape[1]))
            expert = jnp.where(source < expert_M.size, expert_M.at[source].get(mode="clip") % E, E)
            rows, expert = (how.name(a, "expert_rows") for a in (rows, exchange(expert)))
        out = exchange(_run(rows, expert, w_in_ExPxDxF, w_out_ExFxD, how))
        return _weighted(_collect(out, source, slot), weights_Nxk, how)

    def around(x_NxD: Array, weights_Nxk: Array, w_in_ExPxDxF: Array, w_out_ExFxD: Array) -> Array:
        return ring(x_NxD, weights_Nxk, ids_Nxk, w_in_ExPxDxF, w_out_ExFxD, replace(how, named=False))

    # The ring is rare, and must not keep its many rows: a branch that is not taken returns as much, in zeros.
    args = (x_NxD, weights_Nxk, w_in_ExPxDxF, w_out_ExFxD)
    return jax.lax.cond(jax.lax.pmax(overflow, AXIS) > 0, jax.checkpoint(around), exchanged, *args), overflow


def moved_bytes(
    mode: str, top_k: int, capacity: int, num_tokens: int, num_shards: int, width: int, itemsize: int
) -> int:
    """Bytes that a device receives for one layer, forward and backward, of the tokens that it holds.

    `capacity` is the rows of a buffer, of `capacity_rows`.
    ring: tokens, weights and ids come, sums go back; the gradients of all but the ids take the opposite way.
    all_to_all: rows go and come back, twice, and each row's expert goes once.
    """
    others = num_shards - 1
    if mode == "ring":
        return others * num_tokens * (4 * width * itemsize + 3 * 4 * top_k)
    return others * capacity * (4 * width * itemsize + 4)


def exchange_for(top_k: int, capacity: int, num_tokens: int, num_shards: int, width: int, itemsize: int) -> str:
    """`local` on one shard, else the mode that moves fewer bytes."""
    if num_shards == 1:
        return "local"
    sizes = (top_k, capacity, num_tokens, num_shards, width, itemsize)
    return min(("all_to_all", "ring"), key=lambda mode: moved_bytes(mode, *sizes))
