"""Standard output and error as long commands need them: a reader that leaves takes no work with it."""

import errno
import io
import logging
import os
import sys
from typing import TYPE_CHECKING, TextIO

from spannorm_jax.errors import UserError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_READER_GONE = (errno.EPIPE, errno.EIO)  # a pipe's other end, a terminal that was closed


class _Output(io.FileIO):
    """A file descriptor to print to.

    With `lasting`, what cannot be written is dropped: printing is not what the command is for. Otherwise a reader that
    has gone raises BrokenPipeError, and anything else UserError.
    """

    def __init__(self, descriptor: int, lasting: bool):
        super().__init__(descriptor, "w", closefd=False)
        self._lasting = lasting

    def write(self, data: "ReadableBuffer", /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno in _READER_GONE or not self._lasting:
                # What follows goes nowhere: that of C libraries, and what Python still holds at its end.
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            if self._lasting:
                return memoryview(data).nbytes
            if error.errno in _READER_GONE:
                raise BrokenPipeError from error
            raise UserError(f"cannot write what is printed: {error.strerror}; make room, and repeat") from error


def _fill(descriptor: int) -> None:
    """Gives a standard stream that was closed (`>&-`) a place, or the next file to be opened would take it."""
    try:
        os.fstat(descriptor)
    except OSError:
        null = os.open(os.devnull, os.O_RDWR)
        if null != descriptor:
            os.dup2(null, descriptor)
            os.close(null)


def _wrapped(stream: TextIO | None, descriptor: int, lasting: bool) -> TextIO:
    return io.TextIOWrapper(
        io.BufferedWriter(_Output(descriptor, lasting)),
        encoding=stream.encoding if stream else "utf-8",
        errors="backslashreplace",  # what the terminal's encoding lacks is no reason to stop
        line_buffering=descriptor == 2 or os.isatty(descriptor),
    )


def guard_output(lasting: bool) -> None:
    """Replaces sys.stdout and sys.stderr. Standard error always lasts, standard output if `lasting`.

    Streams that were replaced already, as tests do, stay as they are.
    """
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # it repeats, a page an array, why a save has failed
    for descriptor in (0, 1, 2):
        _fill(descriptor)
    if sys.stdout is sys.__stdout__:
        sys.stdout = _wrapped(sys.stdout, 1, lasting)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _wrapped(sys.stderr, 2, True)
