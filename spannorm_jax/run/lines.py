"""Files of lines, a JSON object each, that a run appends to.

On a disk it is a file NAME. In a bucket, where nothing can be appended, it is the objects in NAME.parts/, each whole
and created by one process alone. They are called NUMBER-FIRST: in the order of their numbers they hold the lines, and
each with a FIRST above zero replaces what those before it say of that step and later ones. A file NAME beside them,
as a run has that was copied there from a disk, comes before them.
"""

import contextlib
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

from spannorm_jax import durable
from spannorm_jax.durable import is_at, to_json
from spannorm_jax.errors import UserError, one_line
from spannorm_jax.run import bucket
from spannorm_jax.run.bucket import in_bucket

_FLUSH_S, _FLUSH_SHARE = 10.0, 0.01  # at least between two objects; of the time since the first line
_TAIL_BYTES = 2**16
_LOOKS = 20  # at a list of objects that a trainer is joining meanwhile


def _parts(path: Path) -> Path:
    return path.with_name(path.name + ".parts")


def read(path: Path) -> bytes:
    """All lines. Raises FileNotFoundError if there are none and no file, OSError if it cannot be read."""
    for _ in range(_LOOKS):
        with contextlib.suppress(FileNotFoundError):
            return _read(path)
        if not _names(path):
            break
    raise FileNotFoundError(2, os.strerror(2), str(path))


def _names(path: Path) -> list[str]:
    parts = _parts(path)
    if in_bucket(path):
        return list(bucket.entries(parts))
    return sorted(part.name for part in parts.iterdir()) if parts.is_dir() else []


def _read(path: Path) -> bytes:
    whole, names = b"", _names(path)
    content = bucket.read if in_bucket(path) else Path.read_bytes
    if not names:
        return content(path)
    with contextlib.suppress(FileNotFoundError):
        whole = content(path)
    for name in names:
        data, first = content(_parts(path) / name), int(name.partition("-")[2])
        whole = (_until(whole, first - 1) if first else whole) + data
    return whole


def _until(whole: bytes, last_step: int) -> bytes:
    """Without the lines of later steps, which are last, and without half a line."""
    lines = whole.splitlines(keepends=True)
    while lines and (not lines[-1].endswith(b"\n") or _step(lines[-1]) > last_step):
        lines.pop()
    return b"".join(lines)


def _step(line: bytes) -> int:
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return int(json.loads(line)["step"])
    return 0  # damaged, as whoever reads it says


def tail(path: Path) -> list[bytes]:
    """The last lines, as many as are cheap to get; none if there is no file."""
    try:
        if in_bucket(path) or _parts(path).exists():
            return read(path).splitlines()
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            return file.read().splitlines()
    except FileNotFoundError:
        return []


def exists(path: Path) -> bool:
    return path.exists() or _parts(path).exists()


def append(path: Path, value: dict[str, Any]) -> None:
    """Appends a line. Writers wait for one another; one that cannot be written leaves what was there."""
    if not in_bucket(path):
        durable.append_line(path, value)
        return
    data = to_json(value).encode() + b"\n"
    while not bucket.create(_next(path, _names(path), 0), data):
        pass  # another writer had this number


def _next(path: Path, names: list[str], first: int) -> Path:
    """The object that comes after those of these names, and replaces lines from step `first` on (0: none)."""
    last = max(names, default="0").partition("-")[0]
    return _parts(path) / f"{int(last) + 1:08d}-{first:010d}"


def keep_until(path: Path, last_step: int) -> None:
    """Drops the lines of steps after `last_step`, and a last line that a crash cut short.

    Raises:
      UserError: a line within is damaged, or its steps do not ascend; nothing is changed then.
    """
    try:
        whole = read(path)
    except FileNotFoundError:
        return
    kept, previous = [], 0
    for number, line in enumerate(whole.splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            break
        try:
            step = json.loads(line)["step"]
            if not previous < step:
                raise ValueError(f"step {step} after {previous}")
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} line {number} is damaged ({one_line(error)}); put the file back from a copy, or delete that "
                "line and go without it"
            ) from error
        previous = step
        if step <= last_step:
            kept.append(line)
    former, parts = _names(path), _parts(path)
    if in_bucket(path):
        if not bucket.create(_next(path, former, 1), b"".join(kept)):
            raise _another(path)
        for name in former:
            bucket.remove(parts / name)
        return
    durable.write_text(path, b"".join(kept).decode())
    if former:  # of a run that was copied from a bucket
        shutil.rmtree(parts)


def _another(path: Path) -> UserError:
    return UserError(
        f"{path} is written by another process too, which has taken this run over; this one ends, and nothing is lost"
    )


class FileWriter:
    """Appends lines to a file on a disk."""

    def __init__(self, path: Path):
        self._path = path
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close())

    def write(self, line: dict[str, Any]) -> None:
        self._file.write(to_json(line) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Makes the lines so far last, as the checkpoint that follows them does.

        Raises:
          UserError: the file was removed or replaced, and so are lines that no checkpoint brings back.
        """
        os.fsync(self._file.fileno())
        if not is_at(self._file, self._path):
            raise UserError(
                f"{self._path} was removed or replaced while the run was at work; put it back and repeat the command, "
                "which goes on from the last checkpoint"
            )

    def close(self) -> None:
        self._file.close()


class BucketWriter:
    """Collects lines and creates an object of them now and then: the rarer, the longer the run."""

    def __init__(self, path: Path):
        self._path, self._lines = path, list[str]()
        self._part = _next(path, _names(path), 0)
        self._begun = self._flushed = time.monotonic()

    def write(self, line: dict[str, Any]) -> None:
        self._lines.append(to_json(line) + "\n")
        now = time.monotonic()
        if now - self._flushed > max(_FLUSH_S, _FLUSH_SHARE * (now - self._begun)):
            self.sync()

    def sync(self) -> None:
        """Writes the lines so far. Raises UserError if another process writes here too."""
        self._flushed = time.monotonic()
        if not self._lines:
            return
        if not bucket.create(self._part, "".join(self._lines).encode()):
            raise _another(self._path)
        self._part = _next(self._path, [self._part.name], 0)
        self._lines.clear()

    def close(self) -> None:
        self.sync()


def open_writer(path: Path) -> FileWriter | BucketWriter:
    return BucketWriter(path) if in_bucket(path) else FileWriter(path)
