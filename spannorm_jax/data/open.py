"""A config's data, opened: token stores, tokenizer, and the config resolved against them and the platform."""

import re
import sys
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from spannorm_jax.config import Config, DataConfig
from spannorm_jax.data.tokenizer import Tokenizer
from spannorm_jax.data.tokens import TokenStore, fingerprint, open_store, open_tokenizer
from spannorm_jax.parallel import distributed
from spannorm_jax.resolution import check_text, resolve


@dataclass(frozen=True)
class OpenData:
    train: TokenStore
    eval: TokenStore
    tokenizer: Tokenizer
    eval_overlap: int = 0  # examples that the held-out split shares with the training split


def open_data(config: Config) -> tuple[OpenData, Config]:
    """Opens (or builds) the token stores, and resolves the config against them and the platform.

    Raises UserError, also for a config of another task.
    """
    check_text(config, "this command")
    data = OpenData(
        open_store(config.data, config.data.train_split),
        open_store(config.data, config.data.eval_split),
        open_tokenizer(config.data),
        shared_examples(config.data),
    )
    resolved = resolve(
        config,
        vocab_size=data.tokenizer.vocab_size,
        platform=jax.default_backend(),
        fingerprint=fingerprint(data.train, data.eval),
        full_name=data.train.dataset,
        tokenizer_hash=data.tokenizer.hash,
    )
    return data, resolved


def say_overlap(config: Config, data: OpenData) -> None:
    """Says if the held-out loss is of text that was trained on: legal, and easily overlooked."""
    if data.eval_overlap:
        distributed.print_once(
            f"config key data.eval_split={config.data.eval_split!r} shares {data.eval_overlap:,} examples with "
            f"data.train_split={config.data.train_split!r}: its loss is not held out",
            sys.stderr,
        )


# ---- what a held-out split shares with the training split ---------------------------------------


def shared_examples(data: DataConfig) -> int:
    """Number of examples of `data.eval_split` that `data.train_split` holds too.

    TFDS, whose import takes its time, is asked only if a split of one name is in both.

    Raises:
      UserError: TFDS is asked and the dataset cannot be opened (see `tfds_files.open_dataset`).
    """
    names, other_names = _names(data.train_split), _names(data.eval_split)
    if names.isdisjoint(other_names) and "all" not in names | other_names:
        return 0
    from spannorm_jax.data import tfds_files

    splits = tfds_files.open_dataset(data).info.splits
    train, held_out = _examples(splits[data.train_split]), _examples(splits[data.eval_split])
    return sum(int(np.sum(train[file] & held_out[file])) for file in train.keys() & held_out.keys())


def _names(split: str) -> set[str]:
    """The names in a split such as `train[:90%]+validation`; `all` is TFDS's word for every split."""
    return {part.strip() for part in re.sub(r"\[[^]]*\]", "", split).split("+")}


def _examples(split: Any) -> dict[str, np.ndarray]:
    """File -> bool [its examples], whether `split` holds each."""
    held: dict[str, np.ndarray] = {}
    for part in split.file_instructions:
        mask = held.setdefault(part.filename, np.zeros(part.examples_in_shard, bool))
        mask[part.skip : part.skip + part.take] = True
    return held
