"""A profiler trace of a few steps, under the run's folder."""

import shutil
from pathlib import Path
from typing import Any

import jax

from spannorm_jax.run.store import on_disk, upload


class StepTrace:
    """Traces `steps` (none: an empty range) of a loop that calls `before` and `after` around each step's dispatch.

    The device is waited for at both ends, so that the trace holds these steps and no others. A run that is continued
    within the range traces what is left of it. `close` ends a trace that an early stop has left open.
    """

    def __init__(self, steps: range, first_step: int, folder: Path):
        self._steps = range(max(steps.start, first_step), steps.stop)
        self._folder = self._local = folder
        self._running = False
        if self._steps:
            print(f"steps {self._steps[0]} to {self._steps[-1]} are traced into {folder}", flush=True)
        elif steps:
            print(f"no trace: the run goes on at step {first_step}, after --profile_steps", flush=True)

    def before(self, step: int, state: Any) -> None:
        if step in self._steps and not self._running:
            jax.block_until_ready(state)
            self._local = on_disk(self._folder)
            jax.profiler.start_trace(str(self._local))
            self._running = True

    def after(self, step: int, state: Any) -> None:
        if self._running and step == self._steps[-1]:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            if self._local != self._folder:
                upload(self._local, self._folder)
                shutil.rmtree(self._local, ignore_errors=True)
