"""What a device's compiler says of a compiled program: memory, cycles, kernels, bytes.

On a TPU cycles are XLA's `estimated_cycles` of the scheduled program. Loops are multiplied out, and
the cheapest branch of a condition counts. They leave out Pallas kernels, which have models here,
and all waiting. On a GPU there are no cycles: kernels and the bytes that they move are counted.
"""

import math
import re
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from spannorm_jax.plan.collectives import Collective, collectives
from spannorm_jax.plan.hlo import Instruction, Module, array_bytes

# Bundles of a TPU v5e's schedule for one block of (512, 512) logits of one head of up to 128, by kernel of splash
# attention, as libtpu compiles them at 1,024 positions. The fused kernel, which makes all gradients, has one block.
_SPLASH_BLOCK = 512
_SPLASH_BUNDLES = {"fwd": 2200, "dkv": 2500, "dq": 1880, "fused": 2570}
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id", "replica-id"}


@dataclass(frozen=True)
class TargetCost:
    """What a program takes of one device.

    Attributes:
      arguments, temporaries, outputs, code: bytes of memory; outputs are those that do not replace an argument.
      cycles: the compiler's own estimate (TPU).
      kernel_cycles: those of Pallas kernels by the models of this file, by name (TPU).
      unknown: kernels and loops that nothing estimates.
      kernels, moved: launches, and the bytes of their operands and results (GPU).
    """

    arguments: int
    temporaries: int
    outputs: int
    code: int
    collectives: list[Collective]
    cycles: float = 0.0
    kernel_cycles: dict[str, float] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()
    kernels: int = 0
    moved: float = 0.0
    text: str = field(default="", repr=False)

    @property
    def memory(self) -> int:
        return self.arguments + self.temporaries + self.outputs + self.code

    @property
    def all_cycles(self) -> float:
        return self.cycles + sum(self.kernel_cycles.values())


def cost_of(compiled: Any, platform: str, flops_a_cycle: float) -> TargetCost:
    """Reads a compiled program of `platform` (tpu, gpu); `flops_a_cycle` is a TPU's peak, 0 if it is not known."""
    text = compiled.as_text()
    module = Module(text)
    memory = compiled.memory_analysis()
    estimate = _tpu(module, flops_a_cycle) if platform == "tpu" else _gpu(module)
    return TargetCost(
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        collectives=collectives(module),
        text=text,
        **estimate,
    )


# ---- TPU -----------------------------------------------------------------------------------------


def _tpu(module: Module, flops_a_cycle: float) -> dict[str, Any]:
    unknown = {f"loop {loop.name}" for loop in module.loops() if module.trips(loop) is None}

    def kernel(made: Instruction) -> str:
        return made.name.rstrip(".0123456789") if 'custom_call_target="tpu_custom_call"' in made.attributes else ""

    def kernel_cycles(name: str, made: Instruction) -> float:
        shapes = [_dims(module.shape_of(made, operand)) for operand in made.operands] + [_dims(made.shape)]
        if name.startswith("splash"):
            kind = next(kind for kind in _SPLASH_BUNDLES if f"_{kind}" in name)
            return _splash("fused" if kind == "dkv" and fused else kind, shapes)
        if name.startswith("ragged-dot") and flops_a_cycle:
            return _ragged_dot(shapes, flops_a_cycle)
        unknown.add(f"kernel {name}")
        return 0.0

    def cycles_if(name: str, made: Instruction) -> float:
        return kernel_cycles(name, made) if kernel(made) == name else 0.0

    names = {kernel(made) for home in module.computations.values() for made in home.values()} - {""}
    fused = not any("_dq" in name for name in names)
    kernels = {name: module.total(partial(cycles_if, name)) for name in names if "metadata" not in name}
    cycles = module.total(lambda made: int(found[1]) if (found := _CYCLES.search(made.attributes)) else 0)
    return {"cycles": cycles, "kernel_cycles": kernels, "unknown": tuple(sorted(unknown))}


def _dims(shape: str) -> tuple[int, ...]:
    """Those of the first array of a shape's text that is in bfloat16."""
    found = re.search(r"\bbf16\[([\d,]+)\]", shape)
    return tuple(map(int, found[1].split(","))) if found else ()


def _splash(kind: str, shapes: list[tuple[int, ...]]) -> float:
    """Of causal attention: `kind` is a key of _SPLASH_BUNDLES, the largest of the arrays is (..., T, K)."""
    *outer, T, _ = max((dims for dims in shapes if len(dims) >= 3), key=lambda dims: math.prod(dims[:-2]))
    block = T if kind == "fused" else next(size for size in (_SPLASH_BLOCK, 256, 128) if T % size == 0)
    blocks = T // block
    return math.prod(outer) * blocks * (blocks + 1) / 2 * _SPLASH_BUNDLES[kind] * (block / _SPLASH_BLOCK) ** 2


def _ragged_dot(shapes: list[tuple[int, ...]], flops_a_cycle: float) -> float:
    """At the peak: rows x inputs x outputs."""
    matrices = [dims for dims in shapes if len(dims) >= 2]
    rows = max(matrices, key=lambda dims: dims[-2])[-2] if matrices else 0
    widths = sorted({dim for dims in matrices for dim in dims if dim != rows}, reverse=True)[:2]
    return 2 * rows * math.prod(widths) / flops_a_cycle


# ---- GPU -----------------------------------------------------------------------------------------


def _gpu(module: Module) -> dict[str, Any]:
    def is_kernel(made: Instruction) -> bool:
        return made.opcode not in _FREE and not made.opcode.endswith("-done")

    return {
        "kernels": round(module.total(lambda made: float(is_kernel(made)))),
        "moved": module.total(lambda made: float(_moved(module, made)) if is_kernel(made) else 0.0),
    }


def _moved(module: Module, made: Instruction) -> int:
    """Bytes of operands and results. What a fusion slices or updates in place counts as the part."""
    sizes = [sum(array_bytes(module.shape_of(made, operand))) for operand in made.operands]
    written = sum(array_bytes(made.shape))
    if made.opcode != "fusion":
        return sum(sizes) + written
    inside = module.computations[made.called("calls")]
    for part in inside.values():
        if part.opcode == "parameter":
            users = [user for user in inside.values() if part.name in user.operands]
            sliced = [user for user in users if user.opcode == "dynamic-slice" and user.operands[0] == part.name]
            updated = [
                user for user in users if user.opcode == "dynamic-update-slice" and user.operands[0] == part.name
            ]
            if users and len(sliced) + len(updated) == len(users):
                sizes[int(part.inside)] = sum(sum(array_bytes(user.shape)) for user in sliced)
                whole = sum(array_bytes(part.shape))
                for user in updated:
                    written -= whole - sum(array_bytes(inside[user.operands[1]].shape))
    return sum(sizes) + written
