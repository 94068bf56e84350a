"""Ends a process on which others depend: signals, peers that die, and a watchdog for peers that hang."""

import contextlib
import faulthandler
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from typing import Any, NoReturn

import jax

from spannorm_jax.durable import unwritable
from spannorm_jax.errors import USER_ERROR_EXIT, UserError, one_line

WATCHDOG_EXIT, PEER_EXIT = 4, 5


class Stop:
    """A request to stop by SIGTERM, SIGHUP or Ctrl-C, to any process, that all heed at the same step."""

    def __init__(self) -> None:
        self.requested = ""  # name of the first signal to this process; of several processes, JAX knows which got one

    def at(self, step: int) -> str:
        """The name of the signal if this is the step to stop at, else "". Every process calls it once each step."""
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            return "SIGTERM" if multihost_utils.reached_preemption_sync_point(step) else ""
        return self.requested


@contextlib.contextmanager
def stop_signals() -> Iterator[Stop]:
    """SIGTERM, SIGHUP and Ctrl-C ask for a stop after the step in flight; a second one has its usual effect.

    A SIGHUP that was ignored stays ignored: that is what `nohup` asks for.
    """
    stop = Stop()
    usual: dict[int, Any] = {}

    def handler(number: int, frame: Any) -> None:
        stop.requested = signal.Signals(number).name
        for n, h in usual.items():
            signal.signal(n, h)
        if jax.process_count() > 1:
            signal.raise_signal(signal.SIGTERM)  # JAX's own handler tells the other processes

    # Of several processes each has JAX's handler of SIGTERM, which Python must leave in place.
    numbers = [signal.SIGINT] if jax.process_count() > 1 else [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    for number in numbers:
        usual[number] = signal.signal(number, handler)
    try:
        yield stop
    finally:
        for n, previous in usual.items():
            signal.signal(n, previous)


def _leave(code: int) -> NoReturn:
    """Ends this process without waiting for the others: they wait for it, in a collective."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _lost_another(error: Exception) -> bool:
    """Whether this comes of a collective or a barrier that another process has left."""
    # XLA's failures are ValueErrors where the call that dispatches a program already meets them.
    xla = isinstance(error, jax.errors.JaxRuntimeError) or re.match(r"[A-Z_]+: ", str(error))
    return bool(xla and re.search(r"Gloo|NCCL|onnection|heartbeat|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED", str(error)))


@contextlib.contextmanager
def in_step() -> Iterator[None]:
    """Around work that all processes do in step: one that fails ends at once, and says whether another one did.

    Exit code 2: a UserError; 5: another process seems to have died or to hang; 1, with its traceback: anything else.
    """
    if jax.process_count() == 1:
        yield
        return
    try:
        yield
    except UserError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        _leave(USER_ERROR_EXIT)
    except Exception as error:
        if _lost_another(error):
            print(
                f"process {jax.process_index()} stopped: it has lost another process, which has died or hangs "
                f"({one_line(error)[:200]}); repeat the command on all, which goes on from the last sound checkpoint",
                file=sys.stderr,
            )
            _leave(PEER_EXIT)
        if why := unwritable(error):
            print(f"error: process {jax.process_index()} cannot write: {why}; mend that, and repeat", file=sys.stderr)
            _leave(USER_ERROR_EXIT)
        traceback.print_exc()
        _leave(1)


class Watchdog:
    """Ends the process with code 4, after printing all its stacks, when `alive` has not been called for long.

    A process that waits for a stuck one waits for ever; ended, the scheduler can start the job again.
    """

    def __init__(self, minutes: float):
        self._seconds, self._beat, self._closed = minutes * 60, threading.Event(), False
        self._last = "the start"
        if minutes:
            threading.Thread(target=self._watch, daemon=True, name="watchdog").start()

    def alive(self, what: str) -> None:
        """Something has been done: the time starts anew."""
        self._last = what
        self._beat.set()

    def close(self) -> None:
        self._closed = True
        self._beat.set()

    def _watch(self) -> None:
        while not self._closed:
            if not self._beat.wait(self._seconds):
                print(
                    f"process {jax.process_index()} stopped by training.watchdog_minutes: nothing since {self._last}, "
                    f"{self._seconds / 60:g} minutes ago; its stacks follow",
                    file=sys.stderr,
                    flush=True,
                )
                faulthandler.dump_traceback(all_threads=True)
                _leave(WATCHDOG_EXIT)
            self._beat.clear()


def default_sigterm() -> None:
    """SIGTERM ends the process again, where JAX would keep it for `Stop`, which nobody asks."""
    if jax.process_count() > 1:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
