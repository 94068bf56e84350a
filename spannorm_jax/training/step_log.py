"""A step's metrics on the host: their line of metrics.jsonl, the line on the console."""

import math
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from spannorm_jax.model.definition import flops_per_token
from spannorm_jax.parallel.devices import memory_bytes, peak_flops
from spannorm_jax.run.metrics import MetricsWriter, NoWriter
from spannorm_jax.training.session import Session

_TERMINAL_REFRESH_S = 0.5


class Diverged(Exception):
    """A loss or gradient was not finite."""

    def __init__(self, step: int, where: str, loss: float):
        super().__init__(f"step {step}: {where} is not finite (loss {loss})")
        self.record: dict[str, Any] = {"step": step, "where": where, "loss": str(loss)}


def host_metrics(metrics: dict[str, Any]) -> dict[str, Any]:
    """Device metrics as Python floats and lists; waits for the step that makes them."""

    def plain(x: np.ndarray) -> float | list[float]:
        return np.asarray(x, np.float64).tolist()

    return jax.tree.map(plain, jax.device_get(metrics))


def first_nonfinite(metrics: dict[str, dict[str, Any]]) -> str | None:
    """Names what is not finite, in a train step's metrics on the host; None if all is well.

    It is the first block's gradient, else that of another part, else the loss.
    """
    loss, grad_norm = metrics["scalars"]["loss"], metrics["scalars"]["grad_norm"]
    if np.isfinite(loss) and np.isfinite(grad_norm):
        return None
    blocks = np.flatnonzero(~np.isfinite(metrics["per_block"]["block_grad_norm"]))
    if blocks.size:
        return f"the gradient of block {blocks[0]} (counted from 0, the first of {blocks.size} such blocks)"
    for name, norm in metrics["diagnosis"]["other_grad_norm"].items():
        if not np.isfinite(norm):
            return f"the gradient of {name}"
    return "the gradient norm" if np.isfinite(loss) else "the loss"


class Progress:
    """One line that says where the run is: redrawn on a terminal, repeated every `every_s` in a log."""

    def __init__(self, total_steps: int, every_s: float, silent: bool = False):
        self._silent = silent
        self._total = total_steps
        self._terminal = sys.stdout.isatty()
        self._every_s = _TERMINAL_REFRESH_S if self._terminal else every_s
        self._shown, self._line_is_open = -math.inf, False
        self._first: tuple[int, float] | None = None  # the step that was shown first, and when

    def show(self, step: int, loss: float, speed: str) -> None:
        now = time.monotonic()
        first_step, started = self._first = self._first or (step, now)
        if self._silent or (now - self._shown < self._every_s and step != self._total):
            return
        self._shown = now
        done = step - first_step
        left = (now - started) / done * (self._total - step) if done else None
        text = f"step {step}/{self._total}  loss {loss:.4f}  {speed}"
        text += f"  {format_seconds(left)} left" if left is not None else ""
        if self._terminal:
            print(f"\r{text:<78}", end="", flush=True)
            self._line_is_open = True
            if step == self._total:
                self.end_line()
        else:
            print(text, flush=True)

    def end_line(self) -> None:
        """Leaves the progress line, so that the next print starts on its own."""
        if self._line_is_open:
            print(flush=True)
        self._line_is_open = False


def format_seconds(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"


class StepLog:
    """Reads a step's metrics one step late, so that the device never waits for the host."""

    def __init__(self, session: Session, writer: MetricsWriter | NoWriter, progress: Progress):
        config = session.config
        self._config, self._writer, self._progress = config, writer, progress
        self._device = session.mesh.local_devices[0]
        positions = session.task.positions(config)
        self._unit, of_row = session.task.counted(config)
        self._counted = config.training.batch_size * of_row  # a step
        self._flops = flops_per_token(session.model, positions) * config.training.batch_size * positions
        self._logged = session.task.logged
        self._peak = peak_flops(self._device, config.metrics.peak_flops)
        self._pending: tuple[int, dict[str, dict[str, Any]]] | None = None
        self.start()

    def start(self) -> None:
        """The first step's time begins here, after the compiler's."""
        self._last_read = time.monotonic()

    def takes_signal(self, step: int) -> bool:
        """Whether the step's line holds the early warnings of metrics.signal_every."""
        steps, every = self._config.training.steps, self._config.metrics
        if not every.signal_every:
            return False
        return step in (1, steps) or (step % every.signal_every == 0 and step % every.log_every == 0)

    def dispatched(self, step: int, metrics: dict[str, dict[str, Any]]) -> None:
        """Takes the metrics of a step that the device is still working on."""
        self._pending = (step, metrics)

    def read_previous(self, held_out: Callable[[], dict[str, float]] | None = None) -> None:
        """Logs the pending step, with what `held_out`, if given, measures of the weights after it.

        The time of that measurement is no step's.

        Raises:
          Diverged: the step's loss or gradient is not finite; nothing is measured then.
        """
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        values = host_metrics(metrics)
        now = time.monotonic()
        step_time, self._last_read = now - self._last_read, now
        loss, where = values["scalars"]["loss"], first_nonfinite(values)
        if where:
            raise Diverged(step, where, loss)
        steps, every = self._config.training.steps, self._config.metrics
        per_s = self._counted / step_time
        self._progress.show(step, loss, f"{per_s:,.0f} {self._unit}/s")
        if step % every.log_every and step not in (1, steps) and held_out is None:
            return
        line = {"step": step, **values["scalars"], **values["per_moe_block"], self._unit: step * self._counted}
        if step in (1, steps) or (every.block_grad_every and step % every.block_grad_every == 0):
            line |= values["per_block"]
        if self.takes_signal(step):
            norms = (np.asarray(values["signal"][name]) for name in ("update_norm", "weight_norm"))
            line |= values["signal"] | {"update_ratio": np.divide(*norms).tolist()}
        if held_out is not None:
            measured = held_out()
            line |= {f"held_out_{name}": measured[name] for name in self._logged}
            self._last_read = time.monotonic()
        flops_per_s = self._flops / step_time
        line |= {
            f"{self._unit}_per_s": per_s,
            "step_time_s": step_time,
            "model_flops_per_s": flops_per_s,
            "machine_s": {
                "mfu": flops_per_s / (self._peak * jax.device_count()) if self._peak else None,
                "memory_bytes": memory_bytes(self._device),
            },
        }
        self._writer.write(line)
