"""Updates that differ by weight: rates, eps and decay of a parametrisation, decay apart from the rate, and Muon.

Each against its equations in float64, from the package's own gradients.
"""

import dataclasses
import math

import chex
import jax
import numpy as np
import pytest
import reference
from small_model import assert_trees_close, batch, configure, gradients_of, program_of, start

from spannorm_jax.config import replace
from spannorm_jax.errors import UserError
from spannorm_jax.model.definition import define
from spannorm_jax.model.weights import WeightSpec
from spannorm_jax.parallel.mesh import make_mesh
from spannorm_jax.run.checkpoint import Checkpoints
from spannorm_jax.training.muon import matrix_axes, muon_multipliers
from spannorm_jax.training.numbers import numbers_of
from spannorm_jax.training.optimizer import learning_rate, make_optimizer
from spannorm_jax.training.step import make_program

RATES = {"optim__lr": 0.03, "optim__weight_decay": 0.5, "optim__b1": 0.8, "optim__eps": 1e-3, "optim__clip_norm": 0.0}
# m = 2, l = 2, a = 0.5: rate, decay and eps by hand, of gains and matrices in blocks, of others.
WIDER = {
    "model__parametrisation": "completep",
    "model__base_width": 8,
    "model__base_depth": 1,
    "model__depth_exponent": 0.5,
}
IN_BLOCKS, MATRIX = (2**-0.5, 1, 2**-0.5 / 2), (2**-0.5 / 2, 2, 2**-0.5 / 2)
OUTSIDE = (1, 1, 1 / 2)


def gains_apart(model, seed=0):
    """Weights with gains apart from one and every gradient of a visible size."""
    rng = np.random.default_rng(seed)

    def draw(spec):
        norm = spec.role == "norm"
        return (rng.uniform(0.5, 1.5, spec.shape) if norm else 0.3 * rng.standard_normal(spec.shape)).astype(np.float32)

    return model.map_weights(draw)


def run(config, updates):
    """Yields (weights before, gradient, weights after, number) of each update, in float64."""
    model, program = define(config.model, config.execution), program_of(config)
    gradient = gradients_of(config)
    # Muon keeps its coefficients in its state, so that zeros would not do for one.
    state = program.init(0)
    state = dataclasses.replace(state, params=start(program, gains_apart(model)).params)
    for update in range(1, updates + 1):
        before = reference.to_float64(jax.device_get(state.params))
        g = reference.to_float64(jax.device_get(gradient(state.params, batch(update))[0]))
        state, _ = program.train(state, batch(update), numbers_of(config))
        yield before, g, reference.to_float64(jax.device_get(state.params)), update


def names(tree):
    return jax.tree.map_with_path(lambda path, _: "/".join(key.key for key in path), tree)


