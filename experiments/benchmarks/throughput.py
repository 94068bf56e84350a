"""Speed and memory of the train step, for each placement in one process, so that ratios hold on a noisy machine.

    python -m experiments.benchmarks.throughput --config configs/throughput.py --json cpu.json

Prints a table and writes the record: the machine's matmul peak, and for each placement tokens/s, its share of that
peak (6 x parameters x tokens, and with attention's FLOPs), compile seconds, memory against what the shapes say, where a
step's time goes, compile seconds at 12 and 128 blocks, and how long a start with cached programs takes.
"""

import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spannorm_jax.command import Parser, run_command
from spannorm_jax.config import Config, replace, to_dict
from spannorm_jax.config_file import load, split_overrides
from spannorm_jax.data.loader import TrainLoader
from spannorm_jax.data.open import OpenData, open_data
from spannorm_jax.durable import write_json
from spannorm_jax.errors import UserError
from spannorm_jax.model.definition import ModelDef, count_params, define, flops_per_token
from spannorm_jax.model.kernels.attention import attention, attention_for
from spannorm_jax.model.layers import Norm
from spannorm_jax.parallel.mesh import check_divisible, make_mesh
from spannorm_jax.parallel.platform import start_jax
from spannorm_jax.paths import user_path
from spannorm_jax.run.provenance import start_record
from spannorm_jax.run.state import TrainState
from spannorm_jax.training.numbers import Numbers, numbers_of, on_devices
from spannorm_jax.training.optimizer import make_optimizer
from spannorm_jax.training.step import loss_sums, make_program

PLACEMENTS = ("pre", "post", "span")


def main(argv: list[str]) -> int:
    rest, overrides = split_overrides(argv)
    parser = Parser(prog="python -m experiments.benchmarks.throughput", description=__doc__)
    parser.add_argument("--config", required=True, help="FILE.py or FILE.py:arg, see configs/")
    parser.add_argument("--json", type=user_path, help="where the record goes")
    parser.add_argument("--rounds", type=int, default=5, help="times that each placement is measured, in turn")
    parser.add_argument("--steps", type=int, default=5, help="steps a round")
    args = parser.parse_args(rest)
    config = load(args.config, overrides)
    warm_start_s = warm_start(
        [f"--config={args.config}", *(f"--config.{key}={value}" for key, value in overrides)]
    )  # before this process takes a GPU
    start_jax(config.platform)
    jax.config.update("jax_enable_compilation_cache", False)  # compile seconds are to be a compiler's
    data, config = open_data(config)
    record = measure(config, data, args.rounds, args.steps)
    record |= {"warm_start_s": warm_start_s, "compile_s_by_depth": compile_by_depth(config)}
    print_table(record)
    write_record(args.json, "experiments.benchmarks.throughput", argv, data, config, record)
    return 0


def write_record(
    path: Path | None, module: str, argv: list[str], data: OpenData, config: Config, record: dict[str, Any]
) -> None:
    """Writes a record with what made it, if it was asked for."""
    if path:
        start = start_record(module, argv, data, {"config": to_dict(config)})
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, start | record)


# ---- timing -----------------------------------------------------------------------------------


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
    a = jnp.ones((n, n), dtype)
    fn = jax.jit(jnp.matmul)
    jax.block_until_ready(fn(a, a))
    best = min(seconds(lambda: fn(a, a), repeats=3) for _ in range(3))
    return 2 * n**3 / best


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
            shape = (cfg.training.batch_size, cfg.data.seq_len + 1)
            tokens = jax.ShapeDtypeStruct(shape, "int32", sharding=program.batch_sharding)
            began = time.perf_counter()
            program.train.lower(program.abstract_state, tokens, numbers_of(cfg)).compile()
        seconds_at[str(depth)] = time.perf_counter() - began
    return seconds_at


# ---- the measurement ----------------------------------------------------------------------------


def measure(config: Config, data: OpenData, rounds: int, steps: int) -> dict[str, Any]:
    """One record: `peak_flops_per_s`, `tokens_per_step` and `placements`, a dict of numbers for each."""
    loader = train_loader(config, data)
    variants = {placement: replace(config, model__placement=placement) for placement in PLACEMENTS}
    peak = matmul_peak(config.model.dtype) * jax.device_count()
    placements = step_times(variants, loader, rounds, steps)
    with jax.set_mesh(make_mesh(config.mesh)):
        split = time_split(config, loader)
    for got in placements.values():
        pairs = zip(got["step_times_s"], placements["pre"]["step_times_s"], strict=True)
        got |= {
            "peak_share_6N": 6 * got["num_params"] * got["tokens_per_s"] / peak,
            "peak_share_model_flops": got["model_flops_per_s"] / peak,
            # Neighbours in time are compared, so that a slow minute of the machine slows both.
            "step_over_pre": statistics.median(mine / pre for mine, pre in pairs),
        }
    return {
        "peak_flops_per_s": peak,
        "tokens_per_step": config.training.batch_size * config.data.seq_len,
        "attention": attention_for(config.execution, config.model, config.data.seq_len)[0],
        "placements": placements,
        "time_split_s": split,
    }


