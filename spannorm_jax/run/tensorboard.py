"""Scalars for TensorBoard, written by the thread that has them.

tensorboardX's SummaryWriter writes in a thread of its own; when that dies of a full disk, training would wait for ever
on its queue.
"""

import os
import shutil
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from spannorm_jax.run.store import on_disk, upload

_EVENTS_A_FLUSH = 200


class TensorBoard:
    """An event file that replaces what earlier ones in the folder say of steps from `first_step` on."""

    def __init__(self, folder: Path, first_step: int):
        self._folder, self._local = folder, on_disk(folder)
        self._local.mkdir(exist_ok=True)
        # tensorboardX names files by the second: two starts in one second, or a clock set back, must not share one.
        self._writer = EventsWriter(str(self._local / "events"), f".{first_step}.{os.getpid()}")
        self._writer.write_event(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))
        self._unflushed = 0

    def write(self, step: int, values: dict[str, int | float], wall_time: float) -> None:
        for key, value in values.items():
            self._writer.write_event(Event(step=step, wall_time=wall_time, summary=scalar(key, value)))
            self._unflushed += 1
        if self._unflushed >= _EVENTS_A_FLUSH:
            self._writer.flush()
            self._unflushed = 0

    def sync(self) -> None:
        """Brings what is written to the bucket, if the run is in one."""
        if self._local != self._folder:
            self._writer.flush()
            upload(self._local, self._folder)

    def close(self) -> None:
        self._writer.close()
        if self._local != self._folder:
            upload(self._local, self._folder)
            shutil.rmtree(self._local, ignore_errors=True)
