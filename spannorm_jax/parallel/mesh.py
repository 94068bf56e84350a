"""The device mesh, and the one table that maps logical axes of weights and activations to mesh axes."""

import dataclasses
import math

import jax
import numpy as np
from jax import Array
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from spannorm_jax.config import Config, MeshConfig, divisors
from spannorm_jax.errors import UserError

LANE = "lane"  # runs side by side in one program; of size 1 for a run alone

# logical axis -> mesh axes that shard it. A batch is split over every device that does not share its work.
LOGICAL_AXES: dict[str, tuple[str, ...]] = {
    "lanes": (LANE,),
    "batch": ("data", "fsdp", "expert"),
    "time": (),
    "activation": (),  # the width of activations; weights have "embed"
    "layers": (),
    "vocab": ("tensor",),
    "embed": ("fsdp",),
    "gain": (),  # as long as `embed`: gathering it would cost more than it saves
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "parts": (),
    "scalar": (),
    "ffn": ("tensor",),
    "experts": ("expert",),
    "choices": (),  # the router's scores and biases of all experts, on every device
}


def partition_spec(axes: tuple[str, ...]) -> PartitionSpec:
    """The spec of an array with these logical axes.

    Raises:
      KeyError: an axis is not in LOGICAL_AXES.
      ValueError: two logical axes want the same mesh axis.
    """
    spec = [LOGICAL_AXES[axis] for axis in axes]
    used = [m for mesh_axes in spec for m in mesh_axes]
    if len(used) != len(set(used)):
        raise ValueError(f"logical axes {axes} use a mesh axis twice: {used}")
    return PartitionSpec(*(m or None for m in spec))


def mesh_shape(config: MeshConfig, num_devices: int) -> dict[str, int]:
    """Axis sizes with -1 filled in.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    sizes = dataclasses.asdict(config)
    known = math.prod(size for size in sizes.values() if size != -1)
    free = [axis for axis, size in sizes.items() if size == -1]
    if free and num_devices % known == 0:
        sizes[free[0]] = num_devices // known
    if math.prod(sizes.values()) != num_devices:
        asked = ", ".join(f"mesh.{axis}={size}" for axis, size in dataclasses.asdict(config).items())
        raise UserError(
            f"{asked} does not multiply to the {num_devices} devices here; "
            "write -1 for one axis to give it the devices that are left"
        )
    return sizes


def lane_shards(config: MeshConfig, num_devices: int, lanes: int) -> int:
    """Groups of devices that so many runs of one program are spread over, each a mesh of `config`.

    Lanes have nothing to tell one another, and replicas of one run have: lanes take the devices that `data=-1` leaves
    open, as far as these come out even. A mesh that names its replicas has all lanes on all devices.
    """
    sizes = dataclasses.asdict(config)
    if sizes.pop("data") != -1 or num_devices % math.prod(sizes.values()):
        return 1
    return max(n for n in divisors(num_devices // math.prod(sizes.values())) if n <= lanes)


def make_mesh(config: MeshConfig, devices: list | None = None, lanes: int = 1) -> Mesh:
    """Builds the mesh over `devices` (default: all), for so many runs of one program.

    Raises:
      UserError: the config does not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    shards = lane_shards(config, len(devices), lanes)
    shape = {LANE: shards} | mesh_shape(config, len(devices) // shards)
    # Auto: the compiler propagates shardings from the weights.
    return Mesh(arrange(shape, devices), tuple(shape), axis_types=(AxisType.Auto,) * len(shape))


def arrange(shape: dict[str, int], devices: list) -> np.ndarray:
    """The devices by mesh position. Where the network between groups of them is slow (between TPU slices, or hosts of
    GPUs), the outer axes go across it: lanes first, `tensor` last. `jax.make_mesh` refuses several slices or hosts.
    """
    sizes = tuple(shape.values())
    if devices[0].platform != "tpu":
        return np.array(sorted(devices, key=lambda d: d.id)).reshape(sizes)  # host by host
    left = len({getattr(d, "slice_index", 0) for d in devices})  # a device of a topology of one slice has no index
    if left == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    across = []
    for size in sizes:
        across.append(math.gcd(size, left))
        left //= across[-1]
    within = tuple(size // n for size, n in zip(sizes, across, strict=True))
    return mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)


def target_platform() -> str:
    """cpu, gpu or tpu: what the program is compiled for. A mesh of `jax.set_mesh` says it, since its devices may be
    those of a topology, or fewer than all; without one it is JAX's own choice."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def sharding(mesh: Mesh, axes: tuple[str, ...]) -> NamedSharding:
    return NamedSharding(mesh, partition_spec(axes))


def constrain(x: Array, axes: tuple[str, ...]) -> Array:
    """Pins an activation's sharding under `jax.set_mesh`; without a mesh it is `x` itself."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes))


def batch_shards(shape: dict[str, int]) -> int:
    """Devices that a batch's rows are split over."""
    return math.prod(shape[axis] for axis in LOGICAL_AXES["batch"])


def check_divisible(config: Config, shape: dict[str, int], rows_key: str, rows: int) -> None:
    """Checks that the mesh divides what it shards; `config` is resolved: no zeros left.

    Raises:
      UserError: it does not divide the weights, or the `rows` of a batch that `rows_key` sets.
    """
    model = config.model
    wants = [
        (rows_key, rows, " x ".join(f"mesh.{axis}" for axis in LOGICAL_AXES["batch"]), batch_shards(shape)),
        ("model.width", model.width, "mesh.fsdp", shape["fsdp"]),
        ("model.num_heads", model.num_heads, "mesh.tensor", shape["tensor"]),
        ("model.num_kv_heads", model.num_kv_heads, "mesh.tensor", shape["tensor"]),
        ("model.ffn_dim", model.ffn_dim, "mesh.tensor", shape["tensor"]),
        ("model.moe.num_experts", model.moe.num_experts, "mesh.expert", shape["expert"]),
        ("model.moe.expert_dim", model.moe.expert_dim, "mesh.tensor", shape["tensor"]),
        ("model.vocab_size", model.vocab_size, "mesh.tensor", shape["tensor"]),
    ]
    if shape["expert"] > 1 and not model.moe.num_experts:
        raise UserError(f"mesh.expert={shape['expert']} has no experts to shard (model.moe.num_experts=0); write 1")
    for key, value, axes, size in wants:
        if value % size:
            raise UserError(f"{key}={value} is not divisible by {axes}={size}; change one of them")
