"""What the early warnings of training cost: a step with them against one without, and the program beside it.

    python -m experiments.benchmarks.signal_cost --config configs/throughput.py --json cpu-signal.json

Prints and records the step's seconds with `log_z`, `clip_factor` and `update_ratio` over those of the same step
without, in turn, the seconds of the forward program, and both together as a share of the step at metrics.signal_every.
"""

import time
from typing import Any

import jax

from experiments.benchmarks.timing import median_ratio, train_loader, write_record
from spannorm_jax.command import Parser, run_command
from spannorm_jax.config import Config
from spannorm_jax.config_file import load, split_overrides
from spannorm_jax.data.loader import TrainLoader
from spannorm_jax.data.open import open_data
from spannorm_jax.model.definition import define
from spannorm_jax.parallel.mesh import make_mesh
from spannorm_jax.parallel.platform import start_jax
from spannorm_jax.paths import user_path
from spannorm_jax.training.numbers import numbers_of, on_devices
from spannorm_jax.training.step import make_program, num_loss_chunks, train_step


def main(argv: list[str]) -> int:
    rest, overrides = split_overrides(argv)
    parser = Parser(prog="python -m experiments.benchmarks.signal_cost", description=__doc__)
    parser.add_argument("--config", required=True, help="FILE.py or FILE.py:arg, see configs/")
    parser.add_argument("--json", type=user_path, help="where the record goes")
    parser.add_argument("--rounds", type=int, default=8, help="times that each is measured, in turn")
    parser.add_argument("--steps", type=int, default=3, help="steps a round")
    args = parser.parse_args(rest)
    config = load(args.config, overrides)
    start_jax(config.platform)
    data, config = open_data(config)
    record = measure(config, train_loader(config, data), args.rounds, args.steps)
    step, each = record["step_over_without"], record["forward_over_step"]
    print(
        f"step {record['step_s']:.3f} s, {step['median']:.4f} ({step['low']} to {step['high']}) times one without; "
        f"forward program {each['median']:.3f} steps, so {record['share']:.2%} of a step every {record['every']} steps"
    )
    write_record(args.json, "experiments.benchmarks.signal_cost", argv, data, config, record)
    return 0


def measure(config: Config, loader: TrainLoader, rounds: int, steps: int) -> dict[str, Any]:
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        model = define(config.model, config.execution)
        program, numbers = make_program(config, model, mesh), on_devices(numbers_of(config), mesh)
        tokens = jax.device_put(loader.rows(1), program.batch_sharding)
        chunks = num_loss_chunks(config, dict(mesh.shape), len(tokens) // config.training.num_microbatches)

        def without(state: Any, tokens: Any, numbers: Any) -> Any:
            """What is not returned is not computed."""
            state, metrics = train_step(config, model, chunks, state, tokens, numbers)
            metrics.pop("signal")
            for name in ("log_z", "clip_factor"):
                metrics["scalars"].pop(name)
            return state, metrics

        states = {"with": program.init(config.seed), "without": program.init(config.seed)}
        lowered = {
            "with": program.train,
            "without": jax.jit(without, out_shardings=program_shardings(program), donate_argnums=0),
        }
        compiled = {name: fn.lower(states[name], tokens, numbers).compile() for name, fn in lowered.items()}
        forward = program.signal.lower(states["with"].params, states["with"].router, tokens).compile()
        times: dict[str, list[float]] = {"with": [], "without": [], "forward": []}
        for counted in (False, *[True] * rounds):
            for name, run in compiled.items():
                jax.block_until_ready(states[name])
                began = time.perf_counter()
                for _ in range(steps):
                    states[name], _ = run(states[name], tokens, numbers)
                jax.block_until_ready(states[name])
                if counted:
                    times[name].append((time.perf_counter() - began) / steps)
            began = time.perf_counter()
            jax.block_until_ready(forward(states["with"].params, states["with"].router, tokens))
            if counted:
                times["forward"].append(time.perf_counter() - began)
    step, each = median_ratio(times["with"], times["without"]), median_ratio(times["forward"], times["without"])
    every = config.metrics.signal_every
    return {
        "times_s": times,
        "step_s": sorted(times["with"])[rounds // 2],
        "step_over_without": step,
        "forward_over_step": each,
        "every": every,
        "share": step["median"] - 1 + each["median"] / every,
    }


def program_shardings(program: Any) -> Any:
    state = jax.tree.map(lambda x: x.sharding, program.abstract_state)
    return state, jax.sharding.NamedSharding(program.mesh, jax.sharding.PartitionSpec())


if __name__ == "__main__":
    run_command(main, lasting=True)
