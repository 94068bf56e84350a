"""What a session of one GPU measures before its runs, and its programs compiled without a GPU."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.benchmarks import moe_throughput, throughput, variants
from spannorm_jax.config import Config
from spannorm_jax.config_file import load
from spannorm_jax.errors import one_line
from spannorm_jax.plan import target
from spannorm_jax.resolution import fill_sizes

Overrides = Sequence[tuple[str, str]]
Planned = tuple[str, str, dict[str, Any]]
NO_AUTOTUNING = "--xla_gpu_autotune_level=0"  # which takes three quarters of the time to compile (docs/sweeps.md)


@dataclass(frozen=True)
class Measure:
    """A benchmark that leaves the record gpu-NAME.json; it is stopped after so many seconds.

    Its options are its command's, less the config. Every record has compile seconds apart.
    """

    name: str
    module: str
    config: str
    batch_size: int
    options: tuple[str, ...]
    limit_s: int
    autotuned: bool = False

    def option(self, name: str) -> str:
        return next(text.partition("=")[2] for text in self.options if text.startswith(f"--{name}="))

    def overrides(self, overrides: Overrides) -> Overrides:
        """`overrides` of every run come last, so that a rehearsal can be small."""
        return [("training.batch_size", str(self.batch_size)), *overrides]

    def programs(self, overrides: Overrides) -> Iterator[tuple[str, str, Config, int]]:
        """What the command compiles: title, kind (`plan.programs`), config, number of lanes."""
        own = list(self.overrides(overrides))
        if self.module == "lanes":
            config = load(self.config, own)
            for lanes in map(int, self.option("lanes").split(",")):
                yield f"{lanes} lanes", "lanes", config, lanes
            yield "alone", "train", config, 1
            return
        if self.module == "variants":
            configs = variants.variants(self.config, self.option("option"), own)
        elif self.module == "moe_throughput":
            numbers, backends = self.option("experts").split(","), self.option("grouped_matmul").split(",")
            dense = fill_sizes(load(self.config, own))
            configs = moe_throughput.models(dense, numbers, int(self.option("top_k")), backends)
        else:
            configs = throughput.variants(load(self.config, own), self.option("placements").split(","))
        for name, config in configs.items():
            yield name, "train", config, 1


_QUICK = ("--rounds=8", "--steps=5")
_STEPS = (*_QUICK, "--only_steps")
_EXPERTS = ("--experts=8", "--top_k=2", "--grouped_matmul=auto,padded,ragged_dot", *_QUICK)
# The most valuable first.
MEASURES = (
    Measure("50m", "throughput", "configs/dense.py:124m,depth=8,width=512", 64, ("--placements=span", *_STEPS), 90),
    Measure("124m", "throughput", "configs/dense.py:124m", 64, ("--placements=span,post", *_STEPS), 150),
    Measure("124m-autotuned", "throughput", "configs/dense.py:124m", 64, ("--placements=span", *_STEPS), 240, True),
    Measure("350m", "throughput", "configs/dense.py:350m", 32, ("--placements=span", *_STEPS), 150),
    Measure("moe-8", "moe_throughput", "configs/dense.py:124m", 16, _EXPERTS, 200),
    Measure(
        "attention", "variants", "configs/dense.py:124m", 64, ("--option=execution.attention=cudnn,xla", *_QUICK), 120
    ),
    Measure("unrolled", "variants", "configs/dense.py:124m", 64, ("--option=execution.scan_unroll=1,12", *_QUICK), 200),
    Measure("lanes-s", "lanes", "configs/dense.py:tiny,depth=12,width=64", 8, ("--lanes=1,8,32", "--rounds=8"), 120),
    Measure("lanes-m", "lanes", "configs/dense.py:tiny,depth=24,width=64", 128, ("--lanes=1,8", "--rounds=8"), 120),
)


def measure(one: Measure, out: Path, seconds: float, overrides: Overrides, stop: Callable[[], bool]) -> bool:
    """Runs a benchmark for at most so many seconds, or until `stop`: whether its record is whole.

    What it wrote before it was stopped stays. OUT keeps autotuning's results for the next session.
    """
    tuned = out.absolute() / "autotuned"
    tuned.mkdir(parents=True, exist_ok=True)
    flags = f"--xla_gpu_per_fusion_autotune_cache_dir={tuned}" if one.autotuned else NO_AUTOTUNING
    part = out / f"gpu-{one.name}.part.json"
    command = [sys.executable, "-m", f"experiments.benchmarks.{one.module}", f"--config={one.config}", *one.options]
    command += [f"--json={part}", *(f"--config.{key}={value}" for key, value in one.overrides(overrides))]
    environment = os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()}
    deadline = time.monotonic() + seconds
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        while process.poll() is None and time.monotonic() < deadline and not stop():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1)
    finally:
        with contextlib.suppress(ProcessLookupError):  # what it has started too
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.returncode:
        how = "stopped" if process.returncode < 0 else f"failed with code {process.returncode}"
        print(f"{one.name}: {how}; it is tried again by the same command", flush=True)
        return False
    part.replace(out / f"gpu-{one.name}.json")
    return True


def compile_for(to: target.Target, programs: Iterable[tuple[str, str, str, Config, int]]) -> Iterator[Planned]:
    """Compiles programs for a GPU that need not be here: name, title, what its compiler plans.

    A program that does not compile or fit yields its error, and the next follows.
    """
    for name, title, kind, config, lanes in programs:
        planned: dict[str, Any] = {}
        try:
            resolved = target.resolved(config, to, kind)
            for _, cost, seconds in target.costs(resolved, to, kind, lanes):
                planned = {"memory": cost.memory, "kernels": cost.kernels, "moved": cost.moved, "compile_s": seconds}
                planned["least_s"] = target.seconds_of(cost, resolved, to, kind)
        except target.DoesNotFit as refused:
            planned = {"error": f"needs {refused.needed / 1e9:.0f} of {refused.available / 1e9:.0f} GB"}
        except Exception as error:  # a compiler's: it is what this is to find
            planned = {"error": one_line(error)[:300]}
        yield name, title, planned
