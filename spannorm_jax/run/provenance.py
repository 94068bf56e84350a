"""Where a run comes from: command, commit, versions, devices, and whether all processes run the same."""

import datetime
import hashlib
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax

from spannorm_jax.config import Config, flatten
from spannorm_jax.parallel import distributed
from spannorm_jax.parallel.platform import cpu_name, numerics_record

_RECORDED_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def check_agreement(config: Config) -> None:
    """Raises UserError if the processes run other code or another config; where their data lie may differ."""
    here = {key: value for key, value in flatten(config).items() if key not in ("data.data_dir", "data.cache_dir")}
    distributed.check_same({"code": code_hash(), "jax": jax.__version__} | here)


def code_hash() -> str:
    """12 hex digits that change with any line of this package."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def start_record(module: str, argv: list[str], data: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """What it takes to repeat what `python -m module argv` does, besides its config; what is said of its data; `facts`.

    It is a line of a run's starts.jsonl, and the head of a benchmark's record.
    """
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", "-m", module, *argv]),
        **machine_facts(),
        "numerics": numerics_record(),
        "data": data,
        **facts,
    }


def machine_facts() -> dict[str, Any]:
    """Commit, versions and devices: what a record must say to be repeated elsewhere."""
    return {
        "git_commit": _git_commit(),
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in _RECORDED_PACKAGES},
        },
        "device": jax.devices()[0].device_kind + cpu_name(),
        "num_devices": jax.device_count(),
        "num_processes": jax.process_count(),
    }


def _git_commit() -> str | None:
    """The commit of the code that runs, with -dirty if it was changed since; None outside a checkout."""
    here = Path(__file__).parent
    try:
        out = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return out.stdout.strip() if out.returncode == 0 else None
