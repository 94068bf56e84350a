"""What the benchmarks share: train steps of several variants timed in turn, a matmul's rate, a record."""

import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from scipy.stats import quantile_test

from experiments.record import save_record
from spannorm_jax.command import Parser
from spannorm_jax.config import Config, to_dict
from spannorm_jax.data.loader import TrainLoader
from spannorm_jax.data.open import OpenData
from spannorm_jax.model.definition import ModelDef, count_params, define, flops_per_token
from spannorm_jax.parallel.mesh import check_divisible, make_mesh
from spannorm_jax.paths import user_path
from spannorm_jax.run.provenance import start_record
from spannorm_jax.training.numbers import numbers_of, on_devices
from spannorm_jax.training.step import make_program
from spannorm_jax.training.tasks.text import TEXT, loss_sums


def benchmark_parser(
    name: str, description: str | None, rounds: int, steps: int, config_is: str = "", steps_are: str = "steps a round"
) -> Parser:
    """The options that all benchmarks of the train step have, with the defaults of one of them."""
    parser = Parser(prog=f"python -m experiments.benchmarks.{name}", description=description)
    parser.add_argument("--config", required=True, help=f"{config_is}FILE.py or FILE.py:arg, see configs/")
    parser.add_argument("--json", type=user_path, help="where the record goes")
    parser.add_argument("--rounds", type=int, default=rounds, help="times that each is measured, in turn")
    parser.add_argument("--steps", type=int, default=steps, help=steps_are)
    return parser


def write_record(
    path: Path | None, module: str, argv: list[str], data: OpenData, config: Config, record: dict[str, Any]
) -> None:
    """Writes a record with what made it, if it was asked for."""
    if path:
        start = start_record(module, argv, TEXT.facts(data), {"config": to_dict(config)})
        save_record(path, start | record)


def seconds(fn: Callable[[], Any], repeats: int = 5) -> float:
    """Median seconds of a call, after one that is not counted; `fn` returns arrays that are waited for."""
    jax.block_until_ready(fn())
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(fn())
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def matmul_peak(dtype: str) -> float:
    """FLOP/s of a large square matmul in the compute dtype, on one device: the best of several."""
    n = 2048 if jax.default_backend() == "cpu" else 8192
    a = jax.random.normal(jax.random.key(0), (n, n), dtype)  # a GPU is faster on equal numbers than on a model's
    fn = jax.jit(jnp.matmul)
    jax.block_until_ready(fn(a, a))
    best = min(seconds(lambda: fn(a, a), repeats=3) for _ in range(3))
    return 2 * n**3 / best


def median_ratio(times: Sequence[float], others: Sequence[float]) -> dict[str, Any]:
    """The median of times / others, pair by pair, and its 95% interval (`low`, `high`; null below 6 pairs).

    Neighbours in time are paired, so that a slow minute of the machine slows both. The interval is
    that of order statistics, which asks nothing of how times are distributed.
    """
    ratios = [one / other for one, other in zip(times, others, strict=True)]
    found: dict[str, Any] = {"median": statistics.median(ratios), "pairs": len(ratios), "low": None, "high": None}
    if len(ratios) >= 6:  # fewer have no interval of 95%
        interval = quantile_test(ratios, p=0.5).confidence_interval(0.95)
        found |= {"low": float(interval.low), "high": float(interval.high)}
    return found


def ratio_text(ratio: dict[str, Any], form: str) -> str:
    """A ratio of `median_ratio` with its interval, where it has one."""
    interval = f" ({ratio['low']:{form}} to {ratio['high']:{form}})" if ratio["low"] else ""
    return f"{ratio['median']:{form}}{interval}"


