"""Speed and memory of the train step, for each placement in one process, so that ratios hold on a noisy machine.

    python -m experiments.benchmarks.throughput --config configs/throughput.py --json cpu.json

Prints a table and writes the record: the machine's matmul peak, and for each placement tokens/s, its share of that
peak (6 x parameters x tokens, and with attention's FLOPs), compile seconds, memory against what the shapes say, where a
step's time goes, compile seconds at 12 and 128 blocks, and how long a start with cached programs takes.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import timing
from spannorm_jax.command import run_command
from spannorm_jax.config import Config, replace
from spannorm_jax.config_file import load, split_overrides
from spannorm_jax.data.loader import TrainLoader
from spannorm_jax.data.open import OpenData, open_data
from spannorm_jax.errors import UserError, did_you_mean
from spannorm_jax.model.definition import define
from spannorm_jax.model.kernels.attention import attention, attention_for
from spannorm_jax.model.layers import Norm
from spannorm_jax.model.placement import PLACEMENTS
from spannorm_jax.parallel.mesh import make_mesh
from spannorm_jax.parallel.platform import start_jax
from spannorm_jax.run.state import TrainState
from spannorm_jax.training.numbers import Numbers, numbers_of, on_devices
from spannorm_jax.training.optimizer import make_optimizer
from spannorm_jax.training.step import make_program

MAIN = "pre,post,span"


def main(argv: list[str]) -> int:
    rest, overrides = split_overrides(argv)
    parser = timing.benchmark_parser("throughput", __doc__, rounds=5, steps=5)
    parser.add_argument("--placements", default=MAIN, help=f"beside pre, or all (default {MAIN})")
    parser.add_argument(
        "--only_steps", action="store_true", help="neither parts of a step, nor a warm start, nor other depths"
    )
    args = parser.parse_args(rest)
    config = load(args.config, overrides)
    names = tuple(PLACEMENTS) if args.placements == "all" else tuple(args.placements.split(","))
    for name in names:
        if name not in PLACEMENTS:
            raise UserError(f"--placements {name!r} is no placement; {did_you_mean(name, PLACEMENTS)}")
    more: dict[str, Any] = {}
    if not args.only_steps:  # before this process takes a GPU
        own = [f"--config={args.config}", *(f"--config.{key}={value}" for key, value in overrides)]
        more["warm_start_s"] = warm_start(own)
    start_jax(config.platform)
    jax.config.update("jax_enable_compilation_cache", False)  # compile seconds are to be a compiler's
    data, config = open_data(config)
    record = measure(config, data, names, args.rounds, args.steps)
    if not args.only_steps:
        with jax.set_mesh(make_mesh(config.mesh)):
            more["time_split_s"] = time_split(config, timing.train_loader(config, data))
        more["compile_s_by_depth"] = compile_by_depth(config)
    record |= more
    print_table(record)
    timing.write_record(args.json, "experiments.benchmarks.throughput", argv, data, config, record)
    return 0


# ---- timing -----------------------------------------------------------------------------------


def warm_start(arguments: list[str]) -> float:
    """Seconds of a training command of one step from its start to its end, its programs cached by one before it.

    The save at its end is in it, the making of the token store is not.
    """
    with tempfile.TemporaryDirectory() as folder:
        for name in ("cold", "warm"):
            began = time.perf_counter()
            command = [sys.executable, "-m", "spannorm_jax.train", *arguments, "--config.training.steps=1"]
            done = subprocess.run([*command, f"--workdir={folder}/{name}"], capture_output=True, text=True)
            if done.returncode:
                raise UserError(f"a run of one step failed: {(done.stderr or done.stdout).strip().splitlines()[-1]}")
            elapsed = time.perf_counter() - began
    return elapsed


def compile_by_depth(config: Config) -> dict[str, float]:
    """Seconds to compile the step at 12 and at 128 blocks; nothing is allocated."""
    mesh = make_mesh(config.mesh)
    seconds_at = {}
    for depth in (12, 128):
        cfg = replace(config, model__depth=depth)
        with jax.set_mesh(mesh):
            program = make_program(cfg, define(cfg.model), mesh)
            began = time.perf_counter()
            program.train.lower(program.abstract_state, program.abstract_batch, numbers_of(cfg)).compile()
        seconds_at[str(depth)] = time.perf_counter() - began
    return seconds_at


# ---- the measurement ----------------------------------------------------------------------------


def variants(config: Config, names: Sequence[str]) -> dict[str, Config]:
    """Placement -> config, PreNorm first."""
    return {placement: replace(config, model__placement=placement) for placement in dict.fromkeys(("pre", *names))}


def measure(config: Config, data: OpenData, names: Sequence[str], rounds: int, steps: int) -> dict[str, Any]:
    """One record: `peak_flops_per_s`, `tokens_per_step` and `placements`, a dict of numbers for each."""
    loader = timing.train_loader(config, data)
    peak = timing.matmul_peak(config.model.dtype) * jax.device_count()
    placements = timing.step_times(variants(config, names), loader, rounds, steps)
    for got in placements.values():
        ratio = timing.median_ratio(got["step_times_s"], placements["pre"]["step_times_s"])
        got |= {
            "peak_share_6N": 6 * got["num_params"] * got["tokens_per_s"] / peak,
            "peak_share_model_flops": got["model_flops_per_s"] / peak,
            "step_over_pre": ratio["median"],
            "step_over_pre_interval": [ratio["low"], ratio["high"]],
        }
    return {
        "peak_flops_per_s": peak,
        "tokens_per_step": config.training.batch_size * config.data.seq_len,
        "attention": attention_for(config.execution, config.model, config.data.seq_len)[0],
        "placements": placements,
    }


# ---- where the time goes ------------------------------------------------------------------------


def time_split(config: Config, loader: TrainLoader) -> dict[str, float]:
    """Seconds a step spends in each kind of work, forward and backward, each timed alone on one device.

    Fusion makes the whole cheaper than its parts or not, so these need not add up to a step.
    """
    m, B, T = config.model, config.training.batch_size // config.training.num_microbatches, config.data.seq_len
    D, H, G, K, F = m.width, m.num_heads, m.num_kv_heads, m.width // m.num_heads, m.ffn_dim
    key = jax.random.key(0)

    def normal(*shape: int) -> Any:
        return jax.random.normal(key, shape, m.dtype)

    def forward_backward(fn: Callable[..., Any], *inputs: Any) -> float:
        def scalar(*xs: Any) -> Any:
            return jnp.sum(fn(*xs).astype(jnp.float32))

        grad = jax.jit(jax.grad(scalar, argnums=tuple(range(len(inputs)))))
        return timing.seconds(lambda: grad(*inputs))

    x = normal(B * T, D)
    parts = 2 if m.ffn == "swiglu" else 1
    shapes = [(D, H * K), (D, G * K), (D, G * K), (H * K, D), (D, parts * F), (F, D)]
    matmuls = m.depth * sum(forward_backward(jnp.matmul, normal(B * T, a), normal(a, b)) for a, b in shapes)
    matmuls += forward_backward(jnp.matmul, x, normal(D, m.vocab_size))
    norm = Norm(m.norm, D, m.norm_eps, site="ffn")
    q, k, v = normal(B, T, H, K), normal(B, T, G, K), normal(B, T, G, K)
    mesh = make_mesh(config.mesh)
    model = define(m, config.execution)
    program = make_program(config, model, mesh)
    state = program.init(0)
    numbers = on_devices(numbers_of(config), mesh)

    @jax.jit
    def update(state: TrainState, numbers: Numbers) -> Any:
        optimizer = make_optimizer(config.optim, model, numbers)
        return optimizer.update(state.params, state.opt_state, state.params)

    microbatches = config.training.num_microbatches
    attend = partial(attention, implementation=config.execution.attention)
    return {
        "matmuls": microbatches * matmuls,
        "attention": microbatches * m.depth * forward_backward(attend, q, k, v),
        "norms": microbatches * 2 * m.depth * forward_backward(norm, normal(B, T, D)),
        "optimizer": timing.seconds(lambda: update(state, numbers)),
        "input": _input_seconds(loader),
    }


def _input_seconds(loader: TrainLoader) -> float:
    began = time.perf_counter()
    for step in range(1, 11):
        np.asarray(loader.rows(step))
    return (time.perf_counter() - began) / 10


def print_table(record: dict[str, Any]) -> None:
    peak, tokens = record["peak_flops_per_s"], record["tokens_per_step"]
    print(f"matmul peak {peak / 1e9:,.0f} GFLOP/s; {tokens:,} tokens a step; attention {record['attention']}")
    print(
        f"{'placement':<11}{'tokens/s':>10}{'6N share':>10}{'step':>11}{'vs pre':>9}{'compile':>10}"
        f"{'memory':>11}{'x shapes':>10}{'faults':>9}"
    )
    for name, p in record["placements"].items():
        used = p["memory"]["step_bytes"]
        print(
            f"{name:<11}{p['tokens_per_s']:>10,.0f}{p['peak_share_6N']:>10.1%}{p['step_s'] * 1e3:>8.1f} ms"
            f"{p['step_over_pre']:>9.3f}{p['compile_s']:>8.1f} s"
            f"{(used or 0) / 2**20:>7,.0f} MiB{p['memory']['ratio'] or 0:>10.2f}"
            f"{p['page_faults']:>9,.0f}"
        )
    if "compile_s_by_depth" not in record:
        return
    by_depth = record["compile_s_by_depth"]
    print(f"compile at 128 blocks / at 12: {by_depth['128'] / by_depth['12']:.2f}; ", end="")
    print(f"a warm command of one step: {record['warm_start_s']:.1f} s")
    print("alone, a step: " + ", ".join(f"{k} {v * 1e3:.1f} ms" for k, v in record["time_split_s"].items()))


if __name__ == "__main__":
    run_command(main, lasting=True)
