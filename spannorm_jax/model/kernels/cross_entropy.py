"""Cross-entropy in pieces of the time axis, with its gradient made in the forward pass.

Logits exist for one piece at once, and are never made again. Beside a piece's sums the forward
pass leaves the gradient of the features, and adds to that of the head's matrix, in float32.
So the matrix is cast and gathered, and its gradient summed over devices, once a step.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from spannorm_jax.model.kernels.cpu import linear, weight_gradient
from spannorm_jax.parallel.mesh import LOGICAL_AXES, constrain, partition_spec

Sums = dict[str, Array]
_ACTIVATION = ("batch", "time", "activation")


def head_logits(x: Array, matrix_DxV: Array) -> Array:
    """x (..., D) times the head's matrix in x's dtype: (..., V) in float32."""
    if x.dtype == jnp.float32:
        return linear(x, matrix_DxV)
    return jnp.matmul(x, matrix_DxV, preferred_element_type=jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def cross_entropy(
    features_BxTxD: Array, head_DxV: Array, targets_BxT: Array, weights_BxT: Array, z_loss: Array, num_chunks: int
) -> tuple[Array, Sums]:
    """The objective nll + z_loss z, and the weighted sums over positions that it is made of.

    Logits are float32: the features times the head, which is cast to their dtype. The sums are
    `nll` (nats), `log_z`, `z` (its square), `correct` (no logit is larger than the target's) and
    `count`. Only the objective has a gradient, in the features and the head. Pieces are equal: the
    last is filled up with weights of 0.
    """
    return _over_chunks(features_BxTxD, head_DxV, targets_BxT, weights_BxT, z_loss, num_chunks, False)[0]


def _backward(num_chunks: int, gradients: tuple[Array, Array], g: tuple[Array, Sums]) -> tuple[Array | None, ...]:
    dfeatures, dhead = gradients
    return (dfeatures * g[0].astype(dfeatures.dtype), dhead * g[0], None, None, None)


def _over_chunks(
    features_BxTxD: Array,
    head_DxV: Array,
    targets_BxT: Array,
    weights_BxT: Array,
    z_loss: Array,
    num_chunks: int,
    gradient: bool,
) -> tuple[tuple[Array, Sums], tuple[Array, Array]]:
    """What `cross_entropy` returns, and the gradients of features and head, if asked for."""
    with jax.named_scope("head"):
        matrix = constrain(head_DxV.astype(features_BxTxD.dtype), ("activation", "vocab"))
    args = (matrix, z_loss, features_BxTxD, targets_BxT, weights_BxT)
    if jax.sharding.get_abstract_mesh().empty:
        sums, dhead, dfeatures = _over_pieces(num_chunks, gradient, (), *args)
    else:
        # By hand: a compiler would sum the head's gradient over the devices in each piece, and not once.
        features, rows, whole = partition_spec(_ACTIVATION), partition_spec(_ACTIVATION[:2]), PartitionSpec()
        grads = (partition_spec(("embed", "vocab")), features) if gradient else (whole, whole)
        sums, dhead, dfeatures = jax.shard_map(
            partial(_over_devices, num_chunks, gradient),
            in_specs=(partition_spec(("activation", "vocab")), whole, features, rows, rows),
            out_specs=(whole, *grads),
            check_vma=False,
        )(*args)
    return (sums["nll"] + z_loss * sums["z"], sums), (dfeatures, dhead)


def _over_devices(num_chunks: int, gradient: bool, *args: Array) -> tuple[Sums, Array, Array]:
    """`_over_pieces` of each device: the sums of all, its own part of the head's gradient."""
    sums, dhead, dfeatures = _over_pieces(num_chunks, gradient, LOGICAL_AXES["vocab"], *args)
    batch, (embed,) = LOGICAL_AXES["batch"], LOGICAL_AXES["embed"]
    if gradient:
        dhead = jax.lax.psum_scatter(dhead, embed, scatter_dimension=0, tiled=True)
        dhead = jax.lax.psum(dhead, tuple(axis for axis in batch if axis != embed))
    return jax.lax.psum(sums, batch), dhead, dfeatures


def _over_pieces(
    num_chunks: int, gradient: bool, vocab_axes: tuple[str, ...], matrix_DxV: Array, z_loss: Array, *inputs: Array
) -> tuple[Sums, Array, Array]:
    """Sums, and the gradients of head and features, of the rows here, piece by piece."""
    chunk = partial(_chunk, matrix_DxV, z_loss, gradient, vocab_axes)
    if num_chunks == 1:
        return chunk(*inputs)

    def add(total: tuple[Sums, Array], piece: tuple[Array, ...]) -> tuple[tuple[Sums, Array], Array]:
        sums, dhead, dfeatures = chunk(*piece)
        return jax.tree.map(jnp.add, total, (sums, dhead)), dfeatures

    pieces = jax.tree.map(partial(_pieces, num_chunks), inputs)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(chunk, *(x[0] for x in pieces))[:2])
    (sums, dhead), dfeatures = jax.lax.scan(add, zeros, pieces)
    B, T, D = inputs[0].shape
    return sums, dhead, dfeatures.swapaxes(0, 1).reshape(B, -1, D)[:, :T] if gradient else dfeatures


