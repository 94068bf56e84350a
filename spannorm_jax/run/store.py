"""The files of a run's folder, on a disk or in a bucket: whole writes, locks, removal. Lines stand in `lines.py`."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from spannorm_jax import durable
from spannorm_jax.run import bucket
from spannorm_jax.run.bucket import in_bucket

_COMMITTED = "commit_success.txt"  # which Orbax writes last, where a rename cannot say that a checkpoint is whole


def write_text(path: Path, text: str) -> None:
    """Writes so that whoever reads finds the old file or the new one, never half of it."""
    if in_bucket(path):
        bucket.write(path, text.encode())
    else:
        durable.write_text(path, text)


def write_json(path: Path, value: Any) -> None:
    """Writes `durable.to_json(value)` as `write_text` does."""
    write_text(path, durable.to_json(value, indent=2) + "\n")


def exclusive(path: Path, what: str, wait: bool = False) -> AbstractContextManager[Callable[[], bool]]:
    """Holds `path` as a lock (`durable.exclusive`), or in a bucket as a lease (`bucket.lease`)."""
    if in_bucket(path):
        return bucket.lease(path, what, wait)
    if path.is_dir():  # leases, of a run that was copied from a bucket
        shutil.rmtree(path, ignore_errors=True)
    return durable.exclusive(path, what, wait)


def is_locked(path: Path) -> bool:
    """Whether a process holds it. For this moment it is held here, which a claim passes over and comes back to."""
    if in_bucket(path):
        return bucket.is_leased(path)
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no such file, or no locks on this file system, where nothing can be claimed either
        pass
    return False


def make_folder(path: Path) -> None:
    """Makes a folder and those above it; in a bucket there is none to make."""
    if not in_bucket(path):
        path.mkdir(parents=True, exist_ok=True)


def remove_folder(path: Path) -> None:
    """Removes a folder and what is in it, if it is there; of a checkpoint first what says that it is whole."""
    if in_bucket(path):
        bucket.remove_folder(path, first=_COMMITTED)
    else:
        shutil.rmtree(path, ignore_errors=True)


def move_folder(path: Path, target: Path) -> None:
    """Moves a folder; in a bucket it is copied whole before anything is removed."""
    if in_bucket(path):
        bucket.copy_folder(path, target)
        bucket.remove_folder(path, first=_COMMITTED)
    else:
        path.rename(target)


def walk(root: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """`os.walk`: whoever empties the list of subfolders keeps it from going there."""
    if not in_bucket(root):
        yield from os.walk(root)
        return
    there = bucket.entries(root)
    below = [name for name, is_folder in there.items() if is_folder]
    yield str(root), below, [name for name, is_folder in there.items() if not is_folder]
    for name in below:
        yield from walk(root / name)


def append_text(path: Path, written: Path) -> None:
    """Appends a text of a disk to one in a bucket, where no other process writes, and removes its folder."""
    before = bucket.read(path) if path.exists() else b""
    bucket.write(path, before + written.read_bytes())
    shutil.rmtree(written.parent)


def on_disk(folder: Path) -> Path:
    """The folder, or for a bucket's a new one on a disk, where libraries write that know no buckets."""
    return Path(tempfile.mkdtemp(prefix="spannorm-")) if in_bucket(folder) else folder


def upload(folder: Path, target: Path) -> None:
    """Copies the files of a folder on a disk, which a library has written, to a bucket, as far as they are there."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with contextlib.suppress(FileNotFoundError):
            bucket.write(target / path.relative_to(folder).as_posix(), path.read_bytes())
