"""Writing files so that a crash, a full disk or a second writer cannot leave something half true behind."""

import contextlib
import errno
import fcntl
import io
import json
import math
import os
import shutil
import socket
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

from spannorm_jax.errors import UserError

# errno -> what it says of a folder, and how C++ writers, which raise no OSError, spell it
_UNWRITABLE = {
    errno.ENOSPC: ("the disk is full", "No space left on device"),
    errno.EDQUOT: ("the quota is used up", "Disk quota exceeded"),
    errno.EFBIG: ("a file has reached the size limit", "File too large"),
    errno.EROFS: ("the file system is read-only", "Read-only file system"),
    errno.EACCES: ("permission is denied", "Permission denied"),
    errno.EREMOTEIO: ("the bucket's service fails", "retry attempts failed"),  # as TensorStore has it
    errno.EBUSY: ("the bucket's service is busy", "SlowDown"),
}


def write_text(path: Path, text: str) -> None:
    """Writes atomically: after a crash the file is the old one or the new one, never half of it."""
    temp = path.with_name(path.name + ".tmp")
    try:
        with open(temp, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temp, path)
    except OSError:
        temp.unlink(missing_ok=True)
        raise
    sync(path.parent)


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON text that any reader takes: a number that is not finite is null, which no JSON number is."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises OSError, or ValueError if the file holds none."""
    values = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError("it holds no keys")
    return values


def write_json(path: Path, value: Any) -> None:
    """Writes `to_json(value)` as `write_text` does."""
    write_text(path, to_json(value, indent=2) + "\n")


def append_line(path: Path, value: dict[str, Any]) -> None:
    """Appends a JSON line, after dropping a last one that a crash cut short. Writers wait for one another.

    A line that cannot be written leaves the file as it was, and none where there was none.
    """
    line = to_json(value).encode() + b"\n"
    while True:
        with open(path, "a+b", buffering=0) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
                if not is_at(file, path):  # the writer that was waited for has failed, and removed it
                    continue
                _append(file, line)
                return
            except OSError:
                if path.is_file() and not os.fstat(file.fileno()).st_size:
                    path.unlink()
                raise


def is_at(file: IO[Any], path: Path) -> bool:
    """Whether an open file is the one that a path names: it may have been removed, or replaced."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except OSError:
        return False


def _append(file: io.FileIO, line: bytes) -> None:
    file.seek(0)
    end = file.read().rfind(b"\n") + 1
    file.truncate(end)
    try:
        while line:
            line = line[file.write(line) :]
        os.fsync(file.fileno())
    except OSError:
        file.truncate(end)
        raise


def sync(path: Path) -> None:
    """Makes a file's contents, or the names in a folder, last through a power failure."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def unwritable(error: BaseException | None) -> str | None:
    """The reason if this error means that the disk cannot be written (full, read-only, ...), else None."""
    seen: set[int] = set()  # nothing keeps a chain of causes from being a ring
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        for number, (says, text) in _UNWRITABLE.items():
            if (isinstance(error, OSError) and error.errno == number) or text in str(error):
                return says
        if type(error).__name__ == "HttpError":  # gcsfs's, for any answer that is no success
            return _UNWRITABLE[errno.EREMOTEIO][0]
        error = error.__cause__ or error.__context__
    return None


def disk_at_fault(error: BaseException) -> bool:
    """Whether the disk takes no file at all (full, read-only, ...): no fault of what asked, nor recorded there."""
    return unwritable(error) not in (None, _UNWRITABLE[errno.EACCES][0])


class InUse(UserError):
    """Another process holds a lock."""


@contextlib.contextmanager
def exclusive(path: Path, what: str, wait: bool = False) -> Iterator[Callable[[], bool]]:
    """Holds a lock on the file `path`, which names its holder. The kernel releases it when the process dies.

    Yields a function that tells whether the file there is still the one that is held.

    Raises:
      InUse: another process holds it, and it is not waited for; the line names that process and its host.
      UserError: the file system has no locks.
    """
    with open(path, "a+b", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(file)
            raise InUse(f"{what} is in use by {holder}; wait for it, stop it, or use another folder") from None
        except OSError as error:
            raise UserError(f"{what} cannot be locked ({error.strerror}); use a file system that has flock") from error
        file.truncate(0)
        file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode() + b"\n")

        if not is_at(file, path):
            raise InUse(f"{what} was removed or replaced at this moment; repeat the command")
        yield lambda: is_at(file, path)


def _holder(file: BinaryIO) -> str:
    file.seek(0)
    try:
        holder = json.loads(file.read())
        return f"process {holder['pid']} on {holder['host']}"
    except (ValueError, KeyError, TypeError):  # it has the lock and has not written its name yet
        return "another process"


# ---- folders that are either absent or complete, whatever kills or races their makers -----------------


@contextlib.contextmanager
def temporary_folder(parent: Path, chosen_by: str) -> Iterator[Path]:
    """Yields a new folder in `parent` that no other process has; removes what is left of it.

    Args:
      parent: made if it is absent.
      chosen_by: the config key or flag that chose `parent`, for the error line.

    Raises:
      UserError: `parent` cannot be written, or the disk is full before the caller is done.
    """
    # Not tempfile or random: the former hides the folder from other users, who may share it once
    # it is published, and the latter gives equal names to processes with equal seeds.
    folder = parent / f".incomplete-{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(
            f"cannot write to {parent} ({error.strerror}); set {chosen_by} to a folder that you may write"
        ) from error
    try:
        yield folder
    except UserError:
        raise
    except Exception as error:
        why = unwritable(error)
        if why is None:
            raise
        raise UserError(
            f"cannot write to {parent}: {why}; make room and repeat the command, or set {chosen_by} to a "
            "folder with room"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish(folder: Path, target: Path) -> None:
    """Renames the finished `folder` to `target`; a target that another process made first stays."""
    for path in folder.rglob("*"):
        if path.is_file():
            sync(path)
    sync(folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.rename(target)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
        return
    sync(target.parent)