def _pieces(num_chunks: int, x: Array) -> Array:
    """(B, T, ...) -> (pieces, B, T / pieces, ...): every piece has every row."""
    B, T, *rest = x.shape
    size = -(-T // num_chunks)
    filled = jnp.pad(x, [(0, 0), (0, num_chunks * size - T), *[(0, 0)] * len(rest)])
    return filled.reshape(B, num_chunks, size, *rest).swapaxes(0, 1)


def _chunk(
    matrix_DxV: Array,
    z_loss: Array,
    gradient: bool,
    vocab_axes: tuple[str, ...],
    x_BxTxD: Array,
    targets_BxT: Array,
    weights_BxT: Array,
) -> tuple[Sums, Array, Array]:
    """Sums of a piece, and the gradients of its objective in the matrix (float32) and in x.

    `vocab_axes` are mesh axes that split the vocabulary: V of it are here.
    """
    with jax.named_scope("head"):
        # Not `head_logits`: what a backward rule is of its own has no second derivative within this one.
        logits = jnp.matmul(x_BxTxD, matrix_DxV, preferred_element_type=jnp.float32)
    over_devices = partial(jax.lax.psum, axis_name=vocab_axes)
    ids_V = jnp.arange(logits.shape[-1])
    if vocab_axes:
        ids_V += jax.lax.axis_index(vocab_axes) * logits.shape[-1]
    # Reductions over the vocabulary, which a compiler can make in as few passes as it likes.
    is_target = ids_V == targets_BxT[..., None]
    # A shift, which no sum depends on: so it has no derivative.
    largest_BxT = jax.lax.pmax(jax.lax.stop_gradient(jnp.max(logits, axis=-1)), vocab_axes)
    total_BxT = over_devices(jnp.sum(jnp.exp(logits - largest_BxT[..., None]), axis=-1))
    log_z_BxT = largest_BxT + jnp.log(total_BxT)
    target_BxT = over_devices(jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1))
    correct = target_BxT >= largest_BxT  # an argmax would be a pass of its own
    sums = {
        "nll": jnp.sum((log_z_BxT - target_BxT) * weights_BxT),
        "log_z": jnp.sum(log_z_BxT * weights_BxT),
        "z": jnp.sum(jnp.square(log_z_BxT) * weights_BxT),
        "correct": jnp.sum(correct * weights_BxT),
        "count": jnp.sum(weights_BxT),
    }
    if not gradient:
        return sums, jnp.zeros(()), jnp.zeros(())
    scale_BxT = weights_BxT * (1 + 2 * z_loss * log_z_BxT)
    # By the sum and not by its logarithm, whose rounding would be that of a larger number.
    softmax = jnp.exp(logits - largest_BxT[..., None]) / total_BxT[..., None]
    dlogits = scale_BxT[..., None] * softmax - jnp.where(is_target, weights_BxT[..., None], 0.0)
    dlogits = dlogits.astype(x_BxTxD.dtype)
    with jax.named_scope("head"):
        dhead_DxV = weight_gradient(x_BxTxD, dlogits, jnp.float32)
        return sums, dhead_DxV, over_devices(jnp.matmul(dlogits, matrix_DxV.T))


cross_entropy.defvjp(partial(_over_chunks, gradient=True), _backward)
