"""What a train step takes on devices that are not here: FLOPs, memory and collectives, allocating nothing.

The step is compiled for as many fake CPU devices. What depends on the shapes and the mesh alone is exact; what
depends on the device's own compiler is said to be an estimate.
"""

import math
import re
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from spannorm_jax.config import Config, replace
from spannorm_jax.config_file import resolve_without_data
from spannorm_jax.errors import UserError
from spannorm_jax.model.definition import ModelDef, count_params, flops_per_token
from spannorm_jax.model.kernels import attention
from spannorm_jax.model.moe import grouped_matmul
from spannorm_jax.model.stack import remat_for
from spannorm_jax.parallel.devices import DEVICE_KINDS, known_kind
from spannorm_jax.parallel.mesh import batch_shards, check_divisible, make_mesh, mesh_shape
from spannorm_jax.parallel.platform import fix_numerics
from spannorm_jax.plan.collectives import KINDS, Collective, collectives
from spannorm_jax.plan.hlo import Module
from spannorm_jax.plan.words import flop_words, setting, size_words
from spannorm_jax.training.numbers import numbers_of
from spannorm_jax.training.step import make_program
from spannorm_jax.training.task import Batch
from spannorm_jax.training.tasks import task_of


@dataclass(frozen=True)
class StepCost:
    """What one step takes. Memory is in bytes of one device.

    Attributes:
      counted: what the step has so many `tokens` of: tokens, or images, which `flops_per_token` is then of.
      state: `parameters` and `optimizer`, as they lie between steps.
      gradients: in float32; twice, with microbatches.
      activations: what the backward pass keeps of the forward pass that grows with the batch, for one microbatch, as if
        mesh.tensor were 1.
      xla: `arguments`, `outputs` (those that do not replace an argument) and `temporaries` of XLA's plan for a CPU.
    """

    params: int
    active_params: int
    flops_per_token: int
    tokens: int
    counted: str
    state: dict[str, int]
    gradients: int
    activations: int
    xla: dict[str, int]
    collectives: list[Collective]
    compile_s: float


def dry_run(config: Config, num_devices: int, device_kind: str = "") -> int:
    """Prints what a step of `config` takes on `num_devices`; `device_kind` adds shares of its memory and peak.

    Raises:
      UserError: the mesh does not fit the devices or the model.
    """
    config = resolve_without_data(config, platform="cpu" if config.platform == "cpu" else "accelerator")
    shape = mesh_shape(config.mesh, num_devices)
    microbatch = config.training.batch_size // config.training.num_microbatches
    check_divisible(config, shape, "training.batch_size / num_microbatches", microbatch)
    _start_jax(num_devices)
    # Unless the kind says otherwise the plan is of a device that makes activations again.
    platform = "gpu" if device_kind.startswith("NVIDIA") else "tpu" if config.model.dtype == "bfloat16" else "cpu"
    config = replace(config, execution__remat=remat_for(config.execution.remat, platform))
    implementations = _implementations(config)
    mesh = make_mesh(config.mesh, jax.devices()[:num_devices])
    print(setting(config, platform))
    print(f"{mesh.size} x {device_kind or 'any device'}, mesh {dict(mesh.shape)}")
    stands_for = " (compiled as float16, of the same size)" if config.model.dtype == "bfloat16" else ""
    print(f"shaped with {implementations}, compute {config.model.dtype}{stands_for}", flush=True)
    print(report(measure(config, mesh), shape, known_kind(device_kind)))
    return 0


def _start_jax(num_devices: int) -> None:
    """Fake devices, in a process that has used none yet; or enough of those that it has."""
    fix_numerics()
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_disable_most_optimizations", True)  # of machine code, which nobody runs
        jax.config.update("jax_num_cpu_devices", num_devices)
    except RuntimeError:  # JAX has started
        pass
    if jax.device_count() < num_devices:
        raise UserError(f"this process has {jax.device_count()} devices already; start another for {num_devices}")


