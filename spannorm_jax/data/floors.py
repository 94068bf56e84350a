"""Floors under a loss: what counting tokens, compressing bytes, or a linear classifier of pixels reach on the very
predictions that are scored.

A language model above the trigram's loss has learnt less than counts of three tokens hold. A comparison of such models
says who learns short contexts first, and little else. Likewise a model of images above the linear classifier's.
"""

import contextlib
import hashlib
import importlib.util
import json
import sys
import warnings
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from spannorm_jax.config import DataConfig
from spannorm_jax.data.images import ImageStore
from spannorm_jax.data.loader import eval_batches
from spannorm_jax.data.tokenizer import Tokenizer
from spannorm_jax.data.tokens import TokenStore, cache_folder
from spannorm_jax.durable import write_json
from spannorm_jax.errors import UserError

ORDERS = {"unigram": 1, "trigram": 3, "fourgram": 4}
COUNTED = 1 << 24  # training tokens that are counted at most, from the front: sorting them takes seconds
MOST_SCORED = 1 << 23  # predictions beyond which an evaluation does without: scoring a million takes a second
_ROWS = 256  # windows that are scored at a time
FITTED = 1 << 26  # pixels, of as many training images, that a linear classifier is fitted on at most
ITERATIONS = 100  # of its L-BFGS at most


def floors(
    train: TokenStore, held_out: TokenStore, tokenizer: Tokenizer, seq_len: int, num_tokens: int
) -> dict[str, float]:
    """Names of ORDERS, and `gzip` -> losses in nats per token on the predictions of `eval_batches`.

    The n-grams are counted on the training split, and their contexts end at a window's start as the model's do. An
    order whose codes do not fit 63 bits is left out. `gzip` is the size of the predicted text compressed alone (zlib,
    level 9). They are computed once for the same data and predictions, and kept beside the held-out store if possible.
    """
    key = f"{train.sha256} {held_out.sha256} {COUNTED} {seq_len} {num_tokens}"
    return _once(held_out.path.parent, key, lambda: _floors(train, held_out, tokenizer, seq_len, num_tokens))


def _once(folder: Path, key: str, make: Callable[[], dict[str, float]]) -> dict[str, float]:
    """What `make` returns, kept in the folder by its key if possible."""
    path = folder / f"floors-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    with contextlib.suppress(OSError, ValueError):
        return dict(json.loads(path.read_text(encoding="utf-8")))
    found = make()
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, found)
    return found


