"""Folders on disk that are either absent or complete, whatever kills or races their makers."""

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from spannorm_jax.durable import unwritable
from spannorm_jax.errors import UserError


@contextlib.contextmanager
def temporary_folder(parent: Path, key: str) -> Iterator[Path]:
    """Yields a new folder in `parent` that no other process has; removes what is left of it.

    Args:
      parent: made if it is absent.
      key: config key that chose `parent`, for the error line.

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
            f"cannot write to {parent} ({error.strerror}); set config key {key} to a folder that you may write"
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
            f"cannot write to {parent}: {why}; make room and repeat the command, or set config key {key} to a "
            "folder with room"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish(folder: Path, target: Path) -> None:
    """Renames the finished `folder` to `target`; a target that another process made first stays."""
    for path in folder.rglob("*"):
        if path.is_file():
            _sync(path)
    _sync(folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.rename(target)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
        return
    _sync(target.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
