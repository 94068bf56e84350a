"""Batches on the devices, read ahead of the step that takes them."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax import Array

from spannorm_jax.training.session import Session

Index = tuple[slice, ...]  # of a part of a batch: whole rows


class Batches:
    """The batches of `steps`, one a `next`; the one after it is read while the device works.

    `abstract` is what each of them is, with its sharding; `read(step, index)` gives a part of one on the host.
    """

    def __init__(self, abstract: jax.ShapeDtypeStruct, read: Callable[[int, Index], np.ndarray], steps: range):
        self.abstract = abstract
        self._read_part = read
        self._steps = iter(steps)
        self._reader = ThreadPoolExecutor(max_workers=1)
        self._next: Future[Array]
        self._read_ahead()

    def _read(self, step: int) -> Array:
        def part(index: Any) -> np.ndarray:  # each process reads the rows of its own devices
            return self._read_part(step, index)

        return jax.make_array_from_callback(self.abstract.shape, self.abstract.sharding, part)

    def _read_ahead(self) -> None:
        step = next(self._steps, None)
        if step is not None:
            self._next = self._reader.submit(self._read, step)

    def __next__(self) -> Array:
        batch = self._next.result()
        self._read_ahead()
        return batch

    def close(self) -> None:
        self._reader.shutdown(wait=True, cancel_futures=True)


def batches_of(session: Session, steps: range) -> Batches:
    """A run's own, int32 (B, T + 1)."""
    shape = (session.config.training.batch_size, session.config.data.seq_len + 1)

    def read(step: int, index: Index) -> np.ndarray:
        start, stop, _ = index[0].indices(shape[0])
        return session.loader.rows(step, start, stop)

    return Batches(jax.ShapeDtypeStruct(shape, "int32", sharding=session.program.batch_sharding), read, steps)
