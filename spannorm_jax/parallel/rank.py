"""Finds this process's rank and the number of processes, without JAX.

The flags --coordinator, --num_processes and --process_id say both; else the environment does:
JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID (or JOB_COMPLETION_INDEX, which Kubernetes
sets in an Indexed Job); else by Slurm's; else on a TPU pod, where JAX asks the machine. With none of
these a process is alone.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from spannorm_jax.errors import UserError


@dataclass(frozen=True)
class Rank:
    """Which of how many processes this one is, and where process 0 listens.

    `local_devices` are the accelerators that it takes of its host's; None: all that it sees.
    """

    coordinator: str
    num_processes: int
    process_id: int
    local_devices: tuple[int, ...] | None = None


@dataclass(frozen=True)
class ProcessFlags:
    """What the command line says of it: all of the first three or none. Times are in seconds."""

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    start_timeout_s: int = 300
    heartbeat_s: int = 100


def find_rank(flags: ProcessFlags, env: Mapping[str, str]) -> Rank | None:
    """This process's rank, from the flags or the environment; None if it is alone or only JAX can tell.

    Raises:
      UserError: the address is not HOST:PORT, or a number is missing or out of range.
    """
    if flags.coordinator is not None:
        return _checked("--coordinator", flags.coordinator, str(flags.num_processes), str(flags.process_id))
    if "JAX_COORDINATOR_ADDRESS" in env:
        process_id = env.get("JAX_PROCESS_ID", env.get("JOB_COMPLETION_INDEX", ""))
        address = env["JAX_COORDINATOR_ADDRESS"]
        return _checked("JAX_COORDINATOR_ADDRESS", address, env.get("JAX_NUM_PROCESSES", ""), process_id)
    return _slurm(env)


def _checked(name: str, address: str, num_processes: str, process_id: str) -> Rank | None:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f"{name}={address!r} is not HOST:PORT; write for example node1:12345")
    if not (num_processes.isdecimal() and process_id.isdecimal() and int(process_id) < int(num_processes)):
        raise UserError(
            f"process {process_id or 'without a number'} of {num_processes or 'an unknown number'} with "
            f"{name}={address}: write the number of processes, and for each one of 0 to that number - 1 "
            "(--num_processes and --process_id, or JAX_NUM_PROCESSES and JAX_PROCESS_ID)"
        )
    return Rank(address, int(num_processes), int(process_id)) if int(num_processes) > 1 else None


def _slurm(env: Mapping[str, str]) -> Rank | None:
    """Of a task that srun started. A shell within an allocation is no such task: it has no SLURM_STEP_NODELIST."""
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID")
    if any(name not in env for name in names) or int(env["SLURM_STEP_NUM_TASKS"]) < 2:
        return None
    job, step, nodes, num_tasks, process_id = (env[name] for name in names)
    # The first of node001,other or node[001-004,007],other; one port for each job and step.
    found = re.match(r"[^,\[]+(\[[^,\-\]]+)?", nodes)
    if found is None:
        raise UserError(f"SLURM_STEP_NODELIST={nodes!r} begins with no host; give --coordinator and its companions")
    first = found[0].replace("[", "")
    port = 61440 + (int(job) + 97 * int(step)) % 4096
    # Several tasks on a host take an accelerator each, unless Slurm already shows each its own alone.
    several = int(num_tasks) > int(env.get("SLURM_STEP_NUM_NODES", num_tasks))
    own = len(env.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")) == 1
    local = (int(env.get("SLURM_LOCALID", "0")),) if several and not own else None
    return Rank(f"{first}:{port}", int(num_tasks), int(process_id), local)
