"""Prints the runner's progress: a line per run, and on a terminal one live line for all runs at work."""

import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from spannorm_jax.errors import visible
from spannorm_jax.resolution import num_steps
from spannorm_jax.sweep.expansion import Run, Sweep
from spannorm_jax.sweep.records import FAILED, RUNNING, STATES, RunPlace
from spannorm_jax.training.step_log import format_seconds


class Display:
    def __init__(self, out: Path, sweep: Sweep, flops: Mapping[int, float], progress: Callable[[], str] | None = None):
        """`flops`: index -> FLOPs of each remaining run; the remaining time is estimated from these.

        `progress` says how far a sweep is that does not take all its runs.
        """
        self._progress = progress
        self._out, self._total, self._flops = out, len(sweep.runs), dict(flops)
        self._before = 0 if progress else self._total - len(flops)
        self._done_flops, self._ended, self._began = 0.0, 0, time.monotonic()
        self._terminal, self._width = sys.stdout.isatty(), 0
        before = f", {self._before} of them done or failed before" if self._before else ""
        most = f" at most, {progress()} settled" if progress else before
        print(f"sweep {sweep.title}: {self._total} runs{most}, in {out}", flush=True)

    def started(self, run: Run, waiting: bool, lanes: int) -> None:
        note = "  (waits for another runner)" if waiting else f"  (one of {lanes} lanes)" if lanes > 1 else ""
        self._say(f"[{run.index}] {run.name}: started{note}")

    def alone(self, runs: Sequence[Run], why: str) -> None:
        named = ", ".join(f"[{run.index}]" for run in runs)
        self._say(f"{named}: {why}; each is taken up again alone")

    def ended(self, run: Run, state: str, reason: str) -> None:
        if state == RUNNING:
            self._say(f"[{run.index}] {run.name}: at work in another runner")
            return
        self._ended += 1
        self._done_flops += self._flops.pop(run.index, 0)
        why = f": {reason} (see {RunPlace(self._out, run.name).log})" if state == FAILED else ""
        self._say(f"[{run.index}] {run.name}: {state}{why}  {self._so_far()}")

    def ending(self, runs: Sequence[Run], what_kills: str) -> None:
        named = ", ".join(f"[{run.index}]" for run in runs)
        self._say(f"ends when the runs at work have saved their step: {named}; {what_kills} kills them")

    def killed(self) -> None:
        self._say("killed: they go on from their newest checkpoints")

    def show(self, at_work: Sequence[Run]) -> None:
        """Redraws the line of what is at work, on a terminal."""
        if not self._terminal:
            return
        steps = [f"[{r.index}] {RunPlace(self._out, r.name).last_step()}/{num_steps(r.config)}" for r in at_work]
        text = f"{self._so_far()}  steps: {', '.join(steps)}"[:118]
        print(f"\r{text:<{self._width}}", end="", flush=True)
        self._width = len(text)

    def _so_far(self) -> str:
        if self._progress:
            return self._progress()
        text = f"{self._before + self._ended}/{self._total}"
        if not self._done_flops or not self._flops:
            return text
        left = (time.monotonic() - self._began) / self._done_flops * sum(self._flops.values())
        return f"{text}, about {format_seconds(left)} left"

    def _say(self, text: str) -> None:
        """A line that stays."""
        print(f"\r{visible(text):<{self._width}}" if self._terminal else visible(text), flush=True)

    def close(self, states: Counter[str]) -> None:
        said = ", ".join(f"{states[state]} {state}" for state in STATES if states[state])
        self._say(f"{self._total} runs: {said}")
