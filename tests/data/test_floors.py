"""Floors: n-grams against counts in dictionaries and closed forms, gzip against the text itself."""

import collections
import itertools
import math
import zlib
from types import SimpleNamespace

import numpy as np
import pytest

from spannorm_jax.data import floors
from spannorm_jax.data.tokenizer import BYTES

VOCAB = 5
ORDER = 3


def counted(tokens):
    """n -> how often each n-gram stands where one of ORDER tokens starts."""
    starts = range(len(tokens) - ORDER + 1)
    return {n: collections.Counter(tuple(tokens[i : i + n]) for i in starts) for n in range(1, ORDER + 1)}


def probability(grams, context, word):
    """Witten and Bell's, by its recursion, of a word after a context of less than ORDER tokens."""
    lower = probability(grams, context[1:], word) if context else 1 / VOCAB
    after = {gram: count for gram, count in grams[len(context) + 1].items() if gram[:-1] == context}
    total, followers = sum(after.values()), len(after)
    return (after.get((*context, word), 0) + followers * lower) / (total + followers) if after else lower


def test_probabilities_are_those_of_counts_in_dictionaries():
    random = np.random.default_rng(0)
    text = random.choice(VOCAB - 1, size=60, p=[0.5, 0.3, 0.15, 0.05])  # the last token never occurs
    windows = random.integers(VOCAB, size=(7, 6))
    found = floors.witten_bell(floors.count_ngrams(text, ORDER, VOCAB), windows, VOCAB)
    grams = counted(text.tolist())
    for b, t in itertools.product(range(7), range(5)):
        context = tuple(windows[b, max(0, t + 2 - ORDER) : t + 1].tolist())
        assert found[b, t] == pytest.approx(probability(grams, context, windows[b, t + 1]), rel=1e-12)


def stores(tmp_path, train, held_out):
    """Token stores of bytes, as far as floors read them."""
    made = {}
    for split, text in (("train", train), ("validation", held_out)):
        tokens = np.frombuffer(text, np.uint8)
        made[split] = SimpleNamespace(
            path=tmp_path / split, tokens=tokens, num_tokens=len(tokens), sha256=str(zlib.crc32(text))
        )
    return made["train"], made["validation"]


def test_uniform_bytes_have_no_floor_below_their_entropy(tmp_path):
    """Of 16 equally likely bytes each order's loss is ln 16, and gzip's a little above.

    The mean of 10,000 predictions of a unigram counted on 100,000 is within 0.01: the counts' relative error
    is 1.2%, which moves single losses both ways. Higher orders pay for contexts seen 6,000 and 24 times.
    """
    random = np.random.default_rng(2)
    train, held_out = (bytes(random.integers(97, 113, size=n, dtype=np.uint8)) for n in (100_000, 10_001))
    found = floors.floors(*stores(tmp_path, train, held_out), BYTES, 100, 0)
    assert found["unigram"] == pytest.approx(math.log(16), abs=0.01)
    assert math.log(16) < found["trigram"] < found["fourgram"] < math.log(16) + 1
    assert math.log(16) < found["gzip"] < 1.2 * math.log(16)


def test_a_text_that_repeats_is_predicted_by_its_context_and_by_gzip(tmp_path):
    """Each byte of `abcd...` follows one other: orders above 1 know it, but at a window's first token."""
    found = floors.floors(*stores(tmp_path, b"abcd" * 5000, b"abcd" * 250 + b"a"), BYTES, 100, 0)
    assert found["unigram"] == pytest.approx(math.log(4), abs=0.01)
    assert found["trigram"] < 0.01 and found["fourgram"] < 0.01 and found["gzip"] < 0.2


def test_gzip_is_that_of_the_predicted_text(tmp_path):
    text = b"one two three, two three four, three four five" * 20
    found = floors.floors(*stores(tmp_path, text, text), BYTES, len(text), 0)
    assert found["gzip"] == pytest.approx(8 * len(zlib.compress(text[1:], 9)) * math.log(2) / (len(text) - 1))


def test_what_was_computed_is_kept_for_the_same_predictions_alone(tmp_path, monkeypatch):
    both = stores(tmp_path, b"a text to count " * 50, b"another text to score " * 20)
    first = floors.floors(*both, BYTES, 10, 0)
    monkeypatch.setattr(floors, "_floors", lambda *args: {"unigram": 0.0})
    assert floors.floors(*both, BYTES, 10, 0) == first
    assert floors.floors(*both, BYTES, 10, 50) == {"unigram": 0.0}
