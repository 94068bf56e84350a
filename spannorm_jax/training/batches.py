"""Batches on the devices, read ahead of the step that takes them."""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax import Array

from spannorm_jax.data.loader import TrainLoader
from spannorm_jax.training.session import Session


class Batches:
    """The batches of `steps`, one a `next`; the one after it is read while the device works.

    `abstract` is what each of them is: int32 (B, T + 1), with its sharding.
    """

    def __init__(self, session: Session, steps: range):
        config, program = session.config, session.program
        shape = (config.training.batch_size, config.data.seq_len + 1)
        self.abstract = jax.ShapeDtypeStruct(shape, "int32", sharding=program.batch_sharding)
        self._loader: TrainLoader = session.loader
        self._steps = iter(steps)
        self._reader = ThreadPoolExecutor(max_workers=1)
        self._next: Future[Array]
        self._read_ahead()

    def _read(self, step: int) -> Array:
        def rows(index: Any) -> np.ndarray:  # each process reads the rows of its own devices
            start, stop, _ = index[0].indices(self.abstract.shape[0])
            return self._loader.rows(step, start, stop)

        return jax.make_array_from_callback(self.abstract.shape, self.abstract.sharding, rows)

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
