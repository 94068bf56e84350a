"""Optimisers and the cosine's schedule, against their equations in float64."""

import math

import jax
import numpy as np
import pytest
import reference
from small_model import (
    BATCH,
    SEQ_LEN,
    assert_trees_close,
    batch,
    configure,
    drawn_params,
    gradients_of,
    program_of,
    start,
)

from spannorm_jax.config import rules
from spannorm_jax.training.numbers import numbers_of
from spannorm_jax.training.optimizer import OPTIMIZERS, learning_rate


def test_each_optimizer_is_a_choice():
    assert set(OPTIMIZERS) == set(rules()["optim.name"].choices)


def cosine_with_warmup(optim, steps, update):
    warmup = round(optim.warmup_fraction * steps)
    if update < warmup:
        return optim.lr * update / warmup
    final = optim.lr * optim.final_lr_fraction
    return final + (optim.lr - final) * (1 + math.cos(math.pi * (update - warmup) / max(steps - warmup, 1))) / 2


@pytest.mark.parametrize(("steps", "warmup"), [(20, 0.25), (20, 0.0), (20, 1.0), (300, 0.1), (1, 0.1), (3, 0.1)])
def test_learning_rate(steps, warmup):
    """Warm-up reaches the peak, the cosine ends at the final rate, and no update is thrown away on a rate of zero."""
    config = configure(
        training__steps=steps, optim__warmup_fraction=warmup, optim__lr=0.3, optim__final_lr_fraction=0.2
    )
    rates = [float(learning_rate(config.optim.schedule, numbers_of(config), update)) for update in range(1, steps + 1)]
    want = [cosine_with_warmup(config.optim, steps, update) for update in range(1, steps + 1)]
    # float32: the end of the warm-up is found as peak - (peak - 0) * remaining share, so 6e-8 of the peak at any rate.
    np.testing.assert_allclose(rates, want, rtol=2e-6, atol=1.2e-7 * 0.3)
    assert min(rates) > 0
    peak = round(warmup * steps)
    if peak:
        assert rates[peak - 1] == max(rates) == pytest.approx(0.3)
    if peak < steps:
        assert rates[-1] == pytest.approx(0.06)


def decayed(params, tied_head=False):
    """1 for each weight that decays, by its path: matrices and the head, which a tied embedding is."""

    def decays(path):
        name = jax.tree_util.keystr(path)
        return "gain" not in name and (tied_head or "embed" not in name)

    return jax.tree.map_with_path(lambda path, _: float(decays(path)), params)


@pytest.mark.parametrize(
    ("placement", "tied_head", "clip_norm"), [("pre", False, 0.05), ("span", True, 0.0), ("post", False, 1e6)]
)
def test_updates_are_those_of_adamw(placement, tied_head, clip_norm):
    """Four updates against AdamW in float64: decay on matrices and head but not on norms and embeddings, clipping by
    the global norm before the moments, bias correction, and the rate of the update's number.

    Each update starts from the package's gradient, so only the optimiser is compared. A tied embedding is the head's
    matrix, and decays. Largest error seen 4.2e-6 of a leaf's largest update.
    """
    config = configure(
        model__placement=placement,
        model__tied_head=tied_head,
        optim__clip_norm=clip_norm,
        optim__warmup_fraction=0.1,
        optim__lr=0.03,
        optim__weight_decay=0.5,
        optim__eps=1e-4,
        optim__b1=0.8,
    )
    optim, program, gradient = config.optim, program_of(config), gradients_of(config)
    state = start(program, drawn_params(placement, tied_head))
    decay = decayed(drawn_params(placement, tied_head), tied_head)
    m = v = jax.tree.map(lambda p: np.zeros(p.shape), drawn_params(placement, tied_head))
    clipped = 0
    for update in range(1, 5):
        before = reference.to_float64(jax.device_get(state.params))
        g = reference.to_float64(jax.device_get(gradient(state.params, batch(update))[0]))
        state, metrics = program.train(state, batch(update), numbers_of(config))
        rate = cosine_with_warmup(optim, 20, update)
        assert float(metrics["scalars"]["lr"]) == pytest.approx(rate, rel=1e-6)
        assert int(state.step) == update
        norm = math.sqrt(sum(np.sum(x**2) for x in jax.tree.leaves(g)))
        assert float(metrics["scalars"]["grad_norm"]) == pytest.approx(norm, rel=1e-5)  # before clipping
        if clip_norm and norm > clip_norm:
            clipped += 1
            g = jax.tree.map(lambda x, s=clip_norm / norm: x * s, g)
        m = jax.tree.map(lambda m, g: 0.8 * m + 0.2 * g, m, g)
        v = jax.tree.map(lambda v, g: 0.95 * v + 0.05 * g**2, v, g)

        def step(p, m, v, decay, t=update, rate=rate):
            adam = m / (1 - 0.8**t) / (np.sqrt(v / (1 - 0.95**t)) + 1e-4)
            return -rate * (adam + 0.5 * decay * p)

        want = jax.tree.map(step, before, m, v, decay)
        got = jax.tree.map(lambda a, b: np.asarray(a, np.float64) - b, jax.device_get(state.params), before)
        # The subtraction of float32 weights of size 1 costs 1e-7 against updates of size 0.01.
        assert_trees_close(got, want, 2e-5)
    assert clipped == (4 if clip_norm == 0.05 else 0)


