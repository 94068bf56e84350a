"""Floors: n-grams against counts in dictionaries and closed forms, gzip against the text itself."""

import collections
import itertools
import math
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import scipy

from spannorm_jax.config import DataConfig
from spannorm_jax.data import floors
from spannorm_jax.data.images import ImageStore
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


# ---- images ---------------------------------------------------------------------------------------------------


def images(n, seed):
    """Three classes of 2 x 2 pixels that overlap, as the linear classifier's stores."""
    random = np.random.default_rng(seed)
    labels = random.integers(3, size=n).astype(np.int32)
    means = np.array([[60, 60, 200, 60], [60, 200, 60, 60], [200, 60, 60, 120]])[labels]
    pixels = np.clip(means + 60 * random.standard_normal((n, 4)), 0, 255).astype(np.uint8)
    return ImageStore(pixels.reshape(n, 2, 2, 1), labels, 3, "blobs", f"{n} {seed}")


def test_a_linear_classifier_is_the_penalised_fit_and_is_made_once(tmp_path, monkeypatch):
    """Against SciPy's minimum of the summed loss plus half the squared weights, biases left out."""
    train, held_out, data = images(600, 0), images(200, 1), DataConfig(cache_dir=str(tmp_path))
    found = floors.linear_classifier(data, train, held_out)

    def log_p(flat, store):
        W, b = flat[:12].reshape(4, 3), flat[12:]
        return scipy.special.log_softmax(store.images.reshape(-1, 4) / 255 @ W + b, axis=1)

    def nll(flat, store):
        return -log_p(flat, store)[np.arange(len(store.labels)), store.labels]

    best = scipy.optimize.minimize(lambda w: nll(w, train).sum() + 0.5 * np.sum(w[:12] ** 2), np.zeros(15)).x
    assert found["linear"] == pytest.approx(nll(best, held_out).mean(), abs=1e-3)
    assert found["linear_accuracy"] == np.mean(log_p(best, held_out).argmax(axis=1) == held_out.labels)
    assert found["linear_accuracy"] > 0.6
    monkeypatch.setattr(floors, "_pixels", None)  # nothing is fitted again
    assert floors.linear_classifier(data, train, held_out) == found
    with pytest.raises(TypeError):
        floors.linear_classifier(data, train, images(200, 2))


def test_a_linear_classifier_that_cannot_be_is_left_out(tmp_path, monkeypatch, capsys):
    data = DataConfig(cache_dir=str(tmp_path))
    assert floors.linear_classifier(data, images(29, 0), images(9, 1)) == {}  # below ten a class
    monkeypatch.setattr(floors.importlib.util, "find_spec", lambda name: None)
    assert floors.linear_classifier(data, images(60, 0), images(9, 1)) == {}
    assert "pip install 'spannorm_jax[vision]'" in capsys.readouterr().err
