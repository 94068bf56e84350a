"""Options and their rules: none is without a range, and what is out of range is refused in one line."""

import math

import pytest

from spannorm_jax.config import Config, flatten, is_runtime, replace, rules
from spannorm_jax.errors import UserError
from spannorm_jax.model.kernels import attention
from spannorm_jax.model.moe import grouped_matmul
from spannorm_jax.validation import validate

OPTIONS = flatten(Config())
NUMBERS = [key for key, value in OPTIONS.items() if isinstance(value, int | float) and not isinstance(value, bool)]
# What may be any number or text, and why.
FREE = {
    "training.steps": "0 with training.tokens, else 1 or more: a combination",
    **dict.fromkeys(("model.placement", "model.init"), "a key of a table that needs no JAX"),
    **dict.fromkeys(("data.tokenizer_hash", "data.fingerprint"), "a hash"),
    **dict.fromkeys(("data.data_dir", "data.cache_dir"), "a folder"),
    "data.tokenizer_file": "a file",
    "metrics.wandb_project": "Weights & Biases decides",
}


def changed(key, value):
    return replace(Config(), **{key.replace(".", "__"): value})


@pytest.mark.parametrize("key", OPTIONS)
def test_an_option_has_a_range_or_choices_or_a_reason_to_have_none(key):
    rule, value = rules().get(key), OPTIONS[key]
    if isinstance(value, bool | tuple):
        return
    limited = rule and (rule.least > -math.inf if key in NUMBERS else rule.choices or rule.names_file)
    assert bool(limited) != (key in FREE), key


@pytest.mark.parametrize("key", [key for key in NUMBERS if key in rules()])
def test_a_number_out_of_range_is_refused_and_its_bounds_are_not(key):
    """One step below the least and above the most; the config may contradict itself otherwise, which is no matter."""
    rule, kind = rules()[key], type(OPTIONS[key])
    if rule.least == -math.inf:
        return
    for value in (rule.least - 1, *([rule.most + 1] if rule.most < math.inf else [])):
        with pytest.raises(UserError, match=f"config key {key}={kind(value)} "):
            validate(changed(key, kind(value)))
    try:
        validate(changed(key, kind(rule.least)))
    except UserError as error:
        assert f"config key {key}=" not in str(error) or "too small" not in str(error)


@pytest.mark.parametrize("key", [key for key, rule in rules().items() if rule.choices])
def test_a_choice_that_is_none_is_refused_with_the_nearest(key):
    choice = rules()[key].choices[-1]
    with pytest.raises(UserError, match=f"config key {key}='{choice}x' is unknown; did you mean '{choice}'"):
        validate(changed(key, choice + "x"))
    base = {"model__base_width": 64, "model__base_depth": 24}  # which a parametrisation needs
    base |= {"task": "image"} if key.startswith("image.") else {}
    validate(replace(changed(key, choice), **base))


@pytest.mark.parametrize(
    ("key", "names"),
    [
        ("execution.attention", ["auto", *attention.IMPLEMENTATIONS]),
        ("execution.grouped_matmul", ["auto", *grouped_matmul.IMPLEMENTATIONS]),
    ],
)
def test_choices_are_the_names_of_what_there_is(key, names):
    assert sorted(rules()[key].choices) == sorted(names)


def test_what_may_change_when_a_run_goes_on():
    """How a run is run, and nothing of what it is."""
    runtime = {key for key in OPTIONS if is_runtime(key)}
    assert {"mesh.fsdp", "checkpoint.keep_last", "metrics.log_every", "platform", "data.cache_dir"} <= runtime
    assert {key for key in OPTIONS if key.startswith(("execution.", "eval."))} <= runtime
    assert runtime.isdisjoint({"seed", "model.depth", "model.dtype", "optim.lr", "training.batch_size", "data.seq_len"})
