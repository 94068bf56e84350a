"""Peak rates and memory of accelerators, from the vendors' data sheets."""

import re
import resource
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a command that is mistyped asks for the kinds here, and does without JAX
    import jax


@dataclass(frozen=True)
class DeviceKind:
    peak_flops: float  # dense bfloat16 FLOP/s
    memory_gb: float  # GB (10^9 bytes); of two sizes the smaller
    clock_ghz: float = 0.0  # of a TPU; 0: not published
    bandwidth: float = 0.0  # bytes/s of a GPU's memory


DEVICE_KINDS = {
    "NVIDIA A100": DeviceKind(312e12, 40, bandwidth=1.55e12),
    "NVIDIA H100": DeviceKind(989e12, 80, bandwidth=3.35e12),
    "NVIDIA H200": DeviceKind(989e12, 141, bandwidth=4.8e12),
    "NVIDIA B200": DeviceKind(2250e12, 180, bandwidth=7.7e12),
    "TPU v4": DeviceKind(275e12, 32, clock_ghz=1.05),
    "TPU v5 lite": DeviceKind(197e12, 16, clock_ghz=1.5),
    "TPU v5": DeviceKind(459e12, 95, clock_ghz=1.75),
    "TPU v6 lite": DeviceKind(918e12, 32, clock_ghz=1.75),
    "TPU7x": DeviceKind(1153.5e12, 96),  # of a device: two are a chip
}


def known_kind(device_kind: str) -> str | None:
    """The key in DEVICE_KINDS of JAX's `device_kind`, which may say more: NVIDIA H100 80GB HBM3, TPU v5p."""
    fits = (name for name in DEVICE_KINDS if re.match(rf"{name}p?(?![A-Za-z0-9])", device_kind))
    return max(fits, key=len, default=None)


def peak_flops(device: "jax.Device", configured: float) -> float | None:
    """FLOP/s that MFU is a share of: the configured one, else the table's, else None (a CPU has no one peak)."""
    if configured:
        return configured
    kind = known_kind(device.device_kind)
    return DEVICE_KINDS[kind].peak_flops if kind else None


def memory_bytes(device: "jax.Device") -> int:
    """Peak bytes in use on the device; on the CPU, of the process."""
    stats = device.memory_stats()
    if stats:
        return stats["peak_bytes_in_use"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
