"""Where numbers go: metrics.jsonl always, TensorBoard, Weights & Biases if asked for, and a progress line.

Keys that end in `_s` depend on the machine and the moment (`tokens_per_s`, `step_time_s`, and `machine_s`, which
holds memory and MFU); all others are the same, bit for bit, in every run of a config on the same mesh.
"""

import os
import re
import resource
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from spannorm_jax.durable import to_json
from spannorm_jax.training.run_folder import keep_lines_until
from spannorm_jax.training.tensorboard import TensorBoard

# Peak dense bfloat16 FLOP/s of one device, from the vendors' data sheets.
PEAK_FLOPS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}
_TERMINAL_REFRESH_S = 0.5


def known_kind(device_kind: str) -> str | None:
    """The name in PEAK_FLOPS of JAX's `device_kind`, which may say more: NVIDIA H100 80GB HBM3, TPU v5p."""
    fits = (name for name in PEAK_FLOPS if re.match(rf"{name}p?(?![A-Za-z0-9])", device_kind))
    return max(fits, key=len, default=None)


def peak_flops(device: jax.Device, configured: float) -> float | None:
    """FLOP/s that MFU is a share of: the configured one, else the table's, else None (a CPU has no one peak)."""
    if configured:
        return configured
    kind = known_kind(device.device_kind)
    return PEAK_FLOPS[kind] if kind else None


def memory_bytes(device: jax.Device) -> int:
    """Peak bytes in use on the device; on the CPU, of the process."""
    stats = device.memory_stats()
    if stats:
        return stats["peak_bytes_in_use"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def host_metrics(metrics: dict[str, Any]) -> dict[str, Any]:
    """Device metrics as Python floats and lists; waits for the step that makes them."""

    def plain(x: np.ndarray) -> float | list[float]:
        return np.asarray(x, np.float64).tolist()

    return jax.tree.map(plain, jax.device_get(metrics))


def first_nonfinite(metrics: dict[str, Any]) -> str | None:
    """Names what is not finite: the first block's gradient, else another part's, else the loss; None if all is well."""
    if np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"]):
        return None
    blocks = np.flatnonzero(~np.isfinite(metrics["block_grad_norm"]))
    if blocks.size:
        return f"the gradient of block {blocks[0]} (counted from 0, the first of {blocks.size} such blocks)"
    for name, norm in metrics["other_grad_norm"].items():
        if not np.isfinite(norm):
            return f"the gradient of {name}"
    return "the gradient norm" if np.isfinite(metrics["loss"]) else "the loss"


class MetricsWriter:
    """Appends to metrics.jsonl, TensorBoard and an open wandb run, from the step after `last_step` on."""

    def __init__(self, metrics_path: Path, tensorboard: Path | None, last_step: int, wandb_run: Any = None):
        self._wandb_run = wandb_run
        keep_lines_until(metrics_path, last_step)
        self._file = open(metrics_path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close())
        self._tensorboard = None
        if tensorboard is not None:
            self._tensorboard = TensorBoard(tensorboard, last_step + 1)

    def write(self, line: dict[str, Any]) -> None:
        self._file.write(to_json(line) + "\n")
        self._file.flush()
        values = {**line, **line["machine_s"]}
        if self._tensorboard is not None:
            self._tensorboard.write(line["step"], values, time.time())
        if self._wandb_run is not None:
            self._wandb_run.log({k: x for k, x in values.items() if isinstance(x, int | float)}, step=line["step"])

    def sync(self) -> None:
        """Makes the lines so far last through a power failure, as the checkpoint that follows them does."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb_run is not None:
            self._wandb_run.finish()


class NoWriter:
    """What a process has that writes no metrics."""

    def write(self, line: dict[str, Any]) -> None:
        pass

    def sync(self) -> None:
        pass

    def close(self) -> None:
        pass


class Progress:
    """One line that says where the run is: redrawn on a terminal, repeated every `every_s` in a log."""

    def __init__(self, total_steps: int, every_s: float, silent: bool = False):
        self._silent = silent
        self._total = total_steps
        self._terminal = sys.stdout.isatty()
        self._every_s = _TERMINAL_REFRESH_S if self._terminal else every_s
        self._started = time.monotonic()
        self._shown = self._started - self._every_s
        self._first_step: int | None = None

    def show(self, step: int, loss: float, tokens_per_s: float) -> None:
        now = time.monotonic()
        if self._first_step is None:
            self._first_step = step
        if self._silent or (now - self._shown < self._every_s and step != self._total):
            return
        self._shown = now
        done = step - self._first_step
        left = (now - self._started) / done * (self._total - step) if done else None
        text = f"step {step}/{self._total}  loss {loss:.4f}  {tokens_per_s:,.0f} tokens/s"
        text += f"  {format_seconds(left)} left" if left is not None else ""
        if self._terminal:
            print(f"\r{text:<78}", end="\n" if step == self._total else "", flush=True)
        else:
            print(text, flush=True)

    def end_line(self) -> None:
        """Leaves the progress line, so that the next print starts on its own."""
        if self._terminal and not self._silent:
            print(flush=True)


def format_seconds(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"
