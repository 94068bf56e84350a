"""Muon (Jordan et al. 2024): momentum, orthogonalised matrix by matrix; AdamW for what is no matrix of the width.

Matrices are the weights of roles hidden, expert and router (Liu et al. 2025, arXiv 2502.16982, give Muon the same ones,
and AdamW embeddings, head and gains). Their dimension numbers come from the declared axes: layers, heads, experts and
the two parts of SwiGLU are batch axes, so that each matrix is orthogonalised by itself. (Optax's own rule takes arrays
of two dimensions: here that would be stacked gains, embedding and head, and none of the matrices.)
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon
from optax.transforms import MaskedNode

from spannorm_jax.config import ModelConfig
from spannorm_jax.errors import UserError
from spannorm_jax.model.definition import ModelDef
from spannorm_jax.model.parametrisation import MATRICES, PARAMETRISATIONS, Multipliers, multipliers
from spannorm_jax.model.weights import WeightSpec
from spannorm_jax.training.numbers import Numbers

BATCH_AXES = ("layers", "heads", "kv_heads", "experts", "parts")
# Root mean square of an update's entries over the learning rate: what AdamW's are, so that one rate serves both
# (Liu et al. 2025, section 2.2).
RMS = 0.2


def matrix_axes(spec: WeightSpec) -> tuple[int, int]:
    """The dimensions of a weight that its matrices reduce and put out.

    Raises:
      UserError: it does not have two dimensions besides BATCH_AXES.
    """
    found = [i for i, axis in enumerate(spec.axes) if axis not in BATCH_AXES]
    if len(found) != 2:
        raise UserError(
            f"config key optim.name=muon cannot orthogonalise weight {spec.site}: of its axes ({', '.join(spec.axes)}) "
            f"{len(found)} are a matrix's, not 2 ({', '.join(BATCH_AXES)} are none); write optim.name=adamw"
        )
    return found[0], found[1]


def muon(model: ModelDef, numbers: Numbers) -> list[optax.GradientTransformation]:
    """Directions: of matrices U V^T of the momentum (Nesterov's, five steps of Newton-Schulz) times
    RMS sqrt(max(fan_in, fan_out)), of other weights AdamW's.

    Raises:
      UserError: a weight of a matrix's role has no matrix axes.
    """
    labels = model.map_weights(lambda spec: "muon" if spec.role in MATRICES else "adamw")

    def of_matrices(fn: Any) -> Any:  # as optax masks its trees
        return model.map_weights(lambda spec: fn(spec) if spec.role in MATRICES else MaskedNode())

    dimensions = of_matrices(lambda spec: MuonDimensionNumbers(*((axis,) for axis in matrix_axes(spec))))
    sizes = of_matrices(lambda spec: RMS * math.sqrt(max(spec.shape[axis] for axis in matrix_axes(spec))))
    matrices = optax.chain(
        scale_by_muon(beta=numbers.muon_momentum, weight_dimension_numbers=dimensions),
        optax.stateless(lambda updates, _: optax.tree.mul(updates, sizes)),
    )
    others = optax.scale_by_adam(b1=numbers.b1, b2=numbers.b2, eps=numbers.eps)
    return [optax.partition({"muon": matrices, "adamw": others}, labels)]


def muon_multipliers(cfg: ModelConfig, spec: WeightSpec) -> Multipliers:
    """The parametrisation's, with matrices' learning rate by the size of an orthogonal update, not by Adam's.

    What an update of rate 1 does to an output of inputs of size 1 that it is aligned with: its largest singular value
    RMS sqrt(max(R, O)), times sqrt(R / O), times the B matrices that one output sums (heads). With a width ratio m that
    grows as m for heads' matrices, as sqrt(m) for the feed-forward's. The rate is over that, and decay times that.
    """
    found = multipliers(cfg, spec)
    if spec.role not in MATRICES or "width" not in PARAMETRISATIONS[cfg.parametrisation].base:
        return found
    m, head_dim = cfg.width / cfg.base_width, cfg.width // cfg.num_heads
    at_base = {"embed": 1 / m, "ffn": 1 / m, "head_dim": (cfg.base_head_dim or head_dim) / head_dim}
    axes = matrix_axes(spec)
    now = [float(spec.shape[axis]) for axis in axes]
    base = [size * at_base.get(spec.axes[axis], 1.0) for size, axis in zip(now, axes, strict=True)]
    growth = _output_change(now, spec.fan_in) / _output_change(base, spec.fan_in / m)
    return replace(found, lr=found.lr * m / growth, decay=growth, eps=1.0)


def _output_change(sizes: Sequence[float], fan_in: float) -> float:
    R, O = sizes
    return math.sqrt(max(R, O) * R / O) * fan_in / R