def train_loader(config: Config, data: OpenData) -> TrainLoader:
    """Batches of `config`. Raises UserError if they or the model do not fit the devices."""
    rows = config.training.batch_size
    shape = dict(make_mesh(config.mesh).shape)
    check_divisible(config, shape, "training.batch_size", rows // config.training.num_microbatches)
    return TrainLoader(data.train, config.data.seq_len, rows, config.seed)


def step_times(variants: dict[str, Config], loader: TrainLoader, rounds: int, steps: int) -> dict[str, dict[str, Any]]:
    """The train step of each variant, measured in turn: its size, compile seconds, memory and seconds a step.

    `page_faults` (minor ones) and `system_s` (seconds in the kernel) are the process's, a step, on average.
    """
    measured: dict[str, dict[str, Any]] = {}
    running: dict[str, Any] = {}
    mesh = make_mesh(next(iter(variants.values())).mesh)
    with jax.set_mesh(mesh):
        for name, config in variants.items():
            model = define(config.model, config.execution)
            program = make_program(config, model, mesh)
            state = program.init(config.seed)
            tokens = jax.device_put(loader.rows(1), program.batch_sharding)
            numbers = on_devices(numbers_of(config), mesh)
            began = time.perf_counter()
            compiled = program.train.lower(state, tokens, numbers).compile()
            measured[name] = {
                "num_params": count_params(model),
                "active_params": count_params(model, active=True),
                "compile_s": time.perf_counter() - began,
                "memory": memory(config, model, compiled, state, tokens),
                "step_times_s": [],
                "page_faults": 0.0,
                "system_s": 0.0,
            }
            state, _ = compiled(state, tokens, numbers)  # the first call allocates
            running[name] = [compiled, state, tokens, numbers]
        for counted in (False, *[True] * rounds):
            for name, now in running.items():
                compiled, state, tokens, numbers = now
                jax.block_until_ready(state)
                before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
                for _ in range(steps):
                    state, metrics = compiled(state, tokens, numbers)
                jax.block_until_ready((state, metrics))
                elapsed, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
                if counted:  # the first round fills caches and the allocator
                    got = measured[name]
                    got["step_times_s"].append(elapsed / steps)
                    got["page_faults"] += (after.ru_minflt - before.ru_minflt) / (steps * rounds)
                    got["system_s"] += (after.ru_stime - before.ru_stime) / (steps * rounds)
                now[1] = state
    for name, config in variants.items():
        step = statistics.median(measured[name]["step_times_s"])
        rate = config.training.batch_size * config.data.seq_len / step
        flops = flops_per_token(define(config.model, config.execution), config.data.seq_len)
        measured[name] |= {"step_s": step, "tokens_per_s": rate, "model_flops_per_s": flops * rate}
    return measured


def memory(config: Config, model: ModelDef, compiled: Any, state: Any, tokens: Any) -> dict[str, float | None]:
    """Bytes on one device: of the compiled step, and as the shapes say: state + gradients + what backward needs."""
    analysis = compiled.memory_analysis()

    def residuals(params: Any, tokens: Any) -> Any:
        def loss(params: Any) -> Any:
            return loss_sums(model.bind(params), tokens, jnp.ones(tokens[:, 1:].shape), 1)["nll"]

        return jax.vjp(loss, params)[1]

    def size(tree: Any) -> int:
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))

    microbatch = tokens[:: config.training.num_microbatches]
    kept = size(jax.eval_shape(residuals, state.params, microbatch))
    computed = size((state.params, state.opt_state)) + kept  # the kept ones hold the weights, as many as gradients
    used = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes if analysis else None
    return {"step_bytes": used, "computed_bytes": computed, "ratio": used and used / computed}


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
        return seconds(lambda: grad(*inputs))

    x = normal(B * T, D)
    parts = 2 if m.ffn == "swiglu" else 1
    shapes = [(D, H * K), (D, G * K), (D, G * K), (H * K, D), (D, parts * F), (F, D)]
    matmuls = m.depth * sum(forward_backward(jnp.matmul, normal(B * T, a), normal(a, b)) for a, b in shapes)
    matmuls += forward_backward(jnp.matmul, x, normal(D, m.vocab_size))
    norm = Norm(m.norm, D, m.norm_eps, site="ffn")
    q, k, v = normal(B, T, H, K), normal(B, T, G, K), normal(B, T, G, K)
    mesh = make_mesh(config.mesh)
    model = define(m)
    program = make_program(config, model, mesh)
    state = program.init(0)
    numbers = on_devices(numbers_of(config), mesh)

    @jax.jit
    def update(state: TrainState, numbers: Numbers) -> Any:
        optimizer = make_optimizer(config.optim.name, config.optim.schedule, model, numbers)
        return optimizer.update(state.params, state.opt_state, state.params)

    microbatches = config.training.num_microbatches
    return {
        "matmuls": microbatches * matmuls,
        "attention": microbatches * m.depth * forward_backward(lambda *a: attention(*a, m.attention), q, k, v),
        "norms": microbatches * 2 * m.depth * forward_backward(norm, normal(B, T, D)),
        "optimizer": seconds(lambda: update(state, numbers)),
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
    by_depth = record["compile_s_by_depth"]
    print(f"compile at 128 blocks / at 12: {by_depth['128'] / by_depth['12']:.2f}; ", end="")
    print(f"a warm command of one step: {record['warm_start_s']:.1f} s")
    print("alone, a step: " + ", ".join(f"{k} {v * 1e3:.1f} ms" for k, v in record["time_split_s"].items()))


if __name__ == "__main__":
    run_command(main, lasting=True)
