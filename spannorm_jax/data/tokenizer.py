"""Text <-> token ids. A tokenizer is one value: `BYTES`, or a trained one (`bpe.load`).

`tokens.open_tokenizer` returns the one that a config names.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from spannorm_jax.config import DataConfig


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """What the rest of the code needs to know of a tokenizer."""

    name: str  # in token stores and fingerprints: `bytes`, or `bpe-<hash>`
    hash: str  # 16 hex digits of the sha256 of `source`; "" for bytes, which are always the same
    source: str  # of its tokenizer.json; "" for bytes
    vocab_size: int  # ids are 0 .. vocab_size - 1, some of which may never occur
    end_of_text: int  # the id that ends every document; `encode` never returns it
    dtype: np.dtype  # holds every id, on disk
    token_bytes: np.ndarray  # int32 [vocab_size], bytes of text each id stands for (0 for end_of_text)
    # UTF-8 text -> ids, `dtype` [num_tokens]. Bytes that are not UTF-8 stand for U+FFFD, so any input is legal.
    encode: Callable[[bytes], np.ndarray]
    # Ids -> text. end_of_text stands for none; a character that is cut at either end becomes U+FFFD. An id outside the
    # vocabulary raises ValueError.
    decode: Callable[[np.ndarray], str]

    @property
    def num_ids(self) -> int:
        """Ids in use, 0 .. num_ids - 1; those from there to vocab_size only fill up the embedding's rows."""
        return int(max(np.flatnonzero(self.token_bytes)[-1], self.end_of_text)) + 1


_END_OF_BYTES = 0xFF  # a byte that UTF-8 never holds


def _encode_bytes(text: bytes) -> np.ndarray:
    # Decoding first keeps 0xFF out: no text can forge the end of a document.
    utf8 = text.decode("utf-8", errors="replace").encode("utf-8")
    return np.frombuffer(utf8, np.uint8)


def _decode_bytes(tokens: np.ndarray) -> str:
    ids = np.asarray(tokens).astype(np.int64, casting="safe").reshape(-1)
    if ids.size and not 0 <= ids.min() <= ids.max() <= 255:
        raise ValueError(f"token ids {ids.min()} .. {ids.max()} are not all bytes, 0 .. 255")
    text = ids[ids != _END_OF_BYTES].astype(np.uint8).tobytes()
    return text.decode("utf-8", errors="replace")


BYTES = Tokenizer(
    name="bytes",
    hash="",
    source="",
    vocab_size=256,
    end_of_text=_END_OF_BYTES,
    dtype=np.dtype(np.uint8),
    token_bytes=(np.arange(256) != _END_OF_BYTES).astype(np.int32),
    encode=_encode_bytes,
    decode=_decode_bytes,
)
_ROWS_MULTIPLE = 128  # rows of the embedding that any usual mesh.tensor divides


def vocab_size(data: DataConfig) -> int:
    """Ids of the tokenizer that `data` names, known before it is trained.

    Those of BPE are `bpe_vocab_size` rounded up to a multiple of 128; the last ones never occur.
    """
    if data.tokenizer == "bytes":
        return BYTES.vocab_size
    return -(-data.bpe_vocab_size // _ROWS_MULTIPLE) * _ROWS_MULTIPLE
