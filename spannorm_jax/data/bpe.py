"""Byte-level BPE: trained with the `tokenizers` package, kept as the text of its tokenizer.json.

`tokenizers` is imported where it is used, so that runs on bytes do not wait for it.
"""

import contextlib
import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator

import numpy as np

from spannorm_jax.data.tokenizer import Tokenizer, lengths

_LONGEST_RUN = 256  # characters
# The expression of byte-level BPE (GPT-2's), with an upper bound wherever it has a "+". OpenAI's cl100k_base bounds
# runs of digits in the same way, to three.
_BOUNDED_RUNS = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}{1,N}| ?\p{N}{1,N}| ?[^\s\p{L}\p{N}]{1,N}|\s{1,N}(?!\S)|\s{1,N}"
).replace(",N}", f",{_LONGEST_RUN}}}")
_TOLD_ABOVE = 16 << 20  # bytes of text, which take longer than one waits without a word


def train(texts: Iterable[bytes], vocab_size: int, max_bytes: int) -> str:
    """Returns the tokenizer.json of a BPE trained on `texts` (UTF-8), the same for the same texts.

    In training, not in the tokenizer that comes of it, a run of more than 256 letters, digits, other signs or white
    space is cut into runs of 256, since the trainer's time grows with the square of the longest. So no token is longer
    than that, with a space before it. A long training is told on stderr.

    Args:
      texts: documents.
      vocab_size: ids to make, end-of-text included; a short text may not yield as many.
      max_bytes: no further document is read after so many bytes; 0: all are.
    """
    # A process of its own, since native code hears no Ctrl-C: this one hears it, and ends that one.
    command = [sys.executable, "-P", "-c", "from spannorm_jax.data import bpe; bpe.trainer()", str(vocab_size)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    num_bytes = 0
    with subprocess.Popen(
        command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        assert process.stdin
        try:
            with contextlib.suppress(BrokenPipeError):  # it has ended, and its code says so
                for text in texts:
                    pickle.dump(text, process.stdin)
                    num_bytes += len(text)
                    if max_bytes and num_bytes >= max_bytes:
                        break
            if num_bytes >= _TOLD_ABOVE:
                print(f"training the tokenizer on {num_bytes >> 20} MiB of text", file=sys.stderr, flush=True)
            made, _ = process.communicate()
        except BaseException:  # raised again: Ctrl-C too must end that process
            process.kill()
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            raise
    if process.returncode:
        raise RuntimeError(f"the process that trains the tokenizer ended with code {process.returncode}")
    return made.decode()


def trainer() -> None:
    """The process of `train`: texts come by standard input, the tokenizer.json goes to standard output."""
    import tokenizers
    from tokenizers import models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_BOUNDED_RUNS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made_of = trainers.BpeTrainer(
        # Without end-of-text: a special token is a string to `tokenizers`, and a text that holds
        # the string would be given its id. Ours is the id after the last one, and no string.
        vocab_size=int(sys.argv[1]) - 1,
        special_tokens=[],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),  # any byte can be encoded
        show_progress=False,
    )

    def texts() -> Iterator[str]:
        with contextlib.suppress(EOFError):
            while True:
                yield pickle.load(sys.stdin.buffer).decode("utf-8", errors="replace")

    tokenizer.train_from_iterator(texts(), made_of)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    sys.stdout.buffer.write(tokenizer.to_str().encode())


def load(source: str, vocab_size: int) -> Tokenizer:
    """Returns the tokenizer of a tokenizer.json: one that `train` made, or a BPE from elsewhere.

    Its one added token, if it has any, is end-of-text; without one that is the id after the last. No text is given
    the id. A BPE of bytes is exact; one of characters with `<0x00>` for the other bytes (SentencePiece's) may begin a
    text with a space of its own.

    Args:
      source: the file's content.
      vocab_size: rows of the vocabulary, of which the last ones stay unused.

    Raises:
      ValueError: `source` is not such a tokenizer, or has more tokens than rows.
    """
    import tokenizers

    try:
        parsed = json.loads(source)
        vocab, added = parsed["model"]["vocab"], parsed.get("added_tokens") or []
        end_of_text = added[0]["id"] if added else len(vocab)
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(parsed | {"added_tokens": []}) if added else source)
        words = [b""] * (max(*vocab.values(), end_of_text) + 1)
        word = _of_bytes if "ByteLevel" in json.dumps(parsed["pre_tokenizer"]) else _of_characters
        for token, i in vocab.items():
            words[i] = b"" if i == end_of_text else word(token)
    except Exception as error:  # `tokenizers` raises plain Exception
        raise ValueError(f"not a BPE: {error}") from error
    if len(added) > 1:
        raise ValueError(f"it has {len(added)} added tokens; leave the one that ends a document")
    if len(words) > vocab_size:
        raise ValueError(f"{len(words)} tokens do not fit into {vocab_size} rows")
    dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)

    def encode(text: bytes) -> np.ndarray:
        # In a batch of one, since only batches can do without offsets, which take memory.
        (encoded,) = tokenizer.encode_batch_fast([text.decode("utf-8", errors="replace")], add_special_tokens=False)
        return np.array(encoded.ids, dtype)

    return Tokenizer(source, words, vocab_size, end_of_text, dtype, lengths(words, vocab_size), encode)


def _of_bytes(token: str) -> bytes:
    return bytes(_BYTE_OF[character] for character in token)


def _of_characters(token: str) -> bytes:
    byte = re.fullmatch("<0x([0-9A-F]{2})>", token)
    return bytes.fromhex(byte[1]) if byte else token.replace("\u2581", " ").encode()


def byte_characters() -> list[str]:
    """The printable character that stands for each byte in a byte-level BPE's vocabulary."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


_BYTE_OF = {character: byte for byte, character in enumerate(byte_characters())}
