"""One turn of a loop: a step with its batch and, where they are due, the early warnings before it."""

import time
from collections.abc import Callable
from typing import Any, Protocol

import jax

from spannorm_jax.parallel import distributed
from spannorm_jax.training.batches import Batches
from spannorm_jax.training.numbers import Numbers


class Steps(Protocol):
    """The jitted functions of a run, or of lanes."""

    @property
    def train(self) -> Any: ...

    @property
    def signal(self) -> Any: ...


def compile_turn(
    program: Steps, state: Any, batches: Batches, numbers: Numbers, signals: bool
) -> Callable[[int, Any, bool], tuple[Any, dict[str, Any]]]:
    """Compiles turn(number, state, signal) -> (state, metrics), which donates the state and takes the next batch.

    With `signal` the metrics hold the early warnings, of the weights before the step. `signals`: whether any turn will
    ask for them.
    """
    began = time.monotonic()
    train = program.train.lower(state, batches.abstract, numbers).compile()
    if signals:
        warnings = program.signal.lower(state.params, state.model_state, batches.abstract).compile()
    distributed.print_once(f"compiled in {time.monotonic() - began:.1f} s")

    def turn(number: int, state: Any, signal: bool) -> tuple[Any, dict[str, Any]]:
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            batch, seen = next(batches), {}
            if signal:  # before the step, which donates the weights
                # Two programs at once may wait for ever, each for devices that the other holds.
                seen = jax.block_until_ready(warnings(state.params, state.model_state, batch))
            state, metrics = train(state, batch, numbers)
            metrics["signal"] |= seen
        return state, metrics

    return turn
