"""Starts many processes and makes them agree. `rank.py` finds which of them this one is.

The processes speak through JAX's coordination service, before and beside their collectives. Every process must call
`run_on_all`, `from_first`, `check_devices` and `check_same` in the same order.
"""

import contextlib
import importlib.util
import itertools
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TextIO, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from spannorm_jax.errors import USER_ERROR_EXIT, UserError, one_line
from spannorm_jax.parallel.rank import ProcessFlags, Rank, find_rank

_POLL_MS = 2000  # of waiting for another process: Ctrl-C is heard in between
T = TypeVar("T")


# ---- the start --------------------------------------------------------------------------------------


_joined = False  # this process, by `start`


def start(flags: ProcessFlags, platform: str) -> None:
    """Joins this process with the others, if there are any. Call it before anything touches a device.

    A process joins once: for the next run or evaluation in it there is nothing to do.

    Raises:
      UserError: nothing listens at process 0's address in time, or the flags and the environment make no sense
        (see `find_rank`). If another process does not come in time, this one ends with such a line
        and code 2.
    """
    global _joined
    if _joined:
        return
    rank = find_rank(flags, os.environ)
    initialize = partial(
        jax.distributed.initialize,
        heartbeat_timeout_seconds=flags.heartbeat_s,
        shutdown_timeout_seconds=flags.heartbeat_s,
    )
    if rank is not None:
        if rank.process_id:
            _wait_for(rank, flags.start_timeout_s)
        try:
            with _all_within(flags.start_timeout_s, rank):
                initialize(
                    rank.coordinator,
                    rank.num_processes,
                    rank.process_id,
                    rank.local_devices,
                    cluster_detection_method="deactivate",
                    # More than ours: JAX would abort a process whose time is up, without an error to catch.
                    initialization_timeout=flags.start_timeout_s + 60,
                )
        except RuntimeError as error:
            raise UserError(
                f"process {rank.process_id} of {rank.num_processes} cannot start at {rank.coordinator} "
                f"({one_line(error)[:200]}); is the port taken, or the host another one?"
            ) from error
    elif platform in ("auto", "tpu") and _on_tpu():
        with contextlib.suppress(ValueError):  # JAX finds no pod: one host
            initialize(initialization_timeout=flags.start_timeout_s)
    _joined = True


def _on_tpu() -> bool:
    return importlib.util.find_spec("libtpu") is not None and (
        Path("/dev/vfio").exists() or any(Path("/dev").glob("accel*"))
    )


@contextlib.contextmanager
def _all_within(timeout_s: int, rank: Rank) -> Iterator[None]:
    """Ends the process with a line and code 2 if what is inside has not ended by then."""

    def end() -> None:
        print(
            f"error: process {rank.process_id} of {rank.num_processes}: not all of them came to "
            f"{one_line(rank.coordinator)} within {timeout_s} s; start the others too, each with the same address and "
            "a --process_id of its own",
            file=sys.stderr,
            flush=True,
        )
        os._exit(USER_ERROR_EXIT)

    timer = threading.Timer(timeout_s, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _wait_for(rank: Rank, timeout_s: int) -> None:
    host, _, port = rank.coordinator.rpartition(":")
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=min(5, timeout_s)).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"process {rank.process_id} of {rank.num_processes}: nothing listens at the coordinator's "
                    f"address {rank.coordinator} after {timeout_s} s ({one_line(error)}); start process 0 there, or "
                    "correct the address"
                ) from error
        time.sleep(0.2)


# ---- agreement --------------------------------------------------------------------------------------


def is_first() -> bool:
    """Whether this is process 0: the one that logs, and that writes the run's folder."""
    return jax.process_index() == 0


def print_once(text: str, file: TextIO | None = None) -> None:
    """Prints a line, on process 0 alone."""
    if is_first():
        print(text, file=file, flush=True)


_calls = itertools.count()


def _client() -> Any:
    from jax._src import distributed  # JAX has no public way to it; Orbax takes this one too

    return distributed.global_state.client


def _put(key: str, value: Any) -> None:
    _client().key_value_set(f"spannorm_jax/{key}", json.dumps(value))


