"""Numbers are arguments of the train step: other ones compile nothing, are really read, and do what constants did."""

import functools

import jax
import numpy as np
import optax
import pytest
from small_model import assert_trees_close, batch, configure, drawn_params, gradients_of, program_of, start

from spannorm_jax.config import replace
from spannorm_jax.model.definition import define
from spannorm_jax.training.numbers import numbers_of
from spannorm_jax.training.program_key import BEGINNING, NUMBERS, program_key

# Five updates of six see all of a schedule: two of warm-up, one at the peak, and the decay.
SHAPES = {
    "dense": {
        "training__steps": 6,
        "optim__schedule": "wsd",
        "optim__warmup_fraction": 0.34,
        "optim__decay_fraction": 0.5,
        "optim__eps": 1e-3,  # so that Adam does not undo what clipping does
        "optim__clip_norm": 0.5,
    }
}
SHAPES["cosine"] = SHAPES["dense"] | {"optim__schedule": "cosine"}
SHAPES["aux_loss"] = SHAPES["dense"] | {"model__moe__num_experts": 4, "model__moe__balance": "aux_loss"}
SHAPES["muon"] = SHAPES["dense"] | {"optim__name": "muon"}
SHAPES["bias"] = SHAPES["aux_loss"] | {"model__moe__balance": "bias"}
CASES = [
    ("dense", "optim__lr", 0.01),
    ("dense", "training__steps", 12),
    ("cosine", "training__steps", 7),
    ("dense", "optim__warmup_fraction", 0.0),
    ("dense", "optim__decay_fraction", 0.0),
    ("dense", "optim__final_lr_fraction", 0.5),
    ("dense", "optim__b1", 0.8),
    ("dense", "optim__b2", 0.9),
    ("muon", "optim__muon_momentum", 0.5),
    ("dense", "optim__eps", 1e-2),
    ("dense", "optim__weight_decay", 0.0),
    ("dense", "optim__decay_coupling", "independent"),
    ("dense", "optim__clip_norm", 1.0),
    ("dense", "optim__clip_norm", 0.0),
    ("dense", "training__z_loss", 0.1),
    ("aux_loss", "model__moe__aux_loss", 0.0),
    ("aux_loss", "model__moe__router_z_loss", 0.1),
    ("bias", "model__moe__bias_rate", 0.1),
]


@functools.cache
def program(shape):
    return program_of(configure(**SHAPES[shape]))


def final_params(shape, numbers):
    state = program(shape).init(0)
    for update in range(1, 6):
        state, metrics = program(shape).train(state, batch(update), numbers)
    assert np.isfinite(metrics["scalars"]["loss"])
    return jax.device_get(state.params)


@functools.cache
def usual_params(shape):
    return final_params(shape, numbers_of(configure(**SHAPES[shape])))


@functools.cache
def lowered(config):
    made = program_of(config)
    return made.train.lower(made.abstract_state, batch(), numbers_of(config)).as_text()


def test_each_number_has_a_case():
    moved = set()
    for shape, key, value in CASES:
        config = configure(**SHAPES[shape])
        usual, other = numbers_of(config).values, numbers_of(replace(config, **{key: value})).values
        moved |= {name for name in usual if usual[name] != other[name]}
    assert moved == set(usual)


@pytest.mark.parametrize(("shape", "key", "value"), CASES)
def test_another_number_compiles_nothing_and_changes_the_weights(shape, key, value):
    usual = usual_params(shape)
    other = final_params(shape, numbers_of(configure(**SHAPES[shape] | {key: value})))
    assert program(shape).train._cache_size() == 1
    assert not all(jax.tree.leaves(jax.tree.map(np.array_equal, usual, other)))


@pytest.mark.parametrize(("shape", "key", "value"), CASES)
def test_a_program_holds_no_number(shape, key, value):
    """Its text, which the cache on disk goes by, is that of another config's to the letter."""
    assert lowered(configure(**SHAPES[shape])) == lowered(configure(**SHAPES[shape] | {key: value}))


def test_the_options_that_leave_a_program_as_it_is_are_listed():
    """Those of the cases, training.tokens, which stands for training.steps, and those of a run's beginning."""
    assert {key.replace("__", ".") for _, key, _ in CASES} == {*NUMBERS} - {"training.tokens"}
    usual = configure(**SHAPES["dense"])
    beginning = {
        "seed": 5,
        "model__init": "gpt2",
        "model__init_targets": ("ffn_out",),
        "model__variance_budget": 2.0,
        "model__variance_exponent": 1.0,
        "model__depth_factor": "multiplier",  # of ScaleInit alone
    }
    assert {key.replace("__", ".") for key in beginning} == {*BEGINNING}
    other = configure(**SHAPES["dense"] | beginning | {"optim__lr": 0.01})
    assert program_key(other) == program_key(usual) and lowered(other) == lowered(usual)
    multiplied = configure(**SHAPES["dense"] | {"model__depth_factor": "multiplier"})  # a constant of the step
    assert program_key(multiplied) != program_key(usual) and lowered(multiplied) != lowered(usual)
    assert program_key(configure(**SHAPES["dense"] | {"optim__name": "lion"})) != program_key(usual)


@pytest.mark.parametrize("clip_norm", [0.0, 0.5])
@pytest.mark.parametrize("schedule", ["wsd", "cosine"])
def test_updates_are_those_of_optax_with_constants(schedule, clip_norm):
    """Four updates of AdamW with Python's numbers and optax's own schedules, from the package's gradients.

    1 - b2 is taken in float32 here, and so may be off by 2^-25 / 0.05 = 6e-7 of itself. The subtraction of weights of
    size 1 costs 6e-8 against updates of 0.015. Largest error seen 4.3e-6 of a leaf's largest update.
    """
    changes = {"optim__schedule": schedule, "optim__clip_norm": clip_norm, "optim__lr": 0.03}
    config = configure(**SHAPES["dense"] | changes)
    optim, model, program = config.optim, define(config.model, config.execution), program_of(config)
    if schedule == "wsd":
        decay = [optax.constant_schedule(optim.lr), optax.linear_schedule(optim.lr, 0.1 * optim.lr, 3)]
    else:
        decay = [optax.cosine_decay_schedule(optim.lr, 4, 0.1)]
    rate = optax.join_schedules([optax.linear_schedule(0.0, optim.lr, 2), *decay], [2, 3])
    decayed = model.map_weights(lambda spec: spec.role not in ("norm", "embedding"))
    adamw = optax.adamw(lambda n: rate(n + 1), optim.b1, optim.b2, optim.eps, weight_decay=0.1, mask=decayed)
    former = optax.chain(optax.clip_by_global_norm(clip_norm), adamw) if clip_norm else adamw
    gradient = gradients_of(config)
    state = start(program, drawn_params())
    moments, update_former = former.init(state.params), jax.jit(former.update)
    for update in range(1, 5):
        before = jax.device_get(state.params)
        want, moments = update_former(gradient(state.params, batch(update))[0], moments, state.params)
        state, metrics = program.train(state, batch(update), numbers_of(config))
        assert float(metrics["scalars"]["grad_norm"]) > 0.5  # so that clipping clips
        assert float(metrics["scalars"]["lr"]) == pytest.approx(float(rate(update)), rel=1e-6)
        got = jax.tree.map(lambda a, b: np.asarray(a, np.float64) - b, jax.device_get(state.params), before)
        assert_trees_close(got, want, 1e-5)
