"""A config's data, opened: token stores, tokenizer, and the config resolved against them and the platform."""

import sys
from dataclasses import dataclass

import jax

from spannorm_jax.config import Config
from spannorm_jax.data.overlap import shared_examples
from spannorm_jax.data.tokenizer import Tokenizer
from spannorm_jax.data.tokens import TokenStore, fingerprint, open_store, open_tokenizer
from spannorm_jax.parallel import distributed
from spannorm_jax.resolution import resolve


@dataclass(frozen=True)
class OpenData:
    train: TokenStore
    eval: TokenStore
    tokenizer: Tokenizer
    eval_overlap: int = 0  # examples that the held-out split shares with the training split


def open_data(config: Config) -> tuple[OpenData, Config]:
    """Opens (or builds) the token stores, and resolves the config against them and the platform."""
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
