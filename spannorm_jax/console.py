"""Standard output and error as long commands need them: a reader that leaves takes no work with it."""

import errno
import io
import logging
import os
import sys
from typing import Any

from spannorm_jax.errors import UserError

_READER_GONE = (errno.EPIPE, errno.EIO)  # a pipe's other end, a terminal that was closed


class _Output(io.FileIO):
    """A file descriptor to print to.

    With `lasting`, what cannot be written is dropped: printing is not what the command is for. Otherwise a reader that
    has gone raises BrokenPipeError, and anything else UserError.
    """

    def __init__(self, descriptor: int, lasting: bool):
        super().__init__(descriptor, "w", closefd=False)
        self._lasting = lasting

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            gone = error.errno in _READER_GONE
            if gone or not self._lasting:
                # What follows goes nowhere: that of C libraries, and what Python still holds at its end.
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            if self._lasting:
                return memoryview(data).nbytes
            if gone:
                raise BrokenPipeError from error
            raise UserError(f"cannot write what is printed: {error.strerror}; make room, and repeat") from error


def guard_output(lasting: bool) -> None:
    """Replaces sys.stdout and sys.stderr. Standard error always lasts, standard output if `lasting`.

    Streams that were replaced already, as tests do, stay as they are.
    """
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # it repeats, a page an array, why a save has failed
    while (null := os.open(os.devnull, os.O_RDWR)) < 3:  # what was closed (`>&-`), or the next file would be it
        pass
    os.close(null)
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is getattr(sys, f"__{name}__"):
            wrapped = io.TextIOWrapper(
                io.BufferedWriter(_Output(descriptor, lasting or name == "stderr")),
                encoding=stream.encoding if stream else "utf-8",
                errors="backslashreplace",  # what the terminal's encoding lacks is no reason to stop
                line_buffering=name == "stderr" or os.isatty(descriptor),
            )
            setattr(sys, name, wrapped)
