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


DEVICE_KINDS = {
    "NVIDIA A100": DeviceKind(312e12, 40),
    "NVIDIA H100": DeviceKind(989e12, 80),
    "NVIDIA H200": DeviceKind(989e12, 141),
    "TPU v4": DeviceKind(275e12, 32),
    "TPU v5 lite": DeviceKind(197e12, 16),
    "TPU v5": DeviceKind(459e12, 95),
    "TPU v6 lite": DeviceKind(918e12, 32),
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