def train_loader(config: Config, data: OpenData) -> TrainLoader:
    """Batches of `config`. Raises UserError if they or the model do not fit the devices."""
    rows = config.training.batch_size
    shape = dict(make_mesh(config.mesh).shape)
    check_divisible(config, shape, "training.batch_size", rows // config.training.num_microbatches)
    return TrainLoader(data.train, config.data.seq_len, rows, config.seed)


def step_times(
    variants: dict[str, Config],
    loader: TrainLoader,
    rounds: int,
    steps: int,
    while_traced: Callable[[str], AbstractContextManager[Any]] = nullcontext,
) -> dict[str, dict[str, Any]]:
    """The train step of each variant, measured in turn: its size, compile seconds, memory and seconds a step.

    `page_faults` (minor ones) and `system_s` (seconds in the kernel) are the process's, a step: the
    median over rounds. `most_page_faults` is that of the worst round: a step's block of temporaries
    may still be held when the next step asks for one, and a second block is then faulted in, once.
    A variant is traced within `while_traced(its name)`.
    """
    measured: dict[str, dict[str, Any]] = {}
    running: dict[str, Any] = {}
    mesh = make_mesh(next(iter(variants.values())).mesh)
    with jax.set_mesh(mesh):
        for name, config in variants.items():
            model = define(config.model, config.execution)
            program = make_program(config, model, mesh)
            began = time.perf_counter()
            state = jax.block_until_ready(program.init(config.seed))
            drawn_s = time.perf_counter() - began
            batch = program.put({"tokens": loader.rows(1)})
            numbers = on_devices(numbers_of(config), mesh)
            began = time.perf_counter()
            with while_traced(name):
                lowered = program.train.lower(state, batch, numbers)
            compiled = lowered.compile()
            measured[name] = {
                "num_params": count_params(model),
                "active_params": count_params(model, active=True),
                "compile_s": time.perf_counter() - began,
                "memory": memory(config, model, compiled, state, batch),
                "step_times_s": [],
                "page_faults": [],
                "system_s": [],
            }
            # On a GPU this takes minutes, in which nothing else is heard.
            print(f"{name}: drawn in {drawn_s:.1f} s, compiled in {measured[name]['compile_s']:.1f} s", file=sys.stderr)
            state, _ = compiled(state, batch, numbers)  # the first call allocates
            running[name] = [compiled, state, batch, numbers]
        for counted in (False, *[True] * rounds):
            for name, now in running.items():
                compiled, state, batch, numbers = now
                jax.block_until_ready(state)
                before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
                for _ in range(steps):
                    state, metrics = compiled(state, batch, numbers)
                jax.block_until_ready((state, metrics))
                elapsed, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
                if counted:  # the first round fills caches and the allocator
                    got = measured[name]
                    got["step_times_s"].append(elapsed / steps)
                    got["page_faults"].append((after.ru_minflt - before.ru_minflt) / steps)
                    got["system_s"].append((after.ru_stime - before.ru_stime) / steps)
                now[1] = state
    for name, config in variants.items():
        step = statistics.median(measured[name]["step_times_s"])
        rate = config.training.batch_size * config.data.seq_len / step
        flops = flops_per_token(define(config.model, config.execution), config.data.seq_len)
        faults = measured[name]["page_faults"]
        measured[name] |= {
            "page_faults": statistics.median(faults),
            "most_page_faults": max(faults),
            "system_s": statistics.median(measured[name]["system_s"]),
        }
        measured[name] |= {"step_s": step, "tokens_per_s": rate, "model_flops_per_s": flops * rate}
    return measured


def memory(config: Config, model: ModelDef, compiled: Any, state: Any, batch: Any) -> dict[str, float | None]:
    """Bytes on one device: of the compiled step, and as the shapes say: state + gradients + what backward needs."""
    analysis = compiled.memory_analysis()

    def residuals(params: Any, batch: Any) -> Any:
        def loss(params: Any) -> Any:
            return loss_sums(model.bind(params), batch)["objective"]

        return jax.vjp(loss, params)[1]

    def size(tree: Any) -> int:
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))

    microbatch = jax.tree.map(lambda x: x[:: config.training.num_microbatches], batch)
    kept = size(jax.eval_shape(residuals, state.params, microbatch))
    computed = size((state.params, state.opt_state)) + kept  # the kept ones hold the weights, as many as gradients
    used = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes if analysis else None
    return {"step_bytes": used, "computed_bytes": computed, "ratio": used and used / computed}
