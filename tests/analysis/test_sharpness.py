"""The largest eigenvalues of the objective's Hessian, as it is and as Adam sees it, against dense ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from small_model import batch, configure, gradients_of

from spannorm_jax.analysis import sharpness as measured
from spannorm_jax.analysis.sharpness import lanczos, ritz, sharpness, twice_differentiable
from spannorm_jax.model.definition import abstract_params
from spannorm_jax.parallel.mesh import make_mesh
from spannorm_jax.training.numbers import numbers_of
from spannorm_jax.training.optimizer import make_optimizer
from spannorm_jax.training.step import objective
from spannorm_jax.training.tasks import task_of

TINY = {"model__depth": 1, "model__width": 8, "model__num_heads": 2, "model__ffn_dim": 8, "training__z_loss": 0.1}
TINY |= {"optim__warmup_fraction": 0.5}
DENSE = {
    "span": {"model__depth": 2, "execution__max_logits_mib": 1, "execution__remat": "block"},
    "siamese": {
        **{"model__ffn": "gelu", "model__tied_head": True, "model__qk_norm": True},
        **{"optim__clip_norm": 0.1, "model__parametrisation": "mup", "model__base_width": 4},
    },
    "pre_embnorm": {"optim__eps": 1e-3},  # or the rounding of gradients near zero would decide
    "pre": {"model__moe__num_experts": 4, "model__moe__expert_dim": 4},
}
# Rounding of float32 in a Hessian's entry is some 2^-24 of what it sums, here up to 64 positions and two dozen
# operations one after another; eigenvalues move by no more than the matrix does.
ROUNDING = 2.0**-24 * 64 * 24


def model_of(placement):
    config = configure(model__placement=placement, **TINY | DENSE[placement])
    model = task_of(config).define(config)
    params = jax.tree.map(lambda x: 2 * x, jax.jit(model.init)(jax.random.key(0)))
    return config, model, params


def hessian(config, params, rows):
    """Of the mean objective, (n, n) in float64, and its gradient (n,), in the order of `ravel_pytree`."""
    config = twice_differentiable(config)
    model, numbers = task_of(config).define(config), numbers_of(config)
    loss_sums = task_of(config).loss_sums(config, {"data": 1, "fsdp": 1, "expert": 1, "tensor": 1}, len(rows["tokens"]))
    flat, unravel = ravel_pytree(params)

    def loss(flat):
        total, sums = objective(config, model, unravel(flat), model.init_model_state(), rows, loss_sums, numbers)
        return total / sums["count"]

    def columns(flat):
        if not config.model.moe.num_experts:
            return jax.jacrev(jax.grad(loss))(flat)
        eye = jnp.eye(len(flat))  # loops of a length that experts' loads decide have no reverse mode
        return jax.lax.map(lambda v: jax.jvp(jax.grad(loss), (flat,), (v,))[1], eye)

    return np.asarray(jax.jit(columns)(flat), np.float64), np.asarray(jax.jit(jax.grad(loss))(flat), np.float64)


def updated(config, model, params, gradients):
    """The optimiser's state after these gradients (n,) each."""
    optimizer, (_, unravel) = make_optimizer(config.optim, model, numbers_of(config)), ravel_pytree(params)
    state = optimizer.init(params)
    for g in gradients:
        _, state = optimizer.update(unravel(jnp.asarray(g, jnp.float32)), state, params)
    return state


