"""A step's metrics on the host, and the line on the console that says where the run is."""

import sys
import time
from typing import Any

import jax
import numpy as np

_TERMINAL_REFRESH_S = 0.5


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
