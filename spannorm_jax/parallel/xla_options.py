"""Options of XLA's compilers by platform, for the train step, the signal and evaluation."""

import jax
from jax.sharding import AbstractMesh, Mesh

XLA_OPTIONS: dict[str, dict[str, str]] = {
    # No collective matmul: a product over a gathered weight would be made of as many small ones as there are devices.
    "tpu": {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"},
}


def xla_options(mesh: Mesh | AbstractMesh) -> dict[str, str]:
    """Those of a mesh's platform, for `jax.jit`'s compiler_options."""
    device = (mesh.abstract_mesh if isinstance(mesh, Mesh) else mesh).abstract_device
    return XLA_OPTIONS.get(device.platform if device else jax.default_backend(), {})