def linear_classifier(data: DataConfig, train: ImageStore, held_out: ImageStore) -> dict[str, float]:
    """`linear`, nats an image, and `linear_accuracy` of multinomial logistic regression on the pixels.

    It is scikit-learn's: pixels from 0 to 1, C = 1, ITERATIONS of L-BFGS at most, on training images spread evenly over
    the split, FITTED pixels at most. {} without scikit-learn, which is said, and where so many images are fewer than
    ten a class. It is fitted once for the same data, and kept beside the image stores if possible.
    """
    size = train.images[0].size
    number = min(len(train.labels), FITTED // size)
    which = np.arange(number) * len(train.labels) // number
    if number < 10 * train.num_classes or len(np.unique(train.labels[which])) < 2:
        return {}
    if importlib.util.find_spec("sklearn") is None:
        print("no linear classifier as a floor: pip install 'spannorm_jax[vision]'", file=sys.stderr)
        return {}

    def fitted() -> dict[str, float]:
        if number * size > FITTED >> 4:
            print(f"fitting a linear classifier to {number:,} images, once for these data", file=sys.stderr, flush=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it stopped at the most iterations
            regression = importlib.import_module("sklearn.linear_model").LogisticRegression(max_iter=ITERATIONS)
            model = regression.fit(_pixels(train.images[which]), train.labels[which])
        nll, correct = 0.0, 0
        for first in range(0, len(held_out.labels), _ROWS):
            images, labels = (x[first : first + _ROWS] for x in (held_out.images, held_out.labels))
            p = np.zeros((len(labels), train.num_classes))
            p[:, model.classes_] = model.predict_proba(_pixels(images))
            nll -= float(np.sum(np.log(np.maximum(p[np.arange(len(labels)), labels], np.finfo(np.float32).tiny))))
            correct += int(np.sum(p.argmax(axis=1) == labels))
        return {"linear": nll / len(held_out.labels), "linear_accuracy": correct / len(held_out.labels)}

    key = f"linear {train.sha256} {held_out.sha256} {FITTED} {ITERATIONS}"
    try:
        folder = cache_folder(data, "images")
    except UserError:
        return fitted()
    return _once(folder, key, fitted)


def _pixels(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1).astype(np.float32) / 255


def _floors(
    train: TokenStore, held_out: TokenStore, tokenizer: Tokenizer, seq_len: int, num_tokens: int
) -> dict[str, float]:
    counted = np.asarray(train.tokens[:COUNTED])
    orders = {name: n for name, n in ORDERS.items() if tokenizer.vocab_size**n < 2**63 and n <= len(counted)}
    grams = count_ngrams(counted, max(orders.values()), tokenizer.vocab_size)
    nll, count, compressed, gzip = dict.fromkeys(orders, 0.0), 0, 0, zlib.compressobj(9)
    for tokens, weights in eval_batches(held_out, seq_len, num_tokens, _ROWS):
        scored = weights > 0
        for name, order in orders.items():
            p = witten_bell(grams[:order], tokens, tokenizer.vocab_size)
            nll[name] -= float(np.log(p[scored]).sum())
        compressed += len(gzip.compress(tokenizer.decode(tokens[:, 1:][scored]).encode()))
        count += int(scored.sum())
    compressed += len(gzip.flush())
    losses = {name: total / count for name, total in nll.items()}
    return losses | {"gzip": 8 * compressed * float(np.log(2)) / count}


class Ngrams(NamedTuple):
    """Counts of the n-grams of a text. An n-gram's code has its tokens as digits, the first one leading."""

    n: int
    codes: np.ndarray  # int64 [m], ascending
    counts: np.ndarray  # [m]
    contexts: np.ndarray  # int64 [k], ascending: codes of the first n - 1 tokens
    totals: np.ndarray  # [k], how often each context was followed
    followers: np.ndarray  # [k], by how many different tokens


def count_ngrams(tokens: np.ndarray, order: int, vocab_size: int) -> list[Ngrams]:
    """The n-grams of `tokens` [num_tokens] for n = 1 .. order, each counted where one of `order` tokens starts.

    So one sort counts them all. Those across the ends of documents are counted too.
    """
    codes, counts = np.unique(_codes(tokens[None], order, vocab_size), return_counts=True)
    found = []
    for n in range(order, 0, -1):
        contexts, first = np.unique(codes // vocab_size, return_index=True)
        totals = np.add.reduceat(counts, first)
        found.append(Ngrams(n, codes, counts, contexts, totals, np.diff(first, append=len(codes))))
        codes, counts = contexts, totals
    return found[::-1]


def _codes(tokens: np.ndarray, n: int, vocab_size: int) -> np.ndarray:
    """Codes of the n-grams that end at each token from the n-th on: [B, T] -> int64 [B, T - n + 1]."""
    length = tokens.shape[1] - n + 1
    code = np.zeros((len(tokens), length), np.int64)
    for i in range(n):
        code = code * vocab_size + tokens[:, i : i + length]
    return code


def witten_bell(grams: Sequence[Ngrams], tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """Probability of each token but the first of windows [B, T + 1]: [B, T].

    `grams` are those of orders 1, 2, ..., interpolated by Witten and Bell (1991, method C):
    P_n(w | h) = (c(h w) + k(h) P_{n-1}(w | h')) / (c(h) + k(h)), with k(h) different tokens after h and
    P_0 uniform. A context that was never seen leaves P_{n-1}.
    """
    p = np.full((tokens.shape[0], tokens.shape[1] - 1), 1 / vocab_size)
    for gram in grams:
        codes = _codes(tokens, gram.n, vocab_size)
        codes = codes[:, 1:] if gram.n == 1 else codes  # the first token is not predicted
        lower = p[:, p.shape[1] - codes.shape[1] :]
        total = _look_up(gram.contexts, gram.totals, codes // vocab_size)
        followers = _look_up(gram.contexts, gram.followers, codes // vocab_size)
        seen = _look_up(gram.codes, gram.counts, codes)
        lower[:] = np.where(total > 0, (seen + followers * lower) / np.maximum(total + followers, 1), lower)
    return p


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The values of `wanted` keys, 0 of those that are not there."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)