@pytest.mark.parametrize("coupling", ["coupled", "independent"])
def test_adamw_with_rates_eps_and_decay_by_weight(coupling):
    """Three updates under completep, twice as wide and deep as its base; the gains `after_ffn` decay too.

    Independent decay is weight_decay times the schedule's shape, whatever the rate. Largest error seen 6e-6 of a leaf's
    largest update.
    """
    config = configure(**RATES | WIDER, optim__decay_coupling=coupling, optim__decay_gains=("after_ffn",))
    m = v = None
    for before, g, after, t in run(config, 3):
        rate = float(learning_rate("cosine", numbers_of(config), t))
        shrink = rate if coupling == "coupled" else rate / 0.03
        m = jax.tree.map(lambda g, m: 0.8 * m + 0.2 * g, g, m or jax.tree.map(np.zeros_like, g))
        v = jax.tree.map(lambda g, v: 0.95 * v + 0.05 * g**2, g, v or jax.tree.map(np.zeros_like, g))

        def step(name, p, m, v, t=t, rate=rate, shrink=shrink):
            in_blocks, gain = name.startswith("blocks"), name.endswith("gain")
            lr, decay, eps = (IN_BLOCKS if gain else MATRIX) if in_blocks else OUTSIDE
            decays = name == "head" or "after_ffn" in name or (in_blocks and not gain)
            adam = m / (1 - 0.8**t) / (np.sqrt(v / (1 - 0.95**t)) + eps * 1e-3)
            return -lr * (rate * adam + shrink * 0.5 * decay * decays * p)

        want = jax.tree.map(step, names(before), before, m, v)
        assert_trees_close(jax.tree.map(np.subtract, after, before), want, 2e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_weights_that_keep_their_norm_turn_as_an_update_moves_them(optimizer):
    """Of each block, experts together, after one update; after three the norms are those of the start."""
    sites = ("attn_out", "ffn_out")
    moe = {"num_experts": 4, "expert_dim": 8, "every": 2}
    config = configure(**RATES, optim__name=optimizer, **{f"model__moe__{key}": value for key, value in moe.items()})
    free, held = (list(run(c, 3)) for c in (config, replace(config, optim__hold_norms=sites)))
    model = define(config.model, config.execution)

    def norms(w):
        return np.sqrt(np.sum(np.square(w), axis=tuple(range(1, w.ndim)), keepdims=True))

    def check(spec, before, after_free, after, last):
        if spec.site not in (*sites, "expert_out"):
            np.testing.assert_allclose(after, after_free, rtol=1e-5, atol=1e-6)
            return
        np.testing.assert_allclose(after, after_free * norms(before) / norms(after_free), rtol=1e-5, atol=1e-6)
        assert np.all(np.abs(norms(after_free) / norms(before) - 1) > 1e-3)
        np.testing.assert_allclose(norms(last), norms(before), rtol=1e-6)

    model.map_weights(check, held[0][0], free[0][2], held[0][2], held[-1][2])


# ---- Muon ---------------------------------------------------------------------------------------------


def newton_schulz(x):
    """Five steps of Jordan's quintic on one matrix."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = x / np.linalg.norm(x)
    for _ in range(5):
        x = a * x + b * x @ x.T @ x + c * x @ x.T @ x @ x.T @ x
    return x


def orthogonal(name, x):
    """Each matrix of a stacked weight by itself, times 0.2 sqrt(its longer side)."""
    leaf = name.split("/")[-1]
    # Of each weight the axes of batches, after which two are left: layers and heads (D, H, K) or (H, K, D), ...
    batch_axes = {"q": (0, 2), "k": (0, 2), "v": (0, 2), "out": (0,), "in_": (0, 1), "router": (0,)}[leaf]
    if "attn" in name and leaf == "out":
        batch_axes = (0, 1)
    if name.startswith("moe") and "ffn" in name and leaf in ("in_", "out"):
        batch_axes = (0, 1, 2) if leaf == "in_" else (0, 1)
    moved = np.moveaxis(x, batch_axes, range(len(batch_axes)))
    flat = moved.reshape(-1, *moved.shape[-2:])
    made = np.stack([newton_schulz(matrix) * 0.2 * math.sqrt(max(matrix.shape)) for matrix in flat])
    return np.moveaxis(made.reshape(moved.shape), range(len(batch_axes)), batch_axes)


MUON = {"optim__name": "muon", "model__moe__num_experts": 2, "model__moe__every": 2, "model__moe__aux_loss": 0.0}


def test_muon_orthogonalises_each_matrix_by_itself():
    """Two updates of a dense block and one with experts: Newton-Schulz in float64, a loop over layers, heads, experts
    and parts; AdamW for embedding, head and gains; decay for matrices and head.

    Newton-Schulz in float32 lets small singular values, and their rounding, grow 3.4 times a step. Largest error seen
    9e-6 of a leaf's largest update.
    """
    config = configure(**MUON | RATES)
    m = v = None
    for before, g, after, t in run(config, 2):
        rate = float(learning_rate("cosine", numbers_of(config), t))
        zeros = jax.tree.map(np.zeros_like, g)
        of_muon = jax.tree.map(lambda name: "blocks" in name and "gain" not in name, names(g))
        m = jax.tree.map(
            lambda g, m, b: b * m + (1 - b) * g, g, m or zeros, jax.tree.map(lambda x: 0.95 if x else 0.8, of_muon)
        )
        v = jax.tree.map(lambda g, v: 0.95 * v + 0.05 * g**2, g, v or zeros)

        def step(name, muon, p, g, m, v, t=t, rate=rate):
            if muon:  # Nesterov: the mean as the next update will see it
                direction = orthogonal(name, 0.95 * m / (1 - 0.95 ** (t + 1)) + 0.05 * g / (1 - 0.95**t))
            else:
                direction = m / (1 - 0.8**t) / (np.sqrt(v / (1 - 0.95**t)) + 1e-3)
            decays = name == "head" or (muon and "router" not in name)
            return -rate * (direction + 0.5 * decays * p)

        want = jax.tree.map(step, names(before), of_muon, before, g, m, v)
        assert_trees_close(jax.tree.map(np.subtract, after, before), want, 1e-4)


def test_muon_has_lanes_and_its_state_lies_as_its_weights_do():
    """Two learning rates as lanes of one update give each what it gives alone; momentum is sharded as its weight."""
    config = configure(**MUON)
    model = define(config.model, config.execution)
    params, grads = gains_apart(model), gains_apart(model, seed=1)
    both = [
        numbers_of(replace(config, optim__lr=lr, optim__muon_momentum=beta)) for lr, beta in ((0.1, 0.9), (0.2, 0.5))
    ]

    def update(numbers):
        optimizer = make_optimizer(config.optim, model, numbers)
        return optimizer.update(grads, optimizer.init(params), params)[0]

    lanes = jax.jit(jax.vmap(update))(jax.tree.map(lambda *xs: np.stack(xs), *both))
    for i, numbers in enumerate(both):
        assert_trees_close(jax.tree.map(lambda x, i=i: x[i], lanes), jax.jit(update)(numbers), 1e-4)
    mesh = make_mesh(replace(config, mesh__fsdp=2, mesh__tensor=2).mesh, jax.devices()[:4])
    state = make_program(config, model, mesh).abstract_state
    found = jax.tree_util.tree_flatten_with_path(state.opt_state)[0]
    momenta = {jax.tree_util.keystr(path): x for path, x in found if ".mu[" in jax.tree_util.keystr(path)}
    of_weights = {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_flatten_with_path(state.params)[0]}
    assert len(momenta) == len(of_weights)
    for name, x in momenta.items():
        own = of_weights[name.split(".mu")[1]]
        assert (x.shape, x.sharding) == (own.shape, own.sharding)


def test_muon_goes_on_from_a_checkpoint(tmp_path):
    config = configure(optim__name="muon")
    program = program_of(config)
    state, _ = program.train(program.init(0), batch(0), numbers_of(config))
    checkpoints = Checkpoints(tmp_path, config.checkpoint)
    checkpoints.save(1, state, {"step": 1})
    checkpoints.wait()
    restored = checkpoints.restore(1, program.abstract_state)
    checkpoints.close()
    chex.assert_trees_all_equal(state, restored)


def test_muon_refuses_what_is_no_matrix():
    vector = WeightSpec((2, 16), ("layers", "embed"), "hidden", "bias", fan_in=1, fan_out=16, start=None)
    with pytest.raises(UserError, match=r"optim.name=muon .* weight bias") as refused:
        matrix_axes(vector)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("heads_grow", "rate"), [(False, 1 / 4), (True, 1 / 2)])
def test_muons_rates_go_by_what_its_updates_do(heads_grow, rate):
    """Four times as wide, the rate is divided by what an update does more to outputs.

    Of one input x the gradient is x y^T, and the orthogonal update x y^T / (|x| |y|). It changes that input's output by
    |x| / |y| an entry, times 0.2 sqrt(longer side), summed over the heads that one output sums.
    """

    def change(width, heads):
        sides = {
            "q": (width, width // heads, 1),
            "attn_out": (width // heads, width, heads),
            "ffn_in": (width, 3 * width, 1),
        }
        return {site: 0.2 * max(r, o) ** 0.5 * (r / o) ** 0.5 * copies for site, (r, o, copies) in sides.items()}

    heads = 4 if heads_grow else 16
    base = {"model__base_width": 16, "model__base_head_dim": 4 if heads_grow else 0}
    sizes = {"model__width": 64, "model__num_heads": heads, "model__ffn_dim": 192, "model__parametrisation": "mup"}
    cfg = configure(**sizes, **base).model
    specs = {spec.site: spec for spec in define(cfg).specs()}
    wide, narrow = change(64, heads), change(16, 4)
    for site in ("q", "attn_out", "ffn_in"):
        of = muon_multipliers(cfg, specs[site])
        assert of.lr == pytest.approx(narrow[site] / wide[site]) and of.lr * of.decay == pytest.approx(1)
    assert muon_multipliers(cfg, specs["q"]).lr == pytest.approx(rate)
    assert muon_multipliers(cfg, specs["ffn_in"]).lr == pytest.approx(1 / 2)
