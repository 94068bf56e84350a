"""Where numbers go: metrics.jsonl always, TensorBoard and Weights & Biases if asked for.

Keys that end in `_s` depend on the machine and the moment (`tokens_per_s`, `step_time_s`, and `machine_s`, which
holds memory and MFU); all others are the same, bit for bit, in every run of a config on the same mesh.
"""

import time
from pathlib import Path
from typing import Any

from spannorm_jax.config import Config
from spannorm_jax.parallel import distributed
from spannorm_jax.run import lines
from spannorm_jax.run.folder import METRICS, TENSORBOARD
from spannorm_jax.run.tensorboard import TensorBoard


class MetricsWriter:
    """Appends to metrics.jsonl, TensorBoard and an open wandb run, from the step after `last_step` on."""

    def __init__(self, metrics_path: Path, tensorboard: Path | None, last_step: int, wandb_run: Any = None):
        self._wandb_run = wandb_run
        lines.keep_until(metrics_path, last_step)
        self._lines = lines.open_writer(metrics_path)
        self._tensorboard = None
        if tensorboard is not None:
            self._tensorboard = TensorBoard(tensorboard, last_step + 1)

    def write(self, line: dict[str, Any]) -> None:
        self._lines.write(line)
        if self._tensorboard is not None:
            self._tensorboard.write(line["step"], scalars(line), time.time())
        if self._wandb_run is not None:
            self._wandb_run.log(scalars(line), step=line["step"])

    def sync(self) -> None:
        """Makes the lines so far last. Raises UserError if they are not this run's alone any more."""
        self._lines.sync()
        if self._tensorboard is not None:
            self._tensorboard.sync()

    def close(self) -> None:
        self._lines.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb_run is not None:
            self._wandb_run.finish()


def scalars(line: dict[str, Any]) -> dict[str, int | float]:
    """What TensorBoard and wandb see of a line: its numbers, and of each list, one number a block, the largest."""
    values = {**line, **line["machine_s"]}
    numbers = {key: value for key, value in values.items() if isinstance(value, int | float)}
    return numbers | {f"largest/{key}": max(value) for key, value in values.items() if isinstance(value, list)}


class NoWriter:
    """What a process has that writes no metrics."""

    def write(self, line: dict[str, Any]) -> None:
        pass

    def sync(self) -> None:
        pass

    def close(self) -> None:
        pass


def open_writer(config: Config, workdir: Path, last_step: int, wandb_run: Any = None) -> MetricsWriter | NoWriter:
    """The writer of a run's metrics from the step after `last_step` on; process 0 alone writes."""
    if not distributed.is_first():
        return NoWriter()
    if last_step and not lines.exists(workdir / METRICS):
        distributed.print_once(f"warning: {workdir / METRICS} is missing, and with it the lines up to step {last_step}")
    tensorboard = workdir / TENSORBOARD if config.metrics.tensorboard else None
    return MetricsWriter(workdir / METRICS, tensorboard, last_step, wandb_run)
