"""From a training command to the end of its first step, part by part, with warm caches.

    python -m experiments.benchmarks.startup --config configs/dense.py:tiny --json startup.json

Each measurement is a process of its own that does what `spannorm_jax.train` does, in its order, and notes the time
after each part. The first one fills the caches (compiled programs, token store) and is not counted. Prints a table of
medians and writes the record. `restore` takes the place of `draw weights` when a run goes on.
"""

import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from spannorm_jax.command import Parser, run_command
from spannorm_jax.config_file import load, split_overrides
from spannorm_jax.errors import UserError
from spannorm_jax.paths import user_path


def main(argv: list[str]) -> int:
    if argv[:1] == ["--child"]:
        print(json.dumps(child(Path(argv[1]), *split_overrides(argv[2:]))))
        return 0
    rest, overrides = split_overrides(argv)
    parser = Parser(prog="python -m experiments.benchmarks.startup", description=__doc__)
    parser.add_argument("--config", required=True, help="FILE.py or FILE.py:arg, see configs/")
    parser.add_argument("--json", type=user_path, help="where the record goes")
    parser.add_argument("--rounds", type=int, default=5, help="processes that are measured")
    args = parser.parse_args(rest)
    load(args.config, overrides)  # a mistake is said once, here
    command = [sys.executable, "-m", "experiments.benchmarks.startup", "--child"]
    with tempfile.TemporaryDirectory() as folder:
        runs = []
        for _ in range(args.rounds + 1):
            began = time.time()
            arguments = [folder, args.config, *(f"--config.{key}={value}" for key, value in overrides)]
            done = subprocess.run([*command, *arguments], stdout=subprocess.PIPE, text=True)
            if done.returncode:
                raise UserError("a start failed (see above)")
            marks = {"python": began} | json.loads(done.stdout.splitlines()[-1])
            parts = (later - earlier for earlier, later in itertools.pairwise(marks.values()))
            runs.append(dict(zip(list(marks)[1:], parts, strict=True)))
    medians = {name: statistics.median(run[name] for run in runs[1:]) for name in runs[1]}
    for name, value in medians.items():
        print(f"{name:<28}{value:>7.2f} s")
    from_command = sum(value for name, value in medians.items() if name not in ("save", "restore"))
    print(f"{'to the end of the first step':<28}{from_command:>7.2f} s, without save and restore")
    _write(args.json, argv, args.config, overrides, {"parts_s": medians, "runs_s": runs[1:]})
    return 0


def child(folder: Path, rest: list[str], overrides: list[tuple[str, str]]) -> dict[str, float]:
    """Seconds since the epoch at the end of each part."""
    marks = {"python's start": time.time()}

    def mark(name: str) -> None:
        marks[name] = time.time()

    config = load(rest[0], overrides)
    mark("config")
    import jax
    from flax import nnx  # noqa: F401

    mark("import jax and flax")
    import orbax.checkpoint  # noqa: F401

    mark("import orbax")
    from spannorm_jax.parallel.platform import start_jax
    from spannorm_jax.run.checkpoint import Checkpoints
    from spannorm_jax.training import loop  # noqa: F401
    from spannorm_jax.training.flags import Flags
    from spannorm_jax.training.session import match_machine

    mark("other imports")
    start_jax(config.platform)
    mark("backend")
    session = match_machine(config, folder, Flags([]))
    mark("data and model")
    program = session.program
    with jax.set_mesh(session.mesh):
        state = jax.block_until_ready(program.init(session.config.seed))
        mark("draw weights")
        batch = program.put(session.rows(1, 0, session.config.training.batch_size))
        lowered = program.train.lower(state, batch, session.numbers)
        mark("trace and lower")
        compiled = lowered.compile()
        mark("compile, from the cache")
        state, _ = jax.block_until_ready(compiled(state, batch, session.numbers))
        mark("first step")
        checkpoints = Checkpoints(folder / "checkpoints", session.config.checkpoint)
        checkpoints.save(time.time_ns() % 2**31, state, {})
        checkpoints.wait()
        mark("save")
        newest = checkpoints.latest_step()
        assert newest is not None
        jax.block_until_ready(checkpoints.restore(newest, program.abstract_state))
        mark("restore")
        checkpoints.close()
    return marks


def _write(
    path: Path | None, argv: list[str], spec: str, overrides: list[tuple[str, str]], record: dict[str, Any]
) -> None:
    if path is None:
        return
    from experiments.benchmarks.timing import write_record
    from spannorm_jax.data.open import open_data
    from spannorm_jax.parallel.platform import start_jax

    config = load(spec, overrides)
    start_jax(config.platform)
    data, config = open_data(config)
    write_record(path, "experiments.benchmarks.startup", argv, data, config, record)


if __name__ == "__main__":
    run_command(main, lasting=True)
