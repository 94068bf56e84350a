"""Which checkpoints readers hold, so that a trainer at work leaves them, and which a trainer removes.

On a disk both are locks on a checkpoint's manifest. In a bucket a reader renews an object `holds/STEP-...` beside the
checkpoints while it reads; a trainer that comes between a reader's look and its object removes what is then read, and
the reader says so.
"""

import contextlib
import fcntl
import os
import uuid
from pathlib import Path
from typing import IO

from spannorm_jax.run import bucket
from spannorm_jax.run.bucket import Beat, Watch, in_bucket
from spannorm_jax.run.manifest import MANIFEST

HOLDS = "holds"


class Hold:
    """A reader's, of one checkpoint at a time."""

    def __init__(self, checkpoints: Path):
        self._checkpoints = checkpoints
        self._file: IO[bytes] | None = None
        self._beat: Beat | None = None

    def take(self, step: int) -> bool:
        """Keeps a trainer from removing a checkpoint; False if it has gone, or a trainer is removing it."""
        self.release()
        path = self._checkpoints / str(step) / MANIFEST
        if in_bucket(path):
            self._beat = Beat(self._checkpoints.parent / HOLDS / f"{step}-{uuid.uuid4().hex}")
            with contextlib.suppress(OSError):  # who may not write here holds nothing
                bucket.write(self._beat.path, self._beat.data())
                self._beat.start()
            return path.exists()
        try:
            self._file = open(path, "rb")  # noqa: SIM115 (closed by release)
            fcntl.flock(self._file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # no manifest, which `fault` names, or no locks on this file system
            return path.parent.exists()
        return os.fstat(self._file.fileno()).st_nlink > 0

    def release(self) -> None:
        if self._file:
            self._file.close()
            self._file = None
        if self._beat:
            self._beat.close()
            with contextlib.suppress(OSError):  # it is taken for dead in time
                bucket.remove(self._beat.path)
            self._beat = None


class Claims:
    """A trainer's, on the checkpoints that it is removing."""

    def __init__(self, checkpoints: Path):
        self._checkpoints = checkpoints
        self._locks, self._watch = contextlib.ExitStack(), Watch()

    def take(self, step: int) -> bool:
        """Locks out readers; False if one holds the checkpoint."""
        if in_bucket(self._checkpoints):
            return not self._is_held(step)
        try:
            file = self._locks.enter_context((self._checkpoints / str(step) / MANIFEST).open("r+b"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # no locks on this file system, or no manifest: nobody holds it
            pass
        return True

    def _is_held(self, step: int) -> bool:
        folder, held = self._checkpoints.parent / HOLDS, False
        for name in bucket.entries(folder):
            if name.partition("-")[0] == str(step):
                if self._watch.look(folder / name) is False:
                    bucket.remove(folder / name)
                else:
                    held = True
        return held

    def release(self) -> None:
        self._locks.close()
