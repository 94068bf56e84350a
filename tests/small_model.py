"""A model that compiles in a moment, with its program, batches and weights, for the tests of the train step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from spannorm_jax.config import Config, replace
from spannorm_jax.model.definition import define
from spannorm_jax.parallel.mesh import make_mesh
from spannorm_jax.resolution import resolve
from spannorm_jax.run.state import TrainState
from spannorm_jax.training.numbers import numbers_of
from spannorm_jax.training.step import gradients, make_program
from spannorm_jax.training.tasks.text import loss_sums

VOCAB, SEQ_LEN, BATCH = 32, 8, 8


def configure(**changes):
    config = replace(
        Config(), model__depth=2, model__width=16, data__seq_len=SEQ_LEN, training__batch_size=BATCH, training__steps=20
    )
    return resolve(replace(config, **changes), vocab_size=VOCAB, platform="cpu", fingerprint="none")


def program_of(config):
    return make_program(config, define(config.model, config.execution), make_mesh(config.mesh, jax.devices()[:1]))


def batch(seed=0, rows=BATCH):
    return {"tokens": np.random.default_rng(seed).integers(VOCAB, size=(rows, SEQ_LEN + 1)).astype(np.int32)}


def gradients_of(config):
    """(params, batch) -> (gradients, loss sums), under jit."""
    model = define(config.model, config.execution)
    return jax.jit(lambda params, batch: gradients(config, model, params, {}, batch, loss_sums, numbers_of(config)))


@functools.cache
def drawn_params(placement="span", tied_head=False):
    """Weights with gains apart from one and every gradient of a visible size."""
    model = define(configure(model__placement=placement, model__tied_head=tied_head).model)
    rng = np.random.default_rng(0)

    def draw(spec):
        norm = spec.role == "norm"
        return (rng.uniform(0.5, 1.5, spec.shape) if norm else 0.3 * standard_normal(rng, spec)).astype(np.float32)

    return model.map_weights(draw)


def start(program, params):
    """The state of a run that starts from these weights: no updates, moments of zero. (`init` takes compiling.)"""
    zeros = jax.tree.map(lambda x: jax.device_put(jnp.zeros(x.shape, x.dtype), x.sharding), program.abstract_state)
    params = jax.tree.map(lambda x, a: jax.device_put(jnp.array(x), a.sharding), params, program.abstract_state.params)
    return TrainState(zeros.step, params, zeros.opt_state, zeros.model_state)


def assert_trees_close(got, want, tolerance):
    """Each leaf within `tolerance` of its own largest entry."""

    def close(path, a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max(), err_msg=jax.tree_util.keystr(path))

    jax.tree.map_with_path(close, got, want)


def standard_normal(rng, spec):
    """NumPy's numbers for a weight. Its `parts` are drawn after the inputs, wherever they lie."""
    if "parts" not in spec.axes:
        return rng.standard_normal(spec.shape)
    part, shape = spec.axes.index("parts"), list(spec.shape)
    shape[part : part + 2] = shape[part + 1], shape[part]
    return rng.standard_normal(shape).swapaxes(part, part + 1)
