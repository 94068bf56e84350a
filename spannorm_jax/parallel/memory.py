"""Tells the C library to keep freed memory, before the process has a second thread."""

import ctypes


def keep_freed_memory() -> None:
    """Makes glibc keep what a step frees for the next one, where it would give it back to the kernel.

    XLA allocates a step's temporaries anew each step, as one block of some hundred MB, whose pages the kernel
    would fill with zeros anew each time. No other thread may exist yet, of the backend or of Python's:
    a thread that has an arena of its own keeps it, later threads share it, and an arena other than the main one maps
    large blocks anew each time. Other C libraries lack `mallopt` or ignore it.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        trim_threshold, mmap_threshold, arena_max = -1, -3, -8  # malloc.h
        libc.mallopt(mmap_threshold, 2**31 - 1)
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(arena_max, 1)
