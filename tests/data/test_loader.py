import dataclasses

import numpy as np
import pytest

from spannorm_jax.data.loader import TrainLoader, eval_batches
from spannorm_jax.data.tokens import Windows, open_store

T, B = 16, 8
PUBLISHED_ORDER = [21, 37, 31, 14, 9, 46, 28, 6]


@pytest.fixture
def store(tiny):
    return open_store(tiny, "train")


@pytest.fixture
def counting_store(store):
    """A store whose token i is i, so that a row tells which window it is."""
    return dataclasses.replace(store, tokens=np.arange(1000, dtype=np.uint16))


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_any_number_of_processes_makes_the_same_batch(store, processes):
    share = B // processes
    whole = TrainLoader(store, T, B, seed=3)
    for step in (1, 2, 77):
        shares = [TrainLoader(store, T, B, seed=3).rows(step, p * share, (p + 1) * share) for p in range(processes)]
        assert shares[0].dtype == np.int32 and shares[0].shape == (share, T + 1)
        np.testing.assert_array_equal(np.concatenate(shares), whole.rows(step))


def test_a_step_does_not_depend_on_the_calls_before(store):
    loader = TrainLoader(store, T, B, seed=0)
    forward = [loader.rows(step) for step in range(1, 60)]
    backward = [loader.rows(step) for step in range(59, 0, -1)][::-1]
    np.testing.assert_array_equal(forward, backward)
    np.testing.assert_array_equal(TrainLoader(store, T, B, seed=0).rows(40), forward[39])


def test_each_epoch_holds_each_window_once_in_another_order(counting_store):
    num_windows = len(Windows(counting_store, T))
    assert num_windows % B, "a batch should span two epochs here"
    loader = TrainLoader(counting_store, T, B, seed=1)
    steps = 3 * num_windows // B + 1
    rows = np.concatenate([loader.rows(step) for step in range(1, steps + 1)])
    np.testing.assert_array_equal(rows, rows[:, :1] + np.arange(T + 1))  # whole windows
    epochs = (rows[: 3 * num_windows, 0] // T).reshape(3, num_windows)
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(num_windows), (3, 1)))
    for a, b in ((0, 1), (1, 2), (0, 2)):
        assert np.mean(epochs[a] == epochs[b]) < 0.2
    assert np.mean(epochs[0] == np.arange(num_windows)) < 0.2


def test_neighbouring_seeds_are_different_orders_even_an_epoch_apart(counting_store):
    # grain seeds epoch e with seed + e; used raw, epoch 2 of seed 0 would be epoch 1 of seed 1.
    n = len(Windows(counting_store, T))
    first, second = (TrainLoader(counting_store, T, n, seed) for seed in (0, 1))
    order = second.rows(1)[:, 0]
    for step in (1, 2):
        assert np.mean(first.rows(step)[:, 0] == order) < 0.2


def test_the_order_is_the_published_one(counting_store):
    """A change here breaks the resumption of every run that was begun before it."""
    starts = TrainLoader(counting_store, T, B, seed=0).rows(1)[:, 0] // T
    assert starts.tolist() == PUBLISHED_ORDER


def predicted(batches, seq_len):
    """How often each token of a counting store is predicted; checks shapes and targets."""
    counts = np.zeros(1000, int)
    for tokens, weights in batches:
        assert tokens.shape == (B, seq_len + 1) and tokens.dtype == np.int32
        assert weights.shape == (B, seq_len) and weights.dtype == np.float32
        assert set(np.unique(weights)) <= {0, 1}
        real = weights == 1
        np.testing.assert_array_equal(tokens[:, 1:][real], tokens[:, :-1][real] + 1)
        np.add.at(counts, tokens[:, 1:][real], 1)
    return counts


@pytest.mark.parametrize("seq_len", [1, 16, 27, 999, 2000])  # 27 and 999 divide: no tail
def test_a_whole_evaluation_predicts_each_token_once(counting_store, seq_len):
    for num_tokens in (0, 1, 10**6) if seq_len >= 1000 else (0,):  # a split shorter than a window is taken whole
        counts = predicted(eval_batches(counting_store, seq_len, num_tokens, B), seq_len)
        assert counts[0] == 0  # nothing comes before it
        assert (counts[1:] == 1).all()


@pytest.mark.parametrize("num_tokens", [1, 16, 17, 100, 500, 10**6])
def test_a_partial_evaluation_is_spread_over_the_split(counting_store, num_tokens):
    counts = predicted(eval_batches(counting_store, T, num_tokens, B), T)
    assert counts.max() == 1
    windows = min(-(-num_tokens // T), 62)  # every full window, if more is asked for
    assert counts.sum() == windows * T
    starts = np.flatnonzero(np.diff(counts, prepend=0) == 1)
    if windows <= 30:  # apart from each other: no longer gap than an even spread needs
        assert np.diff(starts).max(initial=0) <= T * -(-62 // windows)
        assert starts[-1] >= 1000 * (1 - 1 / windows) - 2 * T


def test_padding_is_all_zero(counting_store):
    *_, (tokens, weights) = eval_batches(counting_store, T, 0, B)
    # 999 predictions are 62 windows and a tail of 7; 63 rows leave one of the last 8 empty.
    assert weights.sum(axis=1).tolist() == [T] * 6 + [7, 0]
    assert not tokens[6, 8:].any() and not tokens[7].any()
