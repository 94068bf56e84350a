"""Each token's loss under a model, of sequences: one program for each padded length."""

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from spannorm_jax.model.definition import ModelDef
from spannorm_jax.parallel.mesh import batch_shards, sharding, target_platform

Scored = tuple[Sequence[int], int]  # ids, and how many of the last ones are scored: not the first
_TOKENS = {"cpu": 4096, "gpu": 16384, "tpu": 16384}  # of a batch on each device
_LOGITS_MIB = 1024  # of a batch on each device, at most
_SHORTEST = 32  # positions that a row has at least


def windows(ids: Sequence[int], scored: int, seq_len: int) -> list[Scored]:
    """The rows of at most seq_len + 1 ids whose last ids are those that a sequence scores, each once.

    Ids that fit into one row get all the context that it has room for. More are cut as `evaluate` cuts a split: a row
    begins with the last id of the row before it.
    """
    if scored <= seq_len:
        return [(ids[-seq_len - 1 :], scored)] * (scored > 0)
    ids = ids[-scored - 1 :]
    starts = range(0, scored, seq_len)
    return [(ids[start : start + seq_len + 1], min(seq_len, scored - start)) for start in starts]


class Scorer:
    """A model's losses of sequences. A shape compiles once; lengths are padded to powers of two up to `seq_len`."""

    def __init__(self, model: ModelDef, mesh: Mesh, params: Any, model_state: Any, seq_len: int, num_ids: int):
        self._weights, self._mesh, self._seq_len = (params, model_state), mesh, seq_len
        self._shards = batch_shards(dict(mesh.shape))
        with jax.set_mesh(mesh):
            most = _LOGITS_MIB * 2**20 // (4 * model.cfg.vocab_size)
            self._tokens = min(_TOKENS[target_platform()], most)
        everywhere = NamedSharding(mesh, PartitionSpec())  # each process reads all answers
        self._score = jax.jit(partial(_score, model, num_ids), out_shardings=everywhere)

    def score(self, sequences: Sequence[Scored]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Of each sequence, in the order given: the nll (nats) of each scored id, and whether it is the likeliest."""
        rows = [(i, *row) for i, (ids, n) in enumerate(sequences) for row in windows(ids, n, self._seq_len)]
        found: list[Any] = [None] * len(rows)
        longest_first = sorted(range(len(rows)), key=lambda r: -len(rows[r][1]))  # what does not fit shows at once
        for length, group in itertools.groupby(longest_first, key=lambda r: self._padded(len(rows[r][1]) - 1)):
            members, B = list(group), self._shards * max(1, self._tokens // length)
            for first in range(0, len(members), B):
                tokens = np.zeros((B, length + 1), np.int32)
                batch = members[first : first + B]
                for place, r in enumerate(batch):
                    tokens[place, : len(rows[r][1])] = rows[r][1]
                for r, nll, right in zip(batch, *self._run(tokens), strict=False):
                    end = len(rows[r][1]) - 1
                    found[r] = nll[end - rows[r][2] : end], right[end - rows[r][2] : end]
        own: list[Any] = [[(np.zeros(0), np.zeros(0, bool))] for _ in sequences]  # what has nothing to score
        for (i, *_), values in zip(rows, found, strict=True):
            own[i].append(values)
        return [(np.concatenate([nll for nll, _ in parts]), np.concatenate([r for _, r in parts])) for parts in own]

    def _padded(self, length: int) -> int:
        return min(self._seq_len, max(_SHORTEST, 1 << (length - 1).bit_length()))

    def _run(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        placed = sharding(self._mesh, ("batch", "time"))
        batch = jax.make_array_from_callback(tokens.shape, placed, tokens.__getitem__)
        with jax.set_mesh(self._mesh):
            nll, right = jax.device_get(self._score(*self._weights, batch))
        return nll.astype(np.float64), right


def _score(model: ModelDef, num_ids: int, params: Any, model_state: Any, tokens: Array) -> tuple[Array, Array]:
    """(B, T + 1) ids -> nll (B, T), and whether no id of the tokenizer is likelier. Causal: padding comes after all."""
    logits = model.bind(params, model_state)(tokens[:, :-1])
    with jax.named_scope("score"):
        own = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits, axis=-1) - own, own >= jnp.max(logits[..., :num_ids], axis=-1)
