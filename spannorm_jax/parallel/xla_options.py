"""Options of XLA's compilers by platform: those worth more than the compilers' own choice for every program here."""

import jax
from jax.sharding import AbstractMesh, Mesh

# docs/speed.md has what each changes in the compilers' plans.
XLA_OPTIONS: dict[str, dict[str, str]] = {
    "tpu": {
        # Off: a product over a gathered weight would be made of as many small ones as there are devices.
        "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
        # Gathers of the next block's weights run while the last one's are used.
        "xla_enable_async_all_gather": "true",
        "xla_tpu_enable_async_collective_fusion": "true",
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
        "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
        "xla_tpu_overlap_compute_collective_tc": "true",
    },
}


def xla_options(mesh: Mesh | AbstractMesh) -> dict[str, str]:
    """Those of a mesh's platform, for `jax.jit`'s compiler_options."""
    device = (mesh.abstract_mesh if isinstance(mesh, Mesh) else mesh).abstract_device
    return XLA_OPTIONS.get(device.platform if device else jax.default_backend(), {})