@pytest.mark.parametrize("placement", ["span", "siamese", "pre"])
def test_sharpness_is_the_largest_eigenvalue_of_the_dense_hessian(placement, monkeypatch):
    monkeypatch.setattr(measured, "ITERATIONS", 40)
    config, model, params = model_of(placement)
    rows = jax.tree.map(jnp.asarray, batch())
    H, gradient = hessian(config, params, rows)
    scale = np.abs(H).max()
    np.testing.assert_allclose(H, H.T, rtol=0, atol=ROUNDING * scale)
    values = np.linalg.eigvalsh((H + H.T) / 2)

    # Two gradients of Adam, by its own equations in NumPy.
    draw, optim = np.random.default_rng(3), config.optim
    gradients = [gradient, draw.standard_normal(len(gradient))]
    state = updated(config, model, params, gradients)
    found = sharpness(config, params, model.init_model_state(), state, rows)
    tolerance = ROUNDING * max(abs(values)) + found["sharpness_residual"]
    assert found["sharpness"] == pytest.approx(values[-1], abs=tolerance)
    assert found["sharpness_residual"] < 1e-3 * values[-1]

    each = model.map_weights(lambda spec: measured.OPTIMIZERS["adamw"].multipliers(model.cfg, spec))
    filled = jax.tree.map(lambda x, of: np.full(x.shape, of.lr), params, each)
    rates, _ = ravel_pytree(filled)
    eps, _ = ravel_pytree(jax.tree.map(lambda x, of: np.full(x.shape, of.eps), params, each))
    v = np.zeros(len(gradient))
    for g in gradients:
        clipped = g * min(1, optim.clip_norm / np.linalg.norm(g)) / np.asarray(eps, np.float64)
        v = optim.b2 * v + (1 - optim.b2) * clipped**2
    root = np.sqrt(v / (1 - optim.b2**2)) + optim.eps
    P = (1 - optim.b1**2) * root * np.asarray(eps, np.float64) / np.asarray(rates, np.float64)
    preconditioned = np.linalg.eigvalsh((H + H.T) / 2 / np.sqrt(P)[:, None] / np.sqrt(P))
    tolerance = ROUNDING * max(abs(preconditioned)) * 4 + found["preconditioned_sharpness_residual"]
    assert found["preconditioned_sharpness"] == pytest.approx(preconditioned[-1], abs=tolerance)
    assert found["sharpness_bound"] == pytest.approx(38 / (optim.lr * 3 / 10), rel=1e-5)  # the third of 10 updates up


def test_before_the_first_update_p_is_what_this_batch_makes_it():
    config, model, params = model_of("pre_embnorm")
    rows = jax.tree.map(jnp.asarray, batch())
    optimizer = make_optimizer(config.optim, model, numbers_of(config))
    grads, _ = gradients_of(config)(params, rows)
    _, state = optimizer.update(grads, optimizer.init(params), params)
    alone, updated_once = (sharpness(config, params, {}, of, rows) for of in (None, state))
    for name in ("sharpness", "preconditioned_sharpness"):
        assert alone[name] == pytest.approx(updated_once[name], rel=1e-3)
    assert alone["sharpness_bound"] == pytest.approx(2 * updated_once["sharpness_bound"])  # the rate warms up


@pytest.mark.slow
def test_any_mesh_gives_the_same():
    config, _, params = model_of("span")
    rows = jax.tree.map(jnp.asarray, batch())
    alone = sharpness(config, params, {}, None, rows)["sharpness"]
    config = configure(**TINY | DENSE["span"], model__placement="span", mesh__fsdp=2, mesh__tensor=2)
    model = task_of(config).define(config)
    mesh = make_mesh(config.mesh, jax.devices())
    shardings = jax.tree.map(lambda x: x.sharding, abstract_params(model, mesh))
    with jax.set_mesh(mesh):
        spread = sharpness(config, jax.device_put(params, shardings), {}, None, rows)["sharpness"]
    assert spread == pytest.approx(alone, rel=ROUNDING)


def test_lanczos_finds_eigenvalues_that_lie_close_and_says_how_well():
    """Without orthogonalisation a second copy of the largest eigenvalue would come up, and the others late."""
    draw = np.random.default_rng(0)
    values = np.concatenate([[100.0, 99.0, 98.0], draw.uniform(-50, 50, 57)])
    turned, _ = np.linalg.qr(draw.standard_normal((60, 60)))
    matrix = jnp.asarray((turned * values) @ turned.T, jnp.float32)
    like = {"a": jnp.zeros(20), "b": jnp.zeros((4, 10))}
    _, unravel = ravel_pytree(like)
    for iterations, known in ((60, 1e-3), (12, 3.0)):
        alphas, betas = lanczos(lambda v: unravel(matrix @ ravel_pytree(v)[0]), like, jax.random.key(0), iterations)
        found, residual = ritz(alphas, betas)
        assert found == pytest.approx(100, abs=known) and min(abs(values - found)) <= residual + 1e-3
    diagonal = np.diag(alphas) + np.diag(betas[:-1], 1) + np.diag(betas[:-1], -1)
    assert (np.linalg.eigvalsh(diagonal) > 97).sum() <= 3
    assert all(np.isnan(ritz([1.0, np.nan], [0.0, 0.0])))
