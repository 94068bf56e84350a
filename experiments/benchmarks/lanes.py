"""What lanes gain: one step of K lanes against K steps of a single run, in turn, in one process.

    python -m experiments.benchmarks.lanes --config configs/dense.py:tiny --json lanes.json

Prints for each K how many times as many steps of a run a second there are, the median over rounds with its 95%
interval, and writes the record. Lanes take the devices as in training: on several each has a part of them.
"""

import time
from typing import Any

import jax
import numpy as np

from experiments.benchmarks.timing import benchmark_parser, median_ratio, ratio_text, train_loader, write_record
from spannorm_jax.command import run_command
from spannorm_jax.config import Config
from spannorm_jax.config_file import load, split_overrides
from spannorm_jax.data.loader import TrainLoader
from spannorm_jax.data.open import open_data
from spannorm_jax.model.definition import define
from spannorm_jax.parallel.mesh import make_mesh
from spannorm_jax.parallel.platform import start_jax
from spannorm_jax.training.lanes import LaneProgram, stacked_numbers
from spannorm_jax.training.numbers import numbers_of, on_devices
from spannorm_jax.training.program_key import check_lanes
from spannorm_jax.training.step import make_program


class Timed:
    """A compiled step with what it takes; `seconds(n)` of n steps, which are waited for."""

    def __init__(self, config: Config, loader: TrainLoader, lanes: int):
        """`lanes` 0 is a single run."""
        model, mesh = define(config.model, config.execution), make_mesh(config.mesh, lanes=max(lanes, 1))
        program = make_program(config, model, mesh)
        self._mesh, tokens = mesh, loader.rows(1)
        with jax.set_mesh(mesh):
            if lanes:
                made = LaneProgram(config, model, program, lanes)
                self._state = made.stack(*(program.init(seed) for seed in range(lanes)))
                self._batch = jax.device_put({"tokens": np.stack([tokens] * lanes)}, made.batch_shardings)
                self._numbers = on_devices(stacked_numbers([config] * lanes), mesh, ("lanes",))
                train: Any = made.train
            else:
                self._state, train = program.init(0), program.train
                self._batch = program.put({"tokens": tokens})
                self._numbers = on_devices(numbers_of(config), mesh)
            began = time.perf_counter()
            self._step = train.lower(self._state, self._batch, self._numbers).compile()
            self.compile_s = time.perf_counter() - began

    def seconds(self, steps: int) -> float:
        began = time.perf_counter()
        for _ in range(steps):
            self._state, metrics = self._step(self._state, self._batch, self._numbers)
        jax.block_until_ready((self._state, metrics))
        return time.perf_counter() - began


def main(argv: list[str]) -> int:
    rest, overrides = split_overrides(argv)
    steps_are = "steps of K lanes a round, against as many of K runs"
    parser = benchmark_parser("lanes", __doc__, rounds=10, steps=1, steps_are=steps_are)
    parser.add_argument("--lanes", default="1,2,4,8", help="numbers of lanes, with commas between")
    args = parser.parse_args(rest)
    if not all(text.isdecimal() and int(text) for text in args.lanes.split(",")):
        parser.error(f"--lanes {args.lanes!r} must be numbers from 1 on, with commas between")
    config = load(args.config, overrides)
    check_lanes({"it": config})
    start_jax(config.platform)
    jax.config.update("jax_enable_compilation_cache", False)  # compile seconds are to be a compiler's
    data, config = open_data(config)
    loader = train_loader(config, data)
    alone = Timed(config, loader, 0)
    record: dict[str, Any] = {"compile_s": alone.compile_s, "lanes": {}}
    for lanes in map(int, args.lanes.split(",")):  # one at a time: what is measured has the memory for itself
        together = Timed(config, loader, lanes)
        times: dict[str, list[float]] = {"alone": [], "together": []}
        for counted in (False, *[True] * args.rounds):
            seconds = {"alone": alone.seconds(lanes * args.steps), "together": together.seconds(args.steps)}
            if counted:  # the first round fills caches and the allocator
                for name, measured in times.items():
                    measured.append(seconds[name])
        gain = median_ratio(times["alone"], times["together"])
        record["lanes"][str(lanes)] = times | {"compile_s": together.compile_s, "gain": gain}
        print(
            f"{lanes:>3} lanes: {ratio_text(gain, '.2f')} times as many steps a second; "
            f"compiled in {together.compile_s:.1f} s, a single run in {alone.compile_s:.1f} s",
            flush=True,
        )
        # What is measured is kept if a later K does not fit, or takes too long to compile.
        write_record(args.json, "experiments.benchmarks.lanes", argv, data, config, record)
    return 0


if __name__ == "__main__":
    run_command(main, lasting=True)