def measure(config: Config, mesh: Mesh) -> StepCost:
    """Compiles the step of a resolved config; `mesh` is of CPU devices, which are not used."""
    task = task_of(config)
    model, positions, batch_size = task.define(config), task.positions(config), config.training.batch_size
    (counted, of_row), began = task.counted(config), time.monotonic()
    with jax.set_mesh(mesh):
        compiled_as = config
        if config.model.dtype == "bfloat16":
            # A CPU computes and sends float32 in place of bfloat16, but float16, of the same size, as it is.
            compiled_as = replace(config, model__dtype="float16")
        program = make_program(compiled_as, task.define(compiled_as), mesh)
        args = program.abstract_state, program.abstract_batch, numbers_of(config)
        compiled: Any = program.train.lower(*args).compile()
        activations = _activations(config, model, mesh)
    memory = compiled.memory_analysis()
    state = program.abstract_state
    return StepCost(
        params=count_params(model),
        active_params=count_params(model, active=True),
        flops_per_token=flops_per_token(model, positions) * positions // of_row,
        tokens=batch_size * of_row,
        counted=counted,
        state={"parameters": _bytes_here(state.params), "optimizer": _bytes_here(state.opt_state)},
        gradients=_bytes_here(state.params) * min(config.training.num_microbatches, 2),
        activations=activations,
        xla={
            "arguments": memory.argument_size_in_bytes,
            "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
        },
        collectives=collectives(Module(compiled.as_text())),
        compile_s=time.monotonic() - began,
    )


def _bytes_here(tree: Any) -> int:
    """Bytes of one device's shards of abstract arrays."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _activations(config: Config, model: ModelDef, mesh: Mesh) -> int:
    """`StepCost.activations`, from the shapes of what `jax.vjp` keeps; under the mesh."""
    rows = config.training.batch_size // config.training.num_microbatches
    task = task_of(config)
    loss_sums = task.loss_sums(config, dict(mesh.shape), rows)
    params = model.map_weights(lambda spec: jax.ShapeDtypeStruct(spec.shape, jnp.float32))

    def kept(rows: int) -> int:
        def residuals(params: Any, model_state: Any, batch: Batch) -> Any:
            return jax.vjp(lambda p: loss_sums(model.bind(p, model_state), batch)["objective"], params)[1]

        fields = task.train_fields(config).items()
        batch = {name: jax.ShapeDtypeStruct((rows, *field.shape[1:]), field.dtype) for name, field in fields}
        shapes = jax.eval_shape(residuals, params, model.model_state, batch)
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))

    # Weights are among the residuals, whatever the batch: the difference leaves them out.
    return (kept(2 * rows) - kept(rows)) // batch_shards(dict(mesh.shape))


# ---- words ---------------------------------------------------------------------------------------


def _implementations(config: Config) -> str:
    """Those that a CPU runs. Raises UserError if it cannot run what the config names."""
    words = f"attention {attention.attention_for(config.execution, config.model, task_of(config).positions(config))[0]}"
    if not config.model.moe.num_experts:
        return words
    return f"{words}, grouped matmul {grouped_matmul.grouped_matmul_for(config.execution.grouped_matmul)[0]}"


def report(cost: StepCost, shape: dict[str, int], kind: str | None) -> str:
    """The printed form, with shares of a device's memory and peak if `kind`, a key of DEVICE_KINDS, is given."""
    num_devices = math.prod(shape.values())
    memory = _memory(cost, shape["tensor"], kind)
    return "\n".join([*_flops(cost, num_devices, kind), "", *memory, "", *_traffic(cost)])