def test_updates_are_those_of_lion():
    """Three updates against Lion in float64: the sign of the mean of moment and gradient, then decay; the moment after.

    Each update starts from the package's gradient, clipped here. A sign is compared where what it is of stands clear
    of rounding, which is nearly everywhere. Largest error seen 1.4e-6 of a leaf's largest update.
    """
    changes = {"optim__lr": 0.03, "optim__weight_decay": 0.5, "optim__b1": 0.8, "optim__b2": 0.9}
    config = configure(optim__name="lion", optim__clip_norm=0.05, **changes)
    program, gradient = program_of(config), gradients_of(config)
    state, decay = start(program, drawn_params()), decayed(drawn_params())
    m = jax.tree.map(lambda p: np.zeros(p.shape), drawn_params())
    for update in range(1, 4):
        before = reference.to_float64(jax.device_get(state.params))
        g = reference.to_float64(jax.device_get(gradient(state.params, batch(update))[0]))
        state, _ = program.train(state, batch(update), numbers_of(config))
        norm = math.sqrt(sum(np.sum(x**2) for x in jax.tree.leaves(g)))
        assert norm > 0.05
        g = jax.tree.map(lambda x, s=0.05 / norm: x * s, g)
        mean = jax.tree.map(lambda m, g: 0.8 * m + 0.2 * g, m, g)
        m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, g)
        rate = cosine_with_warmup(config.optim, 20, update)
        clear = jax.tree.map(lambda x: (np.abs(x) > 1e-5 * np.abs(x).max()) | (x == 0), mean)
        assert all(x.mean() > 0.995 for x in jax.tree.leaves(clear))
        want = jax.tree.map(lambda p, x, decay, r=rate: -r * (np.sign(x) + 0.5 * decay * p), before, mean, decay)
        got = jax.tree.map(lambda a, b: np.asarray(a, np.float64) - b, jax.device_get(state.params), before)
        where_clear = [jax.tree.map(np.multiply, tree, clear) for tree in (got, want)]
        assert_trees_close(*where_clear, 1e-5)


def test_the_embedding_of_an_unseen_token_stays_as_it_was():
    """Neither decay nor Adam moves what has no gradient: a mistaken decay mask would."""
    config = configure(optim__weight_decay=0.5)
    program = program_of(config)
    before = drawn_params()["embed"]
    alike = {"tokens": np.full((BATCH, SEQ_LEN + 1), 7, np.int32)}
    state, _ = program.train(start(program, drawn_params()), alike, numbers_of(config))
    after = np.asarray(state.params["embed"])
    assert (after[7] != before[7]).any()
    np.testing.assert_array_equal(np.delete(after, 7, 0), np.delete(before, 7, 0))
