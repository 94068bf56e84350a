"""Byte-level BPE: trained with the `tokenizers` package, kept as the text of its tokenizer.json.

`tokenizers` is imported where it is used, so that runs on bytes do not wait for it.
"""

import hashlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from spannorm_jax.data.tokenizer import Tokenizer

_LONGEST_RUN = 256  # characters
# The expression of byte-level BPE (GPT-2's), with an upper bound wherever it has a "+". OpenAI's cl100k_base bounds
# runs of digits in the same way, to three.
_BOUNDED_RUNS = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}{1,N}| ?\p{N}{1,N}| ?[^\s\p{L}\p{N}]{1,N}|\s{1,N}(?!\S)|\s{1,N}"
).replace(",N}", f",{_LONGEST_RUN}}}")
_TELL_EVERY_S = 10.0
_JOIN_S = 0.2  # Ctrl-C is heard as soon


def train(texts: Iterable[bytes], vocab_size: int, max_bytes: int) -> str:
    """Returns the tokenizer.json of a BPE trained on `texts` (UTF-8), the same for the same texts.

    In training, not in the tokenizer that comes of it, a run of more than 256 letters, digits,
    other signs or white space is cut into runs of 256, since the trainer's time grows with the
    square of the longest. So no token is longer than that, with a space before it. Progress is
    told on stderr.

    Args:
      texts: documents.
      vocab_size: ids to make, end-of-text included; a short text may not yield as many.
      max_bytes: no further document is read after so many bytes; 0: all are.
    """
    import tokenizers
    from tokenizers import models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_BOUNDED_RUNS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        # Without end-of-text: a special token is a string to `tokenizers`, and a text that holds
        # the string would be given its id. Ours is the id after the last one, and no string.
        vocab_size=vocab_size - 1,
        special_tokens=[],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),  # any byte can be encoded
        show_progress=False,
    )
    front = _Front(texts, max_bytes)
    _wait_for(lambda: tokenizer.train_from_iterator(front, trainer), front)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer.to_str()


def load(source: str, vocab_size: int) -> Tokenizer:
    """Returns the tokenizer of a tokenizer.json that `train` made.

    Args:
      source: the file's content.
      vocab_size: rows of the vocabulary, of which the last ones stay unused.

    Raises:
      ValueError: `source` is not such a tokenizer, or has more tokens than rows.
    """
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_str(source)
        vocab = json.loads(source)["model"]["vocab"]
        of_character = {character: byte for byte, character in enumerate(_characters())}
        words = [b""] * len(vocab)
        for token, i in vocab.items():
            words[i] = bytes(of_character[character] for character in token)
    except Exception as error:  # `tokenizers` raises plain Exception
        raise ValueError(f"not a byte-level BPE: {error}") from error
    end_of_text = len(words)
    if end_of_text >= vocab_size:
        raise ValueError(f"{end_of_text + 1} tokens do not fit into {vocab_size} rows")
    words.append(b"")
    dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)

    def encode(text: bytes) -> np.ndarray:
        # In a batch of one, since only batches can do without offsets, which take memory.
        (encoded,) = tokenizer.encode_batch_fast([text.decode("utf-8", errors="replace")], add_special_tokens=False)
        return np.array(encoded.ids, dtype)

    def decode(tokens: np.ndarray) -> str:
        ids = np.asarray(tokens).astype(np.int64, casting="safe").reshape(-1)
        if ids.size and not 0 <= ids.min() <= ids.max() < len(words):
            raise ValueError(f"token ids {ids.min()} .. {ids.max()} are not all below {len(words)}")
        return b"".join(words[i] for i in ids).decode("utf-8", errors="replace")

    token_bytes = np.zeros(vocab_size, np.int32)
    token_bytes[: len(words)] = [len(word) for word in words]
    digest = hashlib.sha256(source.encode()).hexdigest()[:16]
    return Tokenizer(
        name=f"bpe-{digest}",
        hash=digest,
        source=source,
        vocab_size=vocab_size,
        end_of_text=end_of_text,
        dtype=dtype,
        token_bytes=token_bytes,
        encode=encode,
        decode=decode,
    )


class _Front:
    """Iterates over the first texts, at least `max_bytes` of them (0: all), decoded."""

    def __init__(self, texts: Iterable[bytes], max_bytes: int):
        self.num_bytes, self.ended, self.stopped = 0, False, False
        self._texts, self._max_bytes = texts, max_bytes

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            if self.stopped:
                raise InterruptedError
            yield text.decode("utf-8", errors="replace")
            self.num_bytes += len(text)
            if self._max_bytes and self.num_bytes >= self._max_bytes:
                break
        self.ended = True


def _wait_for(train: Callable[[], None], front: _Front) -> None:
    """Runs `train` in a thread, since native code hears no Ctrl-C, and tells of its progress."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            train()
        except BaseException as error:  # raised again by the caller's thread
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True, name="bpe")
    thread.start()
    began = told = time.monotonic()
    try:
        while thread.is_alive():
            thread.join(_JOIN_S)
            now = time.monotonic()
            if now - told >= _TELL_EVERY_S:
                told = now
                doing = "merging" if front.ended else "reading"
                print(
                    f"training the tokenizer: {doing}, {front.num_bytes / 2**20:.1f} MiB read, {now - began:.0f} s",
                    file=sys.stderr,
                    flush=True,
                )
    finally:
        # After Ctrl-C a thread that reads ends at its next text, and one in native code with the process.
        front.stopped = True
        thread.join(_JOIN_S)
    if raised:
        raise raised[0]


def _characters() -> list[str]:
    """The printable character that stands for each byte in a byte-level BPE's vocabulary."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