def _flops(cost: StepCost, num_devices: int, kind: str | None) -> list[str]:
    step, each = cost.flops_per_token * cost.tokens, "a token" if cost.counted == "tokens" else "an image"
    active = f"{cost.active_params:,} active" if cost.active_params != cost.params else "all active"
    fastest = f", {step / num_devices / DEVICE_KINDS[kind].peak_flops:.3g} s at the peak of {kind}" if kind else ""
    return [
        f"{cost.params:,} parameters ({active}), {cost.tokens:,} {cost.counted} a step; "
        f"compiled in {cost.compile_s:.1f} s",
        f"{flop_words(cost.flops_per_token)} {each}, {flop_words(step)} a step, "
        f"{flop_words(step / num_devices)} a device{fastest}",
    ]


def _memory(cost: StepCost, tensor: int, kind: str | None) -> list[str]:
    rows = [
        ("parameters", cost.state["parameters"], "float32"),
        ("optimiser", cost.state["optimizer"], "moments, float32"),
        ("gradients", cost.gradients, "float32"),
        ("kept for backward", cost.activations, "what it keeps that grows with the batch"),
    ]
    total = "about the least; what lives for a moment comes on top"
    if tensor > 1:
        total = "but mesh.tensor splits some of what is kept, which is counted whole"
    rows.append(("sum", sum(size for _, size, _ in rows), total))
    plan = (
        f"for a CPU: arguments {size_words(cost.xla['arguments'])}, temporaries {size_words(cost.xla['temporaries'])}"
    )
    rows.append(("XLA's plan", sum(cost.xla.values()), plan))
    whole = f", and its share of {DEVICE_KINDS[kind].memory_gb} GB" if kind else ""
    lines = [f"memory of a device{whole} (GB: 10^9 bytes)"]
    for name, size, note in rows:
        share = f"{size / DEVICE_KINDS[kind].memory_gb / 1e7:.1f}%" if kind else ""
        lines.append(f"  {name:<20}{size_words(size):>10}{share:>8}   {note}")
    return lines


def _traffic(cost: StepCost) -> list[str]:
    lines = [f"{'collectives of a step, received by a device':<46}{'arrays':>8}{'bytes':>12}"]
    for branch in sorted({found.branch for found in cost.collectives}):
        if branch:
            lines.append(f" of a condition, if it takes branch {'.'.join(map(str, branch))}")
        lines += _rows([found for found in cost.collectives if found.branch == branch])
    if not cost.collectives:
        return [*lines, "  none"]
    places: Counter[tuple[str, str]] = Counter()
    always = [found for found in cost.collectives if not found.branch]
    for one in always:
        places[one.kind.replace("_", "-"), _place(one.name)] += one.received
    all_sizes = size_words(sum(places.values()))
    lines.append(f"{'what is always there, together':<46}{sum(one.count for one in always):>8,}{all_sizes:>12}")
    lines.append("the largest of that")
    for (title, place), size in places.most_common(5):
        lines.append(f"  {title:<20}{size_words(size):>10}   {place}")
    return [
        *lines,
        "As XLA partitions the step for any device, and then optimises it for a CPU. Other compilers may combine, move",
        "or overlap collectives, and make reduce-scatters of all-reduces that are then sliced: counted as such here.",
    ]


def _place(name: str) -> str:
    """Which pass, and JAX's scopes without what its transformations add; the first, of several that XLA combined."""
    way = "backward" if "transpose(" in name else "forward"
    way = "remat" if "rematted_computation" in name else way
    bare = re.sub(
        r"\b(jit|transpose|jvp)\(|\b(train_step|while|body|closed_call|checkpoint|rematted_computation)\b", "", name
    )
    first, several, _ = "/".join(part for part in re.split(r"[/()]+", bare) if part).partition(":")
    return f"{way} {first}{' and others' if several else ''}"


def _rows(found: list[Collective]) -> list[str]:
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for one in sorted(found, key=lambda one: (KINDS.index(one.kind), one.sliced, one.group)):
        title = f"{one.kind.replace('_', '-')}{', then sliced' if one.sliced else ''}, among {one.group}"
        counts[title] += one.count
        sizes[title] += one.received
    return [f"  {title:<44}{counts[title]:>8,}{size_words(size):>12}" for title, size in sizes.items()]
