"""Text <-> token ids. A tokenizer is one value: `BYTES`, or a trained one (`bpe.load`).

`tokens.open_tokenizer` returns the one that a config names.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from spannorm_jax.config import DataConfig


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """What the rest of the code needs to know of a tokenizer.

    Attributes:
      name: names it in token stores and fingerprints: `bytes`, or `bpe-<hash>`.
      hash: 16 hex digits of the sha256 of `source`; "" for bytes, which are always the same.
      source: content of its tokenizer.json; "" for bytes.
      vocab_size: ids are 0 .. vocab_size - 1, some of which may never occur.
      end_of_text: id that ends every document; `encode` never returns it.
      dtype: numpy integer type that holds every id, used on disk.
      token_bytes: int32 [vocab_size], bytes of text each id stands for (0 for end_of_text), so
        that nats per token can be turned into bits per byte.
      encode: UTF-8 text as bytes -> ids, `dtype` [num_tokens]. Bytes that are not UTF-8 stand for
        U+FFFD, so any input is legal.
      decode: sequence of ids -> text. end_of_text stands for no text; a character that is cut
        at either end becomes U+FFFD. An id outside the vocabulary raises ValueError.
    """

    name: str
    hash: str
    source: str
    vocab_size: int
    end_of_text: int
    dtype: np.dtype
    token_bytes: np.ndarray
    encode: Callable[[bytes], np.ndarray]
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


def _byte_tokenizer() -> Tokenizer:
    token_bytes = np.ones(256, np.int32)
    token_bytes[_END_OF_BYTES] = 0
    return Tokenizer(
        name="bytes",
        hash="",
        source="",
        vocab_size=256,
        end_of_text=_END_OF_BYTES,
        dtype=np.dtype(np.uint8),
        token_bytes=token_bytes,
        encode=_encode_bytes,
        decode=_decode_bytes,
    )


BYTES = _byte_tokenizer()
_ROWS_MULTIPLE = 128  # rows of the embedding that any usual mesh.tensor divides


def vocab_size(data: DataConfig) -> int:
    """Ids of the tokenizer that `data` names, known before it is trained.

    Those of BPE are `bpe_vocab_size` rounded up to a multiple of 128; the last ones never occur.
    """
    if data.tokenizer == "bytes":
        return BYTES.vocab_size
    return -(-data.bpe_vocab_size // _ROWS_MULTIPLE) * _ROWS_MULTIPLE
