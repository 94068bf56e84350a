"""What the early warnings of training cost: a step with them against one without, and the program beside it.

    python -m experiments.benchmarks.signal_cost --config configs/throughput.py --json cpu-signal.json

Prints and records the step with `log_z`, `clip_factor` and `update_norm` over the same step without, in turn, the
forward program over it, and both together as a share of the step at metrics.signal_every: by the clock, and by the
process's CPU time, which a busy machine disturbs less.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from experiments.benchmarks.timing import benchmark_parser, median_ratio, train_loader, write_record
from spannorm_jax.command import run_command
from spannorm_jax.config import Config
from spannorm_jax.config_file import load, split_overrides
from spannorm_jax.data.loader import TrainLoader
from spannorm_jax.data.open import open_data
from spannorm_jax.model.definition import define
from spannorm_jax.parallel.mesh import make_mesh
from spannorm_jax.parallel.platform import start_jax
from spannorm_jax.training.numbers import numbers_of, on_devices
from spannorm_jax.training.step import make_program, train_step
from spannorm_jax.training.tasks.text import TEXT

CLOCKS = {"wall": time.perf_counter, "CPU": time.process_time}


def main(argv: list[str]) -> int:
    rest, overrides = split_overrides(argv)
    args = benchmark_parser("signal_cost", __doc__, rounds=8, steps=3).parse_args(rest)
    config = load(args.config, overrides)
    start_jax(config.platform)
    data, config = open_data(config)
    record = measure(config, train_loader(config, data), args.rounds, args.steps)
    for clock, got in record["by"].items():
        step, each = got["step_over_without"], got["forward_over_step"]
        print(
            f"{clock} time: step {got['step_s']:.3f} s, {step['median']:.4f} ({step['low']} to {step['high']}) times "
            f"one without; forward program {each['median']:.3f} steps: {got['share']:.2%} at {record['every']}"
        )
    write_record(args.json, "experiments.benchmarks.signal_cost", argv, data, config, record)
    return 0


def measure(config: Config, loader: TrainLoader, rounds: int, steps: int) -> dict[str, Any]:
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        model = define(config.model, config.execution)
        program, numbers = make_program(config, model, mesh), on_devices(numbers_of(config), mesh)
        batch = program.put({"tokens": loader.rows(1)})
        rows = config.training.batch_size // config.training.num_microbatches
        loss_sums = TEXT.loss_sums(config, dict(mesh.shape), rows)

        def without(state: Any, batch: Any, numbers: Any) -> Any:
            """What is not returned is not computed."""
            state, metrics = train_step(config, model, loss_sums, state, batch, numbers)
            metrics.pop("signal")
            for name in ("log_z", "clip_factor"):
                metrics["scalars"].pop(name)
            return state, metrics

        states = {"with": program.init(config.seed), "without": program.init(config.seed)}
        lowered = {
            "with": program.train,
            "without": jax.jit(without, out_shardings=program_shardings(program), donate_argnums=0),
        }
        compiled = {name: fn.lower(states[name], batch, numbers).compile() for name, fn in lowered.items()}
        forward = program.signal.lower(states["with"].params, states["with"].model_state, batch).compile()
        times: dict[str, dict[str, list[float]]] = {
            clock: {"with": [], "without": [], "forward": []} for clock in CLOCKS
        }

        def timed(name: str, fn: Callable[[], Any], counted: bool) -> None:
            began = {clock: now() for clock, now in CLOCKS.items()}
            for _ in range(steps):
                out = fn()
            jax.block_until_ready(out)
            for clock, now in CLOCKS.items():
                if counted:
                    times[clock][name].append((now() - began[clock]) / steps)

        def step(name: str) -> Any:
            states[name], metrics = compiled[name](states[name], batch, numbers)
            return states[name], metrics

        for counted in (False, *[True] * rounds):
            timed("with", partial(step, "with"), counted)
            timed("without", partial(step, "without"), counted)
            timed("forward", lambda: forward(states["with"].params, states["with"].model_state, batch), counted)
    every = config.metrics.signal_every
    return {"every": every, "by": {clock: _ratios(times[clock], every) for clock in CLOCKS}}


def _ratios(times: dict[str, list[float]], every: int) -> dict[str, Any]:
    step, each = median_ratio(times["with"], times["without"]), median_ratio(times["forward"], times["without"])
    return {
        "times_s": times,
        "step_s": statistics.median(times["with"]),
        "step_over_without": step,
        "forward_over_step": each,
        "share": step["median"] - 1 + each["median"] / every,
    }


def program_shardings(program: Any) -> Any:
    state = jax.tree.map(lambda x: x.sharding, program.abstract_state)
    return state, jax.sharding.NamedSharding(program.mesh, jax.sharding.PartitionSpec())


if __name__ == "__main__":
    run_command(main, lasting=True)
