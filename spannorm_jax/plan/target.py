"""The plan of a program by the compiler of the devices that it is for, which need not be here."""

import importlib.metadata
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import jax

from spannorm_jax.config import Config, divisors, replace
from spannorm_jax.config_file import resolve_without_data
from spannorm_jax.errors import UserError, one_line
from spannorm_jax.model.definition import flops_per_token
from spannorm_jax.model.stack import remat_for
from spannorm_jax.parallel.devices import DEVICE_KINDS, DeviceKind, known_kind
from spannorm_jax.parallel.mesh import batch_shards, check_divisible, mesh_shape
from spannorm_jax.plan.cost import TargetCost, cost_of
from spannorm_jax.plan.programs import compile_programs
from spannorm_jax.plan.topology import compiling_for, topology_devices
from spannorm_jax.plan.words import setting, size_words
from spannorm_jax.resolution import check_text
from spannorm_jax.training.tasks import task_of

_MOST_TRIES = 4  # programs that are compiled to find one that fits
_NEEDS = re.compile(
    r"([\d.]+[KMGT]?)\)? exceeds available HBM \(([\d.]+[KMGT]?)\)|Used ([\d.]+[KMGT]) of ([\d.]+[KMGT])"
)


@dataclass(frozen=True)
class Target:
    """Devices of a topology that has been asked for by name."""

    name: str
    devices: list[Any]
    kind: DeviceKind

    @property
    def platform(self) -> str:
        return self.devices[0].platform


@dataclass(eq=False)
class DoesNotFit(Exception):
    """The compiler refuses a program for lack of memory."""

    needed: float  # bytes
    available: float


def open_target(name: str, slices: int) -> Target:
    """Raises UserError if its compiler is not here, or does not know it."""
    devices = topology_devices(name, slices)
    kind = known_kind(devices[0].device_kind)
    assert kind is not None, devices[0].device_kind
    return Target(f"{slices} x {name}" if slices > 1 else name, devices, DEVICE_KINDS[kind])


def plan(config: Config, other: Config | None, target: Target, program: str, num_lanes: int) -> int:
    """Prints the plan of a program of `config`, and how another config's compares.

    Raises:
      UserError: the mesh does not fit the devices or the model.
    """
    plans = []
    for one in [config] if other is None else [config, other]:
        one = resolved(one, target, program)
        print(f"{setting(one, target.platform)}\n{_where(one, target)}\n", flush=True)
        try:
            plans.append(costs(one, target, program, num_lanes))
        except DoesNotFit as refused:
            print(_refusal(one, target, program, num_lanes, refused))
            return 0
        for name, cost, seconds in plans[-1]:
            print(report(name, cost, one, target, seconds), flush=True)
    if other is not None:
        print(_compared(*plans))
    return 0


def resolved(config: Config, target: Target, program: str) -> Config:
    """The config as it runs on the target. Raises UserError if the mesh does not fit the devices or the model."""
    if program == "sample":
        check_text(config, "--program sample")
    config = resolve_without_data(config, platform="accelerator")
    shape = mesh_shape(config.mesh, len(target.devices))
    if program == "evaluate":
        check_divisible(config, shape, "eval.batch_size", config.eval.batch_size)
    elif program != "sample":
        microbatch = config.training.batch_size // config.training.num_microbatches
        check_divisible(config, shape, "training.batch_size / num_microbatches", microbatch)
    return config


def costs(config: Config, target: Target, program: str, num_lanes: int) -> list[tuple[str, TargetCost, float]]:
    """Name, cost and compile seconds of each program. Raises DoesNotFit."""
    found = []
    clock = target.kind.clock_ghz * 1e9
    with compiling_for(target.devices):
        for name, compile_it in compile_programs(program, config, target.devices, num_lanes):
            began = time.monotonic()
            try:
                compiled = compile_it()
            except jax.errors.JaxRuntimeError as error:
                broken = UserError(f"{target.name}'s compiler fails on {name}: {one_line(error)[:300]}")
                raise _as_refusal(error) or broken from None
            seconds = time.monotonic() - began
            cost = cost_of(compiled, target.platform, target.kind.peak_flops / clock if clock else 0.0)
            if target.platform == "gpu" and cost.memory > target.kind.memory_gb * 1e9:
                raise DoesNotFit(cost.memory, target.kind.memory_gb * 1e9)
            found.append((name, cost, seconds))
    return found


