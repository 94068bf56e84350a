"""The loss without a block, and with an affine map in its place; docs/signal.md defines both.

What replaces block l is a stream that enters block l + 1: one compiled program runs the blocks from there on.
"""

from typing import Any

import jax
import numpy as np
import scipy.linalg
from jax import Array

from spannorm_jax.analysis.blocks import Model, first, mean_nll
from spannorm_jax.errors import UserError
from spannorm_jax.model.block import Block

USEFUL = 0.1  # a block whose affine map costs a larger share of the loss is useful


def chosen_blocks(depth: int, count: int) -> list[int]:
    """`count` blocks from 0, evenly spread with the first and the last; 0: all."""
    if not count or count >= depth:
        return list(range(depth))
    return sorted({round(i * (depth - 1) / max(count - 1, 1)) for i in range(count)})


def loss_from(model: Model, stream: Any, done: Array, targets: Array) -> Array:
    """Nats a token or an image when `stream` is what leaves block `done` (from 0), whatever made it."""
    angles = model.angles(first(stream).shape[1])

    def step(block: Block, stream: Any, layer: Array, angles: Any, _: None) -> tuple[Any, None, None]:
        run = jax.lax.cond(layer > done, lambda: block.whole(stream, layer, angles)[0], lambda: stream)
        return run, None, None

    return mean_nll(model, model.run_from(stream, angles, step).features, targets)


def side_by_side(stream: Any) -> np.ndarray:
    """(B T, n D) of a stream of n leaves, float64, on the host."""
    leaves = [np.asarray(jax.device_get(leaf), np.float64) for leaf in jax.tree.leaves(stream)]
    return np.concatenate([leaf.reshape(-1, leaf.shape[-1]) for leaf in leaves], axis=1)


def _as_stream(rows: np.ndarray, like: Any) -> Any:
    leaves, structure = jax.tree.flatten(like)
    parts = np.split(rows, len(leaves), axis=1)
    return jax.tree.unflatten(
        structure, [part.reshape(leaf.shape).astype(leaf.dtype) for part, leaf in zip(parts, leaves, strict=True)]
    )


def with_constant(x_NxF: np.ndarray) -> np.ndarray:
    return np.concatenate([x_NxF, np.ones((len(x_NxF), 1))], axis=1)


def affine_map(before_NxF: np.ndarray, after_NxF: np.ndarray) -> np.ndarray:
    """(F + 1, F): least squares of the least norm; the last row is the constant. NaN for what is not finite."""
    if not (np.isfinite(before_NxF).all() and np.isfinite(after_NxF).all()):  # the solver would raise
        return np.full((before_NxF.shape[1] + 1, after_NxF.shape[1]), np.nan)
    # Streams that are equal, as span_raw's, make columns that are equal: QR with pivoting leaves them out.
    return scipy.linalg.lstsq(with_constant(before_NxF), after_NxF, cond=1e-10, lapack_driver="gelsy")[0]


def unknowns(stream: Any) -> int:
    """Numbers that an affine map has for each coordinate that it predicts: n D + 1."""
    return sum(leaf.shape[-1] for leaf in jax.tree.leaves(stream)) + 1


def check_tokens(num_tokens: int, needed: int) -> None:
    """Raises UserError if an affine map cannot be fitted on so few tokens."""
    if num_tokens < needed:
        raise UserError(
            f"--fit_tokens makes {num_tokens} tokens, too few for affine maps of {needed} unknowns a coordinate; write "
            f"{4 * needed} or more, or leave affine out of --only"
        )


def block_of(traced: tuple[Any, Any], layer: int) -> tuple[Any, Any]:
    """The streams before and after a block, of what `blocks.traced` returns."""
    entering, last = traced
    depth = jax.tree.leaves(entering)[0].shape[0]
    before = jax.tree.map(lambda x: x[layer], entering)
    return before, last if layer == depth - 1 else jax.tree.map(lambda x: x[layer + 1], entering)


def replacement(fitted_on: tuple[Any, Any], probe: Any, layer: int) -> Any:
    """What the affine map of a block, fitted on these streams, makes of the probe's stream before it."""
    before, behind = (side_by_side(stream) for stream in block_of(fitted_on, layer))
    return _as_stream(with_constant(side_by_side(probe)) @ affine_map(before, behind), probe)
