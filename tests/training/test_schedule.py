"""Schedules and the run's length, in closed form. (The cosine's is beside the optimiser's tests.)"""

import numpy as np
import pytest

from spannorm_jax.config import Config, replace
from spannorm_jax.resolution import resolve
from spannorm_jax.training import optimizer
from spannorm_jax.training.numbers import numbers_of
from spannorm_jax.validation import validate

SEQ_LEN = 12


def make_config(**changes):
    small = {"model__depth": 2, "model__width": 16, "model__num_heads": 2, "data__seq_len": SEQ_LEN}
    config = replace(Config(), **{"training__steps": 20} | small | changes)
    return resolve(config, vocab_size=256, platform="cpu", fingerprint="")


def learning_rate(config, update):
    return optimizer.learning_rate(config.optim.schedule, numbers_of(config), update)


def test_wsd_warms_up_stays_and_decays_in_straight_lines():
    shape = {"optim__warmup_fraction": 0.2, "optim__decay_fraction": 0.3, "optim__final_lr_fraction": 0.1}
    config = make_config(training__steps=100, optim__lr=0.5, optim__schedule="wsd", **shape)
    rates = np.array([float(learning_rate(config, s)) for s in range(1, 101)])
    s = np.arange(1, 101)
    want = np.where(s <= 20, 0.5 * s / 20, np.where(s <= 70, 0.5, 0.5 * (1 - 0.9 * (s - 70) / 30)))
    np.testing.assert_allclose(rates, want, rtol=1e-6)

    def ends(**changes):
        config = make_config(training__steps=3, optim__lr=0.5, optim__schedule="wsd", **shape | changes)
        return [float(learning_rate(config, s)) for s in (1, 2, 3)]

    # No decay: the peak to the end. Halves of three updates round to two and two: the warm-up keeps its two.
    assert ends(optim__warmup_fraction=0.0, optim__decay_fraction=0.0) == pytest.approx([0.5, 0.5, 0.5])
    assert ends(optim__warmup_fraction=0.5, optim__decay_fraction=0.5) == pytest.approx([0.25, 0.5, 0.05])
    assert ends(optim__warmup_fraction=0.0, optim__decay_fraction=1.0) == pytest.approx([0.35, 0.2, 0.05])


@pytest.mark.parametrize(("tokens", "steps"), [(1, 1), (96, 1), (97, 2), (960, 10), (961, 11)])
def test_tokens_become_the_least_steps_that_see_them(tokens, steps):
    """An update sees 8 x 12 = 96 tokens. The resolved config holds both numbers, is valid, and resolves to itself."""
    config = make_config(training__steps=0, training__tokens=tokens, optim__warmup_fraction=0.0)
    assert (config.training.steps, config.training.tokens) == (steps, tokens)
    validate(config)
    assert resolve(config, vocab_size=256, platform="cpu", fingerprint="") == config
    by_steps = make_config(training__steps=steps, optim__warmup_fraction=0.0)
    for update in (1, steps):
        assert learning_rate(config, update) == learning_rate(by_steps, update)
