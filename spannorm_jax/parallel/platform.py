"""Chooses JAX's platform once, before anything asks JAX, and fixes the switches that could change numbers."""

import contextlib
import hashlib
import os
import platform
import re
from pathlib import Path
from typing import Any

import jax

from spannorm_jax.errors import UserError, one_line
from spannorm_jax.parallel import distributed
from spannorm_jax.parallel.memory import keep_freed_memory
from spannorm_jax.parallel.rank import ProcessFlags
from spannorm_jax.paths import cache_home

# JAX's options that change numbers, or stop a step over one; each has an environment variable of its name.
NUMERICS: dict[str, Any] = {
    "jax_enable_x64": False,
    "jax_default_matmul_precision": None,
    "jax_default_prng_impl": "threefry2x32",
    "jax_threefry_partitionable": True,
    "jax_threefry_gpu_kernel_lowering": False,
    "jax_random_seed_offset": 0,
    "jax_high_dynamic_range_gumbel": False,
    "jax_legacy_prng_key": "allow",
    "jax_numpy_dtype_promotion": "standard",
    "jax_numpy_rank_promotion": "allow",
    "jax_allow_f16_reductions": True,
    "jax_softmax_custom_jvp": False,
    "jax_optimization_level": "UNKNOWN",
    "jax_exec_time_optimization_effort": 0.0,
    "jax_disable_jit": False,
    "jax_debug_nans": False,
    "jax_debug_infs": False,
}
_BELOW_JAX = re.compile(r"(JAX|XLA|LIBTPU|CUBLAS|CUDNN)_|NVIDIA_TF32_OVERRIDE|TF_CUDNN_DETERMINISTIC")


def start_jax(name: str, flags: ProcessFlags | None = None) -> None:
    """Makes JAX run on `name` (cpu, gpu, tpu; auto: its own choice), with the other processes if there are `flags`.

    Call it before anything touches a device.

    Compiled programs are kept in $XDG_CACHE_HOME/spannorm_jax/xla, unless JAX_COMPILATION_CACHE_DIR names another
    folder, so that a second start takes a fraction of the first's time.

    Raises:
      UserError: the platform is absent here, or the other processes cannot be reached.
    """
    keep_freed_memory()
    fix_numerics()
    if not jax.config.values["jax_compilation_cache_dir"]:
        with contextlib.suppress(UserError):  # without a home there is no cache, and none is needed
            # One folder per kind of host: a home shared by unlike machines must not mix their CPU code.
            host = hashlib.sha256(cpu_features().encode()).hexdigest()[:8]
            folder = cache_home("") / "spannorm_jax" / "xla" / host
            jax.config.update("jax_compilation_cache_dir", str(folder))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    if name != "auto":
        jax.config.update("jax_platforms", {"gpu": "cuda"}.get(name, name))
    if flags:
        distributed.start(flags, name)
    try:
        backend = jax.default_backend()
    except (RuntimeError, AssertionError) as error:  # JAX asserts that there is a GPU
        why = one_line(error)[:120] or "JAX finds no such device"
        raise UserError(
            f"config key platform={name}: there is none here ({why}); install the extra for it, or write platform=auto"
        ) from error
    if name not in ("auto", {"cuda": "gpu", "rocm": "gpu"}.get(backend, backend)):
        # The platform is heard only before the first question to JAX: a fault of ours, never a run elsewhere.
        raise RuntimeError(f"platform={name} was asked for after JAX had started on {backend}")


def fix_numerics() -> None:
    """Sets what JAX's environment variables could change about numbers, so that a config alone decides them."""
    for name, value in NUMERICS.items():
        if name in jax.config.values:  # versions come and go
            jax.config.update(name, value)


def numerics_record() -> dict[str, Any]:
    """For starts.jsonl: what is fixed, and what the environment tells the compilers and libraries below JAX."""
    fixed = {name: value for name, value in NUMERICS.items() if name in jax.config.values}
    return {"fixed": fixed, "environment": {k: v for k, v in sorted(os.environ.items()) if _BELOW_JAX.match(k)}}


def _cpu_info(field: str) -> list[str]:
    """A field of /proc/cpuinfo, once a core; empty where there is no such file or field."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [line.partition(":")[2].strip() for line in lines if line.startswith(field)]


def cpu_name() -> str:
    """Name and number of the CPU's cores, in brackets after a space; "" on an accelerator."""
    names = _cpu_info("model name") if jax.default_backend() == "cpu" else []
    return f" ({names[0]}, {len(names)} cores)" if names else ""


def cpu_features() -> str:
    return platform.machine() + "".join(_cpu_info("flags")[:1])
