"""Text <-> token ids. A tokenizer is one value: `BYTES`, or a trained one (`bpe.load`).

`tokens.open_tokenizer` returns the one that a config names.
"""

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from spannorm_jax.config import DataConfig


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """What the rest of the code needs to know of a tokenizer."""

    source: str  # of its tokenizer.json; "" for bytes
    words: list[bytes]  # what each id in use stands for, b"" for end_of_text
    vocab_size: int  # ids are 0 .. vocab_size - 1; those from len(words) on only fill up the embedding's rows
    end_of_text: int  # the id that ends every document; `encode` never returns it
    dtype: np.dtype  # holds every id, on disk
    token_bytes: np.ndarray  # int32 [vocab_size], bytes of text each id stands for
    # UTF-8 text -> ids, `dtype` [num_tokens]. Bytes that are not UTF-8 stand for U+FFFD, so any input is legal.
    encode: Callable[[bytes], np.ndarray]

    @functools.cached_property
    def hash(self) -> str:
        """16 hex digits of the sha256 of `source`; "" for bytes, which are always the same."""
        return self.source and hashlib.sha256(self.source.encode()).hexdigest()[:16]

    @property
    def name(self) -> str:
        """In token stores and fingerprints: `bytes`, or `bpe-<hash>`."""
        return f"bpe-{self.hash}" if self.source else "bytes"

    @property
    def num_ids(self) -> int:
        return len(self.words)

    def decode(self, tokens: np.ndarray) -> str:
        """Ids -> text. A character that is cut at either end becomes U+FFFD. ValueError for an id that is not used."""
        ids = np.asarray(tokens).astype(np.int64, casting="safe").reshape(-1)
        if ids.size and not 0 <= ids.min() <= ids.max() < self.num_ids:
            raise ValueError(f"token ids {ids.min()} .. {ids.max()} are not all below {self.num_ids}")
        return b"".join(self.words[i] for i in ids.tolist()).decode("utf-8", errors="replace")


def lengths(words: list[bytes], vocab_size: int) -> np.ndarray:
    """`Tokenizer.token_bytes`."""
    return np.array([len(word) for word in words] + [0] * (vocab_size - len(words)), np.int32)


def _encode_bytes(text: bytes) -> np.ndarray:
    # Decoding first keeps 0xFF out: no text can forge the end of a document.
    utf8 = text.decode("utf-8", errors="replace").encode("utf-8")
    return np.frombuffer(utf8, np.uint8)


_BYTES = [bytes([i]) for i in range(0xFF)] + [b""]  # UTF-8 never holds 0xFF, which ends a document
BYTES = Tokenizer("", _BYTES, 256, 0xFF, np.dtype(np.uint8), lengths(_BYTES, 256), _encode_bytes)
_ROWS_MULTIPLE = 128  # rows of the embedding that any usual mesh.tensor divides


def vocab_size(data: DataConfig) -> int:
    """Ids of the tokenizer that `data` names, known before it is trained.

    Those of BPE are `bpe_vocab_size`; one that is trained here has them rounded up to a multiple of 128, and the last
    ones never occur.
    """
    if data.tokenizer == "bytes":
        return BYTES.vocab_size
    if data.tokenizer_file:
        return data.bpe_vocab_size
    return -(-data.bpe_vocab_size // _ROWS_MULTIPLE) * _ROWS_MULTIPLE
