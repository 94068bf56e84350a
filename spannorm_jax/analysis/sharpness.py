"""The largest eigenvalue of the objective's Hessian, as it is and as Adam sees it; docs/signal.md defines both."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from optax.tree import vdot

from spannorm_jax.config import Config, MeshConfig, replace
from spannorm_jax.model.definition import ModelDef
from spannorm_jax.model.parametrisation import Multipliers
from spannorm_jax.parallel.mesh import mesh_shape
from spannorm_jax.training.numbers import Numbers, numbers_of
from spannorm_jax.training.optimizer import OPTIMIZERS, learning_rate, make_optimizer
from spannorm_jax.training.step import objective
from spannorm_jax.training.task import Batch
from spannorm_jax.training.tasks import task_of

ITERATIONS = 20  # of Lanczos: each is one product of the Hessian and a vector
MatVec = Callable[[Any], Any]


def twice_differentiable(config: Config) -> Config:
    """The config with float32 and the kernels that are plain JAX: those of accelerators have no second derivative."""
    return replace(config, model__dtype="float32", execution__attention="xla", execution__grouped_matmul="padded")


def sharpness(config: Config, params: Any, model_state: Any, opt_state: Any, batch: Batch) -> dict[str, Any]:
    """The numbers of the group, on a batch of training's form, under whatever mesh is set.

    Without an `opt_state` P is that of the first update, which the batch's own gradient makes.
    """
    config = twice_differentiable(config)
    task, numbers = task_of(config), numbers_of(config)
    model = task.define(config)
    shape = dict(jax.sharding.get_abstract_mesh().shape) or mesh_shape(MeshConfig(), 1)
    loss_sums = task.loss_sums(config, shape, jax.tree.leaves(batch)[0].shape[0])
    optimizer = make_optimizer(config.optim, model, numbers)

    def loss(params: Any, model_state: Any, batch: Batch) -> Array:
        total, sums = objective(config, model, params, model_state, batch, loss_sums, numbers)
        return total / sums["count"]

    gradient = jax.grad(loss)

    @jax.jit
    def run(params: Any, model_state: Any, batch: Batch, roots: Any) -> tuple[Array, Array]:
        def product(v: Any) -> Any:
            along = jax.tree.map(jnp.multiply, roots, v)
            _, Hv = jax.jvp(lambda p: gradient(p, model_state, batch), (params,), (along,))
            return jax.tree.map(jnp.multiply, roots, Hv)

        return lanczos(product, params, jax.random.key(config.seed), ITERATIONS)

    value, residual = ritz(*run(params, model_state, batch, jax.tree.map(jnp.ones_like, params)))
    found = {"sharpness": value, "sharpness_residual": residual}
    if config.optim.name != "adamw":
        return found
    updates = _adam(opt_state).count if opt_state else 0
    if not opt_state:
        grads = jax.jit(gradient)(params, model_state, batch)
        opt_state = optimizer.update(grads, optimizer.init(params), params)[1]
    roots = jax.tree.map(jax.lax.rsqrt, preconditioner(config, model, numbers, opt_state))
    value, residual = ritz(*run(params, model_state, batch, roots))
    found |= {"preconditioned_sharpness": value, "preconditioned_sharpness_residual": residual}
    lr = learning_rate(config.optim.schedule, numbers, 1 + updates)
    return found | {"sharpness_bound": float(2 * (1 + numbers.b1) / ((1 - numbers.b1) * lr))}


def preconditioner(config: Config, model: ModelDef, numbers: Numbers, opt_state: Any) -> Any:
    """P of each weight: Adam's update is minus the rate times P^-1 times the moving sum of (1 - b1) gradients."""
    adam = _adam(opt_state)
    b1, b2, eps = (jnp.float32(getattr(numbers, name)) for name in ("b1", "b2", "eps"))

    def of_weight(v: Array, of: Multipliers) -> Array:
        root = jnp.sqrt(v / (1 - b2**adam.count)) + eps
        # Adam sees the gradient over of.eps, and the weight takes of.lr times what comes of it.
        return (1 - b1**adam.count) * root * of.eps / of.lr

    weights = model.map_weights(lambda spec: OPTIMIZERS[config.optim.name].multipliers(model.cfg, spec))
    return jax.tree.map(of_weight, adam.nu, weights)


def _adam(opt_state: Any) -> optax.ScaleByAdamState:
    def is_adam(x: Any) -> bool:
        return isinstance(x, optax.ScaleByAdamState)

    return next(x for x in jax.tree.leaves(opt_state, is_leaf=is_adam) if is_adam(x))


# ---- Lanczos --------------------------------------------------------------------------------------------


def lanczos(matvec: MatVec, like: Any, key: Array, iterations: int) -> tuple[Array, Array]:
    """The diagonal (m,) and what is beside it (m,) of a symmetric matrix on m orthonormal vectors, trees like `like`.

    Each vector is made orthogonal to all before it, twice: so rounding brings no eigenvalue back a second time.
    """
    leaves, structure = jax.tree.flatten(like)
    keys = jax.random.split(key, len(leaves))
    start = jax.tree.unflatten(structure, [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])
    start = jax.tree.map(lambda x: x / jnp.sqrt(vdot(start, start)), start)
    basis = jax.tree.map(lambda x: jnp.zeros((iterations + 1, *x.shape)).at[0].set(x), start)

    def step(j: Array, carry: tuple[Any, Array, Array]) -> tuple[Any, Array, Array]:
        basis, alphas, betas = carry
        v = jax.tree.map(lambda x: x[j], basis)
        w = matvec(v)
        alphas = alphas.at[j].set(vdot(v, w))
        for _ in range(2):
            shares = jax.vmap(vdot, in_axes=(0, None))(basis, w)
            within = jax.tree.map(partial(jnp.tensordot, shares, axes=1, precision=jax.lax.Precision.HIGHEST), basis)
            w = jax.tree.map(jnp.subtract, w, within)
        beta = jnp.sqrt(vdot(w, w))
        w = jax.tree.map(lambda x: jnp.where(beta > 0, x / beta, 0), w)
        return jax.tree.map(lambda b, x: b.at[j + 1].set(x), basis, w), alphas, betas.at[j].set(beta)

    zeros = jnp.zeros(iterations)
    _, alphas, betas = jax.lax.fori_loop(0, iterations, step, (basis, zeros, zeros))
    return alphas, betas


def ritz(alphas: Any, betas: Any) -> tuple[float, float]:
    """The largest eigenvalue of what `lanczos` returns, and within what distance of it the matrix has one."""
    a, b = (np.asarray(jax.device_get(x), np.float64) for x in (alphas, betas))
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return float("nan"), float("nan")
    values, vectors = np.linalg.eigh(np.diag(a) + np.diag(b[:-1], 1) + np.diag(b[:-1], -1))
    return float(values[-1]), float(b[-1] * abs(vectors[-1, -1]))
