"""Devices that are not here, of a topology that their own compiler knows: v5e:4x4, h100:1x1x8.

libtpu compiles for TPUs and JAX's CUDA plugin for NVIDIA's GPUs on a machine that has neither. Nothing runs on such
devices, and nothing can be put on them.
"""

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import jax

from spannorm_jax.errors import UserError, did_you_mean, one_line


@dataclass(frozen=True)
class _Gpu:
    """What XLA asks of a GPU that it compiles for, as the vendor's data sheet has it."""

    name: str
    capability: int  # compute capability, its first number
    cores: int  # streaming multiprocessors
    clock_ghz: float
    memory_bytes: int
    bandwidth: int  # bytes/s
    l2_bytes: int


_TPUS = ("v4", "v5e", "v5p", "v6e", "tpu7x")
_GPUS = {
    "h100": _Gpu("NVIDIA H100 80GB HBM3", 9, 132, 1.98, 84_942_979_072, 3_352_320_000_000, 52_428_800),
    "h200": _Gpu("NVIDIA H200", 9, 132, 1.98, 151_397_597_184, 4_800_000_000_000, 52_428_800),
    "b200": _Gpu("NVIDIA B200", 10, 148, 1.965, 191_514_411_008, 7_672_320_000_000, 132_644_864),
}
EXAMPLES = "v5e:4x4, v5p:2x2x4 or h100:1x1x8"
# The names that clouds give to slices; v4 and v5p count cores, two a chip.
_FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CUBES = {8: "2x2x1", 16: "2x2x2", 32: "2x2x4", 64: "2x4x4", 128: "4x4x4", 256: "4x4x8", 512: "4x8x8", 1024: "8x8x8"}


def known_name(name: str) -> str:
    """CHIP:SHAPE of a topology's name, which may be a cloud's: v5e-16 is v5e:4x4.

    Raises:
      UserError: there is no such chip, or no shape.
    """
    chip, colon, shape = name.partition(":")
    if not colon and "-" in name:
        chip, _, number = name.partition("-")
        chip = "v5e" if chip == "v5litepod" else chip
        shapes = _CUBES if chip in ("v4", "v5p") else _FLAT
        shape = shapes.get(int(number) if number.isdecimal() else 0, "")
        if chip in ("v4", "v5p", "v5e", "v6e") and not shape:
            raise UserError(
                f"--topology {name[:80]!r} is no slice of {chip}; write one of {chip}-{', '.join(map(str, shapes))}"
            )
    if chip not in (*_TPUS, *_GPUS):
        raise UserError(
            f"--topology {name[:80]!r}: chip {did_you_mean(chip, (*_TPUS, *_GPUS))}; write for example {EXAMPLES}"
        )
    if not shape or not all(part.isdecimal() and 0 < int(part[:6]) <= 9999 for part in shape.split("x")):
        raise UserError(f"--topology {name[:80]!r} has no shape; write for example {EXAMPLES}")
    return f"{chip}:{shape}"


def topology_devices(name: str, slices: int = 1) -> list[Any]:
    """The devices of `known_name`'s topology; of GPUs the shape is slices x hosts x GPUs of a host.

    Raises:
      UserError: the compiler is not installed, or does not know the shape.
    """
    chip, _, shape = name.partition(":")
    gpu = chip in _GPUS
    plugin, extra = ("jax_plugins", "gpu") if gpu else ("libtpu", "tpu-plan")
    if importlib.util.find_spec(plugin) is None:
        raise UserError(f"--topology {name}: {chip}'s compiler is not installed; pip install -e '.[{extra}]', on Linux")
    options: dict[str, Any]
    if gpu:
        options = {"target_config": _target_config(_GPUS[chip]), "topology": shape}
    else:
        _quiet_libtpu()
        options = {"num_slices": slices}
        if chip == "v4":
            options["chip_config_name"] = "megacore"  # two cores are one device, as JAX has them on the real chip
        if shape == "1x1":
            options["chips_per_host_bounds"] = (1, 1, 1)
    with contextlib.suppress(RuntimeError):  # JAX has started
        jax.config.update("jax_platforms", "cpu")
    # Late: it is no part of what JAX imports by itself.
    from jax.experimental import topologies

    platform, topology_name = ("cuda", chip) if gpu else ("tpu", name)
    try:
        return list(topologies.get_topology_desc(topology_name, platform, **options).devices)
    except Exception as error:  # the compiler's own refusal names the shape
        raise UserError(
            f"--topology {name} is unknown to its compiler ({one_line(error)[:200]}); try {EXAMPLES}"
        ) from error


def _quiet_libtpu() -> None:
    """Without these libtpu asks a cloud's metadata server, which takes minutes, and lets one process at a time in."""
    for key, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_MIN_LOG_LEVEL": "3",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }.items():
        os.environ.setdefault(key, value)


def _target_config(gpu: _Gpu) -> str:
    """XLA's GpuTargetConfigProto as text; what it lacks beside the data sheet is the same for all of these."""
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  core_count: {gpu.cores}
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {gpu.bandwidth}
  l2_cache_size: {gpu.l2_bytes}
  clock_rate_ghz: {gpu.clock_ghz}
  device_memory_size: {gpu.memory_bytes}
  cuda_compute_capability {{ major: {gpu.capability} feature_extension: ACCELERATED_FEATURES }}
  name: "{gpu.name}"
  device_vendor: "NVIDIA Corporation"
  device_address_bits: 64
  driver_version: "13.0.0"
  runtime_version: "12.8.0"
  compile_time_toolkit_version: "12.8.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{gpu.name}"
"""


@contextlib.contextmanager
def compiling_for(devices: list[Any]) -> Iterator[None]:
    """JAX asks for cuDNN's version and the GPU's, tokamax for its device: a topology answers."""
    if devices[0].platform != "gpu":
        yield
        return
    from jax._src.cudnn import fused_attention_stablehlo as fused
    from jax.extend import backend

    with (
        patch.object(backend, "get_default_device", lambda: devices[0]),
        patch.object(fused, "check_cudnn_version", lambda: 91000),
        patch.object(fused, "check_compute_capability", lambda _: True),
        patch.object(fused, "is_cuda_compute_capability_equal", lambda _: False),
    ):
        yield
