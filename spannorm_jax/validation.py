"""What makes a config valid: the rules of single options, and combinations that contradict one another."""

import dataclasses
import math
from typing import Any

from spannorm_jax.config import MAX_FLOAT, MAX_INT, MIN_FLOAT, Config, Rule, divisors, flatten, rules, unread
from spannorm_jax.errors import UserError, did_you_mean
from spannorm_jax.model.parametrisation import PARAMETRISATIONS
from spannorm_jax.model.placement import placement_of
from spannorm_jax.resolution import fill_sizes, num_steps


def validate(config: Config) -> None:
    """Raises UserError for the first value that is out of range or contradicts another."""
    known = rules()
    for key, value in flatten(config).items():
        _check(key, value, known.get(key, Rule()))
    if config.data.tokenizer_file and config.data.tokenizer != "bpe":
        raise UserError(
            f"config key data.tokenizer_file={config.data.tokenizer_file!r} is of a BPE; write data.tokenizer=bpe too"
        )
    _validate_shapes(config)
    _validate_images(config)
    _validate_length(config)
    _validate_moe(config)
    _validate_parametrisation(config)


def _check(key: str, value: Any, rule: Rule) -> None:
    wrong = ""
    if isinstance(value, str):
        if rule.choices and value not in rule.choices:
            raise UserError(f"config key {key}={value!r} is unknown; {did_you_mean(value, rule.choices)}")
        if rule.names_file and len(value.encode()) > 200:
            raise UserError(f"config key {key}={value!r} is too long for the name of a file; write 200 bytes at most")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        most = MAX_INT if isinstance(value, int) and rule.most == math.inf and not rule.unbounded else rule.most
        nearest = rule.below - 2**-24  # what is nearer to `below` is equal to it in float32
        if rule.below < math.inf and not rule.least <= value <= nearest:
            wrong = f"must be at least {rule.least} and below {rule.below}, also in float32"
        elif isinstance(value, float) and most < math.inf and not rule.least <= value <= most:
            wrong = f"must be between {rule.least} and {most}"
        elif value < rule.least:
            wrong = f"is too small{': ' * bool(rule.why)}{rule.why}; write {rule.least} or more"
        elif value > most:
            wrong = f"is too large; write {most} or less"
        elif isinstance(value, float) and 0 < abs(value) < MIN_FLOAT:  # a clip_norm of 0 / 0 would be no number
            wrong = f"vanishes in float32; write 0, or {MIN_FLOAT} or more"
    if wrong:
        raise UserError(f"config key {key}={value} {wrong}")


def _validate_moe(config: Config) -> None:
    moe, depth = config.model.moe, config.model.depth
    if not moe.num_experts:
        return
    if moe.top_k > moe.num_experts:
        raise UserError(
            f"config key model.moe.top_k={moe.top_k} is above model.moe.num_experts={moe.num_experts}; "
            f"write {moe.num_experts} or less"
        )
    if moe.first_dense >= depth:
        raise UserError(
            f"config key model.moe.first_dense={moe.first_dense} leaves none of model.depth={depth} blocks to experts; "
            f"write {depth - 1} or less, or model.moe.num_experts=0"
        )
    if (depth - moe.first_dense) % moe.every:
        raise UserError(
            f"config key model.moe.every={moe.every} does not divide the {depth - moe.first_dense} blocks "
            "after the first dense ones (model.depth - model.moe.first_dense); write a divisor"
        )


def _validate_images(config: Config) -> None:
    image, default = config.image, Config().image
    if config.task != "image":
        if image != default:
            raise UserError(f"config group image is of task=image, and task={config.task}; write --config.task=image")
        return
    if image.channels not in (0, 1, 3):
        raise UserError(
            f"config key image.channels={image.channels} must be 1 (grey) or 3 (colours), or the dataset's: 0"
        )
    if image.size and image.pad >= image.size:
        raise UserError(f"config key image.pad={image.pad} moves images of {image.size} pixels out; write less")
    if image.size % image.patch:
        near = [p for p in divisors(image.size) if p <= image.patch][-1]
        raise UserError(
            f"config key image.patch={image.patch} does not divide image.size={image.size}; write for example {near}"
        )
    if image.positions == "sincos2d" and config.model.width % 4:
        raise UserError(
            f"config key model.width={config.model.width} is no multiple of 4, and image.positions=sincos2d gives a "
            "quarter of it to each of two sines and two cosines; write a multiple, or image.positions=learned"
        )
    values, usual = flatten(config), flatten(Config())
    for key, rule in rules().items():
        if rule.text and values[key] != usual[key]:
            raise UserError(
                f"config key {key}={values[key]!r} is of task=text, and nothing reads it here; leave it out"
            )
    filled = fill_sizes(config).data.seq_len
    if image.size and config.data.seq_len not in (usual["data.seq_len"], filled):
        raise UserError(
            f"config key data.seq_len={config.data.seq_len} is filled in with task=image: an image has {filled} "
            "patches here; leave it out"
        )


