"""Batches on the devices, read ahead of the step that takes them."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any

import jax

from spannorm_jax.training.session import Session
from spannorm_jax.training.task import Batch, Rows

Span = tuple[int, int]  # from, to


class Batches:
    """The batches of `steps`, one a `next`; the one after it is read while the device works.

    `abstract` is what each of them is, with its shardings. `read(step, *spans)` gives a part of one on the host: the
    spans are of the leading axes, as many as it takes, the last of them that of the rows.
    """

    def __init__(
        self, abstract: dict[str, jax.ShapeDtypeStruct], read: Callable[..., Rows], steps: range, leading: int = 1
    ):
        self.abstract = abstract
        self._read_part, self._leading = read, leading
        self._steps = iter(steps)
        self._reader = ThreadPoolExecutor(max_workers=1)
        self._next: Future[Batch]
        self._read_ahead()

    def _read(self, step: int) -> Batch:
        read = cache(self._read_part)  # all fields of a part are read at once

        def array(name: str, field: jax.ShapeDtypeStruct) -> jax.Array:
            def part(index: Any) -> Any:  # each process reads the rows of its own devices
                spans = zip(index[: self._leading], field.shape, strict=False)
                return read(step, *(of.indices(size)[:2] for of, size in spans))[name]

            return jax.make_array_from_callback(field.shape, field.sharding, part)

        return {name: array(name, field) for name, field in self.abstract.items()}

    def _read_ahead(self) -> None:
        step = next(self._steps, None)
        if step is not None:
            self._next = self._reader.submit(self._read, step)

    def __next__(self) -> Batch:
        batch = self._next.result()
        self._read_ahead()
        return batch

    def close(self) -> None:
        self._reader.shutdown(wait=True, cancel_futures=True)


def batches_of(session: Session, steps: range) -> Batches:
    """A run's own."""
    return Batches(session.program.abstract_batch, lambda step, rows: session.rows(step, *rows), steps)
