"""Predicts what a sweep takes: FLOPs and disk by counting, hours from a measured or given rate."""

import dataclasses
import functools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from spannorm_jax.config import Config, DataConfig, OptimConfig, replace
from spannorm_jax.config_file import resolve_without_data
from spannorm_jax.model.definition import flops_per_token
from spannorm_jax.resolution import num_steps
from spannorm_jax.sweep.bisection import chances
from spannorm_jax.sweep.expansion import Run, Sweep
from spannorm_jax.training.numbers import numbers_of
from spannorm_jax.training.optimizer import make_optimizer
from spannorm_jax.training.program_key import program_key
from spannorm_jax.training.tasks import task_of

_STEPS, _WARMUP = 8, 2  # that are timed, and before them
_LINE = 1000  # bytes of a logged step, in metrics.jsonl and in TensorBoard's file together


@dataclass(frozen=True)
class Cost:
    """Of one run: model FLOPs of training and of evaluation, bytes on disk at its end."""

    train_flops: float
    eval_flops: float
    disk: float


@functools.cache
def cost(config: Config) -> Cost:
    """That of a run by its config as loaded. Evaluation of a whole split (eval.tokens=0) is not counted."""
    resolved = resolve_without_data(config, platform="cpu")
    steps, checkpoint = num_steps(config), config.checkpoint
    # Nothing else changes a size.
    form = Config(
        task=config.task,
        model=dataclasses.replace(resolved.model, init="plain"),
        data=DataConfig(seq_len=resolved.data.seq_len),
        image=resolved.image,
        optim=OptimConfig(name=config.optim.name),
    )
    flops, state_bytes = _size(form)
    tokens = steps * config.training.batch_size * resolved.data.seq_len
    kept = checkpoint.keep_last + (steps // checkpoint.keep_every if checkpoint.keep_every else 0)
    kept = min(kept, 1 + (steps // checkpoint.every_steps if checkpoint.every_steps else 0))
    return Cost(
        train_flops=float(flops * tokens),
        eval_flops=float(flops * config.eval.tokens * (config.task == "text")) / 3,  # the forward pass alone
        disk=float(state_bytes * kept + steps / config.metrics.log_every * _LINE),
    )


def run_flops(config: Config) -> float:
    """Model FLOPs of a run, its evaluation included."""
    counted = cost(config)
    return counted.train_flops + counted.eval_flops


@functools.cache
def _size(config: Config) -> tuple[int, int]:
    """Training FLOPs a token, and bytes of the weights and the optimiser's state."""
    task = task_of(config)
    model = task.define(config)
    weights = model.map_weights(lambda spec: jax.ShapeDtypeStruct(spec.shape, jnp.float32))
    # No number changes the state's form.
    init = make_optimizer(config.optim, model, numbers_of(Config())).init
    state = jax.tree.leaves((weights, jax.eval_shape(init, weights)))
    return flops_per_token(model, task.positions(config)), sum(x.size * x.dtype.itemsize for x in state)


def report(sweep: Sweep, rate: float | None) -> str:
    """Lines for the console. Without a `rate` (FLOP/s) steps of the run of median cost are timed.

    Raises:
      UserError: that run cannot start here.
    """
    likely = chances(sweep)
    costs = [(likely[run.index], cost(replace(run.config, seed=0, optim__lr=1.0))) for run in sweep.runs]
    train, evaluation = sum(p * c.train_flops for p, c in costs), sum(p * c.eval_flops for p, c in costs)
    programs = len({program_key(run.config) for run in sweep.runs})
    expected = f"about {sum(likely.values()):.0f} of " * sweep.bisects
    lines = [
        f"sweep {sweep.title}: {expected}{len(costs)} runs of {programs} programs",
        f"FLOPs  {train + evaluation:.2e}, of them {evaluation / (train + evaluation):.0%} for evaluation",
        f"disk   {sum(p * c.disk for p, c in costs) / 1e9:.2f} GB at the end",
    ]
    if rate:
        return "\n".join([*lines, f"time   {_hours((train + evaluation) / rate)} at {rate:.2e} FLOP/s, as given"])
    timed = _median(sweep.runs)
    from spannorm_jax.parallel.platform import start_jax  # no device is touched before there is something to time

    start_jax(timed.config.platform)
    if sweep.size == "gpu" and jax.default_backend() == "cpu":
        return "\n".join([*lines, "time   not known without an accelerator; --rate 4e14 (FLOP/s) tells"])
    rate, compile_s = timed_rate(timed.config)
    seconds = (train + evaluation) / rate + programs * compile_s
    how = f"{_STEPS} steps of run {timed.index}, the median, on {jax.devices()[0].device_kind}"
    return "\n".join(
        [*lines, f"time   {_hours(seconds)} at {rate:.2e} FLOP/s and {compile_s:.0f} s a compilation ({how})"]
    )


def _median(runs: Sequence[Run]) -> Run:
    return sorted(runs, key=lambda run: run_flops(run.config))[len(runs) // 2]


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min"


def timed_rate(config: Config) -> tuple[float, float]:
    """Model FLOP/s of the real program on all devices here, the median of some steps; and the seconds to compile it.

    JAX has started.
    """
    from spannorm_jax.training.batches import batches_of
    from spannorm_jax.training.session import Flags, match_machine

    session = match_machine(config, Path(), Flags([]))
    program, times = session.program, []
    train: Any = program.train  # a jitted function
    with jax.set_mesh(session.mesh):
        batches = batches_of(session, range(1, _WARMUP + _STEPS + 1))
        state = program.init(config.seed)
        began = time.monotonic()
        step = train.lower(state, batches.abstract, session.numbers).compile()
        compile_s = time.monotonic() - began
        for _ in range(_WARMUP + _STEPS):
            batch = jax.block_until_ready(next(batches))
            began = time.monotonic()
            state, metrics = step(state, batch, session.numbers)
            jax.block_until_ready((state, metrics))
            times.append(time.monotonic() - began)
        batches.close()
    flops = cost(config).train_flops / num_steps(config)
    return flops / statistics.median(times[_WARMUP:]), compile_s
