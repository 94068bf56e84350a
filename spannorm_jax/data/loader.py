"""Batches: training rows as a function of (seed, step), and an exact pass over held-out data."""

from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from spannorm_jax.data.tokenizer import Tokenizer
from spannorm_jax.data.tokens import TokenStore, Windows
from spannorm_jax.errors import UserError


def shuffled(source: Any, seed: int) -> grain.MapDataset:
    """An infinite order: every epoch holds each element once, freshly shuffled from the seed."""
    return grain.MapDataset.source(source).seed(seed).shuffle().repeat()


class TrainLoader:
    """Training batches without state: any process may ask for any rows of any step.

    Row r of step s (the first is step 1) is element (s - 1) * batch_size + r of `shuffled` windows. Batches run on
    across epochs, so no window is dropped.
    """

    def __init__(self, store: TokenStore, seq_len: int, batch_size: int, seed: int):
        """Raises UserError if the store is shorter than one window of seq_len + 1 tokens."""
        self._batch_size = batch_size
        self._order = shuffled(Windows(store, seq_len), seed)

    def rows(self, step: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows start .. stop - 1 (None: to the end) of a step's batch, int32 [stop - start, T + 1]."""
        first = (step - 1) * self._batch_size
        last = first + (self._batch_size if stop is None else stop)
        return np.stack([self._order[i] for i in range(first + start, last)])


def check_held_out(store: TokenStore, tokenizer: Tokenizer) -> None:
    """Raises UserError if predicting each token but the first predicts no text."""
    if store.num_bytes == tokenizer.token_bytes[store.tokens[0]]:
        raise UserError(
            f"config key data.eval_split={store.split!r} leaves nothing to predict: the whole text of that split of "
            f"{store.dataset} is one token; take more data"
        )


def eval_batches(
    store: TokenStore, seq_len: int, num_tokens: int, batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Iterates over (tokens int32 [B, T + 1], weights float32 [B, T]), always the same.

    weights[b, t] is 1 where predicting tokens[b, t + 1] counts; padding has weight 0 and token 0.

    `num_tokens` predictions are made, rounded up to full windows, which are spread evenly over the split and taken at
    most once each. With 0, or in a split that is shorter than one window, every token but the first is predicted
    exactly once, the short tail included.
    """
    tokens = np.asarray(store.tokens)
    if num_tokens == 0 or store.num_tokens <= seq_len:
        starts = np.arange(0, store.num_tokens - 1, seq_len)
    else:
        available = len(Windows(store, seq_len))
        wanted = min(-(-num_tokens // seq_len), available)
        starts = np.arange(wanted) * available // wanted * seq_len
    for first in range(0, len(starts), batch_size):
        batch = np.zeros((batch_size, seq_len + 1), np.int32)
        weights = np.zeros((batch_size, seq_len), np.float32)
        for row, start in enumerate(starts[first : first + batch_size]):
            window = tokens[start : start + seq_len + 1]
            batch[row, : len(window)] = window
            weights[row, : len(window) - 1] = 1
        yield batch, weights
