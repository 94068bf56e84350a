"""What a config leaves open, filled in: from its other options, from the data and the platform."""

import dataclasses
import math
from typing import Any

from spannorm_jax.config import Config, flatten, is_runtime, replace, unread
from spannorm_jax.errors import UserError

# How the data are named; data.fingerprint, the hash of the tokens, is what tells whether they are the same.
NAMES_OF_DATA = ("data.dataset", "data.full_name")


def default_ffn_dim(width: int, ffn: str) -> int:
    """Hidden units that give a feed-forward 8 D^2 weights, rounded up (16 below width 256, else 128)."""
    exact = 8 * width / 3 if ffn == "swiglu" else 4 * width
    multiple = 16 if width < 256 else 128
    return math.ceil(exact / multiple) * multiple


def num_steps(config: Config) -> int:
    """Updates of a run: training.steps, or the least that see training.tokens if that is set."""
    training = config.training
    if training.tokens == 0:
        return training.steps
    return -(-training.tokens // (training.batch_size * config.data.seq_len))


def fill_sizes(config: Config) -> Config:
    """Fills in sizes that follow from others: key-value heads, hidden units of feed-forward and experts.

    Of images also their patches, if the size is known.
    """
    model, image = config.model, config.image
    ffn_dim = model.ffn_dim or default_ffn_dim(model.width, model.ffn)
    if config.task == "image" and image.size:
        config = replace(config, data__seq_len=(image.size // image.patch) ** 2 + (image.pool == "token"))
    return replace(
        config,
        model__num_kv_heads=model.num_kv_heads or model.num_heads,
        model__ffn_dim=ffn_dim,
        model__moe__expert_dim=model.moe.expert_dim or ffn_dim,
    )


def resolve(
    config: Config, *, vocab_size: int, platform: str, fingerprint: str, full_name: str = "", tokenizer_hash: str = ""
) -> Config:
    """Fills in what a config leaves open: zeros, 'auto' compute dtype, the tokenizer's hash, the data's name and hash.

    Raises:
      UserError: the vocabulary is too small for the tokenizer, or the data are not those asked for.
    """
    model, data = config.model, config.data
    if 0 < model.vocab_size < vocab_size:
        raise UserError(
            f"config key model.vocab_size={model.vocab_size} is below the {vocab_size} tokens of "
            f"data.tokenizer={data.tokenizer}; write {vocab_size} or more, or 0"
        )
    if data.tokenizer_hash not in ("", tokenizer_hash):
        raise UserError(
            f"config key data.tokenizer_hash={data.tokenizer_hash} is not the hash of data.tokenizer={data.tokenizer}, "
            f"{tokenizer_hash!r}; leave it out, and it is filled in"
        )
    if data.fingerprint not in ("", fingerprint):
        raise UserError(
            f"the data here have fingerprint {fingerprint}, not data.fingerprint={data.fingerprint}: "
            f"{full_name or data.dataset} differs from what the config or run was made with, so results would not "
            "compare; restore that data, or start a new run without data.fingerprint"
        )
    config = fill_sizes(config)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(
            config.model,
            vocab_size=model.vocab_size or vocab_size,
            dtype=("float32" if platform == "cpu" else "bfloat16") if model.dtype == "auto" else model.dtype,
        ),
        data=dataclasses.replace(
            config.data, full_name=full_name, fingerprint=fingerprint, tokenizer_hash=tokenizer_hash
        ),
        training=dataclasses.replace(config.training, steps=num_steps(config)),
    )


def check_text(config: Config, what: str) -> None:
    """Raises UserError for a config of images: `what` is of text alone."""
    if config.task != "text":
        raise UserError(f"{what} is of task=text, and this is a model of task={config.task}")


def changed_keys(old: Config, new: Config) -> list[tuple[str, Any, Any]]:
    """(key, old, new) of every difference that continuing a run does not allow."""
    was, now = flatten(old), flatten(new)
    same_data = old.data.fingerprint == new.data.fingerprint != ""

    def may_change(key: str) -> bool:
        return is_runtime(key) or key in unread(new.model.init) or (same_data and key in NAMES_OF_DATA)

    return [(k, was[k], now[k]) for k in was if was[k] != now[k] and not may_change(k)]
