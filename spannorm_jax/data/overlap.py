"""What a held-out split shares with the training split."""

import re
from typing import Any

import numpy as np

from spannorm_jax.config import DataConfig


def shared_examples(data: DataConfig) -> int:
    """Number of examples of `data.eval_split` that `data.train_split` holds too.

    TFDS, whose import takes its time, is asked only if a split of one name is in both.

    Raises:
      UserError: TFDS is asked and the dataset cannot be opened (see `tfds_text.open_dataset`).
    """
    names, other_names = _names(data.train_split), _names(data.eval_split)
    if names.isdisjoint(other_names) and "all" not in names | other_names:
        return 0
    from spannorm_jax.data import tfds_text

    splits = tfds_text.open_dataset(data).info.splits
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