def _as_refusal(error: Exception) -> DoesNotFit | None:
    found = _NEEDS.search(str(error)) if "RESOURCE_EXHAUSTED" in str(error) else None
    if not found:
        return None
    needed, available = (text for text in found.groups() if text)
    return DoesNotFit(_bytes(needed), _bytes(available))


def _bytes(text: str) -> float:
    return float(text.rstrip("KMGT")) * 2 ** (10 * " KMGT".index(text[-1] if text[-1] in "KMGT" else " "))


# ---- what fits instead ------------------------------------------------------------------------------


def _refusal(config: Config, target: Target, program: str, num_lanes: int, refused: DoesNotFit) -> str:
    words = f"does not fit: {size_words(refused.needed)} of the {size_words(refused.available)} of a device"
    if program != "train":
        return words
    tried = []
    for change, other in islice(_smaller(config, target, refused), _MOST_TRIES):
        try:
            [(_, cost, _)] = costs(other, target, program, num_lanes)
        except DoesNotFit:
            tried.append(change)
            continue
        return f"{words}\nfits with {change}: {size_words(cost.memory)}"
    return f"{words}\nnor does it with {', or '.join(tried)}" if tried else words


def _smaller(config: Config, target: Target, refused: DoesNotFit) -> Iterator[tuple[str, Config]]:
    """Configs of the same run that take less memory, the nearest first: (what to write, config)."""
    words = ""
    if remat_for(config.execution.remat, target.platform) != "block":
        words, config = "--config.execution.remat=block", replace(config, execution__remat="block")
        yield words, config
    shape = mesh_shape(config.mesh, len(target.devices))
    fsdp = shape["data"] * shape["fsdp"]
    if shape["data"] > 1 and config.model.width % fsdp == 0:
        words += f" --config.mesh.fsdp={fsdp} --config.mesh.data=1"
        config = replace(config, mesh__fsdp=fsdp, mesh__data=1)
        yield words.strip(), config
    now = config.training.num_microbatches
    more = [k for k in divisors(config.training.batch_size // batch_shards(shape)) if k > now and k % now == 0]
    # Fewer pieces than the memory is exceeded by would still be too much.
    for pieces in [k for k in more if k / now >= refused.needed / refused.available] or more[-1:]:
        piece = f"{words} --config.training.num_microbatches={pieces}"
        yield piece.strip(), replace(config, training__num_microbatches=pieces)


# ---- words --------------------------------------------------------------------------------------------


def _where(config: Config, target: Target) -> str:
    compiler = "libtpu" if target.platform == "tpu" else "jax-cuda12-plugin"
    shape = mesh_shape(config.mesh, len(target.devices))
    return (
        f"{target.name}: {len(target.devices)} x {target.devices[0].device_kind}, mesh {shape}\n"
        f"planned by {compiler} {importlib.metadata.version(compiler)}; nothing ran"
    )


def report(name: str, cost: TargetCost, config: Config, target: Target, seconds: float) -> str:
    """The printed plan of one program."""
    names = ("arguments", "temporaries", "outputs", "code")
    parts = ", ".join(f"{part} {size_words(size)}" for part in names if (size := getattr(cost, part)))
    return "\n".join(
        [
            f"{name}, compiled in {seconds:.0f} s",
            f"  memory of a device  {size_words(cost.memory)} of {target.kind.memory_gb} GB: it fits ({parts})",
            *_time(name, cost, config, target),
            *_traffic(cost),
            "",
        ]
    )


def seconds_of(cost: TargetCost, config: Config, target: Target, program: str) -> float:
    """A TPU's by its compiler's model, a GPU's at least: its memory traffic, and the peak; 0 if a chip's clock is not
    known."""
    if target.platform == "tpu":
        return cost.all_cycles / target.kind.clock_ghz / 1e9 if target.kind.clock_ghz else 0.0
    return max(cost.moved / target.kind.bandwidth, _fastest(config, target, program))


def peak_share(cost: TargetCost, config: Config, target: Target, program: str) -> float:
    """The FLOPs that MFU counts, at the peak, over `seconds_of`; 0 where there is none, or the program is no step."""
    seconds = seconds_of(cost, config, target, program)
    return _fastest(config, target, program) / seconds if seconds else 0.0


def _fastest(config: Config, target: Target, program: str) -> float:
    """Seconds of a train step's FLOPs at the peak; 0 for other programs."""
    task = task_of(config)
    positions = task.positions(config)
    flops = flops_per_token(task.define(config), positions) * config.training.batch_size * positions
    return flops / len(target.devices) / target.kind.peak_flops if program == "train" else 0.0


def _time(program: str, cost: TargetCost, config: Config, target: Target) -> list[str]:
    milliseconds = 1e3 * seconds_of(cost, config, target, program)
    if target.platform == "gpu":
        peak = f"; {1e3 * _fastest(config, target, program):.1f} ms of FLOPs at the peak" if program == "train" else ""
        work = f"{cost.kernels:,} kernels that move {size_words(cost.moved)}{peak}"
        return [f"  at least            {milliseconds:.1f} ms: {work}"]
    kernels = "".join(f" + {cycles / 1e6:.1f} of {kernel}" for kernel, cycles in sorted(cost.kernel_cycles.items()))
    lines = [f"  compiler's model    {cost.cycles / 1e6:.1f} million cycles{kernels}"]
    if target.kind.clock_ghz:
        share = f", {peak_share(cost, config, target, program):.0%} of the peak" if program == "train" else ""
        said = f"{milliseconds:.1f} ms at {target.kind.clock_ghz} GHz{share}; waiting is left out"
        lines.append(f"                      {said}")
    if cost.unknown:
        lines.append(f"                      not counted: {', '.join(cost.unknown)}")
    return lines


def _traffic(cost: TargetCost) -> list[str]:
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for one in cost.collectives:
        branch = f" in branch {'.'.join(map(str, one.branch))} of a condition" if one.branch else ""
        kind = "reduce-scatter" if one.sliced else one.kind.replace("_", "-")
        title = f"{kind}{branch}, {'while it computes' if one.asynchronous else 'waited for'}"
        counts[title] += one.count
        sizes[title] += one.received
    total = sum(one.received for one in cost.collectives if not one.branch)
    return [
        f"  received by a device{size_words(total):>12}, whatever branch a condition takes",
        *(f"    {title:<60}{counts[title]:>8,}{size_words(size):>12}" for title, size in sizes.most_common()),
    ]


def _compared(first: list[tuple[str, TargetCost, float]], second: list[tuple[str, TargetCost, float]]) -> str:
    lines = ["the second over the first"]
    for (name, one, _), (_, other, _) in zip(first, second, strict=True):
        measures = {
            "memory": (one.memory, other.memory),
            "temporaries": (one.temporaries, other.temporaries),
            "cycles": (one.all_cycles, other.all_cycles),
            "kernels": (one.kernels, other.kernels),
            "bytes that kernels move": (one.moved, other.moved),
            "bytes received": tuple(sum(c.received for c in cost.collectives) for cost in (one, other)),
        }
        ratios = [f"{measure} {b / a:.3f}" for measure, (a, b) in measures.items() if a]
        lines.append(f"  {name}: {', '.join(ratios)}")
    return "\n".join(lines)