def _get(key: str) -> Any:
    """Waits as long as it takes: a token store may be in the making. A process that dies ends the others."""
    while True:
        try:
            return json.loads(_client().blocking_key_value_get(f"spannorm_jax/{key}", _POLL_MS))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


def _judged(name: str, mine: Any, judge: Callable[[list[Any]], str]) -> None:
    """Process 0 judges all answers; if it objects, every process raises the same UserError."""
    _put(f"{name}/{jax.process_index()}", mine)
    if is_first():
        _put(f"{name}/all", judge([_get(f"{name}/{i}") for i in range(jax.process_count())]))
    if verdict := _get(f"{name}/all"):
        raise UserError(verdict)


def run_on_all(fn: Callable[[], T]) -> T:
    """fn() on every process, on process 0 before the others, which may find what it made. All return, or all raise.

    Raises:
      UserError: fn raised on another process; the line names it.
    """
    if jax.process_count() == 1:
        return fn()
    name, here = f"run_on_all{next(_calls)}", jax.process_index()
    try:
        if here and (failed := _get(f"{name}/first")):
            raise UserError(f"process 0 stopped: {failed}")
        value = fn()
    except BaseException as error:  # raised again: the others must hear of it, Ctrl-C included
        failed = one_line(error) or type(error).__name__
        _put(f"{name}/{here}", failed)
        if here == 0:
            _put(f"{name}/first", failed)
        raise
    if here == 0:
        _put(f"{name}/first", "")

    def judge(said: list[str]) -> str:
        return next((f"process {i} stopped: {line}" for i, line in enumerate(said) if line), "")

    _judged(name, "", judge)
    return value


def from_first(fn: Callable[[], T]) -> T:
    """fn() of process 0, which JSON can hold, for all processes.

    Raises:
      UserError: fn raised on process 0.
    """
    if jax.process_count() == 1:
        return fn()
    name = f"from_first{next(_calls)}"
    if is_first():
        try:
            value = fn()
        except BaseException as error:  # raised again: the others must hear of it, Ctrl-C included
            _put(name, [one_line(error) or type(error).__name__, None])
            raise
        _put(name, ["", value])
        return value
    failed, value = _get(name)
    if failed:
        raise UserError(f"process 0 stopped: {failed}")
    return value


def check_devices() -> None:
    """Raises a UserError on all processes if two have unlike numbers of devices, of which no mesh can be made.

    The devices of all processes are connected then.
    """
    if jax.process_count() == 1:
        return

    def judge(said: list[int]) -> str:
        if len(set(said)) == 1:
            return ""
        i = next(i for i, devices in enumerate(said) if devices != said[0])
        return (
            f"process {i} has {said[i]} devices, process 0 has {said[0]}; give every process as many "
            "(CUDA_VISIBLE_DEVICES, Slurm's GPUs a task, or XLA_FLAGS for fake ones)"
        )

    _judged(f"devices{next(_calls)}", jax.local_device_count(), judge)
    if jax.default_backend() == "cpu":
        _connect()


def _connect() -> None:
    """Does a first collective among all devices while all processes are here.

    Gloo, which connects processes without accelerators, gives up if one comes to the first 30 s after another, as they
    may once each has compiled a step on a busy machine. What is connected waits for as long as it takes.
    """
    mesh = Mesh(np.array(jax.devices()), ("devices",))
    ones = jax.make_array_from_callback(
        (mesh.size,), NamedSharding(mesh, PartitionSpec("devices")), lambda index: np.ones(1, np.float32)
    )
    jax.block_until_ready(jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, PartitionSpec()))(ones))


def check_same(facts: Mapping[str, Any]) -> None:
    """Raises a UserError on all processes if a fact differs between two; the line names it, them and both values."""
    if jax.process_count() == 1:
        return

    def judge(said: list[dict[str, Any]]) -> str:
        for i, other in enumerate(said):
            for name in said[0] | other:
                if said[0].get(name) != other.get(name):
                    return (
                        f"process {i} has {name}={other.get(name)!r}, process 0 has {said[0].get(name)!r}; start all "
                        "processes with the same command and the same code"
                    )
        return ""

    _judged(f"same{next(_calls)}", json.loads(json.dumps(facts)), judge)