def _validate_parametrisation(config: Config) -> None:
    model, optim = config.model, config.optim
    for size in PARAMETRISATIONS[model.parametrisation].base:
        if not getattr(model, f"base_{size}"):
            raise UserError(
                f"config key model.parametrisation={model.parametrisation} needs model.base_{size}, the {size} that "
                f"the rate was tuned at; write model.base_{size}={getattr(model, size)} if that is this model's"
            )
    if optim.decay_coupling == "independent" and optim.weight_decay > MAX_FLOAT * optim.lr:
        raise UserError(
            f"config key optim.decay_coupling=independent cannot go with optim.lr={optim.lr}: weight_decay / lr is "
            "above float32; write a larger rate, or coupled"
        )


def notices(config: Config) -> list[str]:
    """What a user should know of a legal config before its results are believed, a line each."""
    model = config.model
    said = []
    advice = placement_of(model).not_with.get(model.init)
    if advice:
        said.append(f"model.placement={model.placement} with model.init={model.init}: {advice}")
    values, default = flatten(config), flatten(Config())
    for key in sorted(unread(model.init)):
        if values[key] != default[key]:
            said.append(f"{key}={values[key]!r} does nothing with model.init={model.init}, which does not read it")
    last, steps = model.branch_warmup_steps * model.depth, num_steps(config)
    if last > steps:
        said.append(
            f"model.branch_warmup_steps={model.branch_warmup_steps:g}: the last of {model.depth} blocks has come in at "
            f"update {last:.0f}, and the run has {steps}; {steps / model.depth:.3g} or less lets all come in"
        )
    if model.parametrisation in ("mup", "completep") and model.moe.num_experts:
        said.append(
            f"model.parametrisation={model.parametrisation} with experts: learning rates are reported not to transfer "
            "(arXiv 2605.14200); check them at this size"
        )
    return said


def _validate_length(config: Config) -> None:
    training, optim = config.training, config.optim
    if training.tokens == 0 and training.steps < 1:
        raise UserError(
            f"config key training.steps={training.steps} is too small; write 1 or more, or 0 and training.tokens"
        )
    steps = num_steps(config)
    # A resolved config holds both, and they agree.
    if training.steps not in (0, steps):
        raise UserError(
            f"config key training.tokens={training.tokens} makes {steps} updates, not training.steps={training.steps}; "
            "write training.steps=0 to go by tokens, or training.tokens=0 to go by steps"
        )
    if steps > MAX_INT:
        raise UserError(f"config key training.tokens={training.tokens} makes more than {MAX_INT} updates; write less")
    if optim.schedule == "wsd" and optim.warmup_fraction + optim.decay_fraction > 1:
        raise UserError(
            f"config key optim.decay_fraction={optim.decay_fraction} and optim.warmup_fraction="
            f"{optim.warmup_fraction} are together more than the whole run; lower one of them"
        )


def _validate_shapes(config: Config) -> None:
    model, training = config.model, config.training
    heads, kv_heads, unroll = model.num_heads, model.num_kv_heads, config.execution.scan_unroll
    fits = [h for h in divisors(model.width) if model.width // h % 2 == 0]
    near = [*[h for h in fits if h < heads][-1:], *[h for h in fits if h > heads][:1]]
    others = f"write {' or '.join(map(str, near)) or 'an even model.width'}, or change the width"

    def divides(key: str, value: int, of: str, whole: int, remedy: str = "write a divisor") -> None:
        if whole % value:
            raise UserError(f"config key {key}={value} does not divide {of}={whole}; {remedy}")

    divides("model.num_heads", heads, "model.width", model.width, others)
    divides("model.num_kv_heads", kv_heads or 1, "model.num_heads", heads, "write a divisor, or 0 for as many")
    divides("execution.scan_unroll", unroll, "model.depth", model.depth, "write a divisor (1: a loop, the depth: none)")
    divides("training.num_microbatches", training.num_microbatches, "training.batch_size", training.batch_size)
    if model.width // heads % 2:
        raise UserError(
            f"model.width / model.num_heads = {model.width // heads} is odd, and rotary embeddings turn pairs; "
            "choose an even head size"
        )
    for key, rows in (("training.batch_size", training.batch_size), ("eval.batch_size", config.eval.batch_size)):
        if rows * config.data.seq_len > MAX_INT:
            raise UserError(
                f"config key {key}={rows} x data.seq_len={config.data.seq_len} is above {MAX_INT} tokens a step; "
                "make one of them smaller"
            )
    axes = dataclasses.asdict(config.mesh)
    for axis, size in axes.items():
        if size == 0:
            raise UserError(f"config key mesh.{axis}=0 must be at least 1, or -1 for the devices that are left")
    if list(axes.values()).count(-1) > 1:
        raise UserError(f"config group mesh={axes} has more than one -1; only one axis can take what is left")
