"""What a run needs once its config is matched to this machine."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from spannorm_jax.config import Config, replace
from spannorm_jax.model.definition import ModelDef
from spannorm_jax.model.kernels.attention import attention_for
from spannorm_jax.model.moe.grouped_matmul import grouped_matmul_for
from spannorm_jax.parallel import distributed
from spannorm_jax.parallel.mesh import check_divisible, make_mesh
from spannorm_jax.run.folder import data_opened_as
from spannorm_jax.training.flags import Flags
from spannorm_jax.training.numbers import Numbers, numbers_of, on_devices
from spannorm_jax.training.step import Program, make_program
from spannorm_jax.training.task import Rows, Task
from spannorm_jax.training.tasks import task_of


@dataclass(frozen=True)
class Session:
    """A run on this machine: `config` is resolved, and everything else is made from it."""

    config: Config
    workdir: Path
    flags: Flags
    task: Task
    data: Any  # as the task opens them
    rows: Callable[[int, int, int], Rows]  # (step, start, stop) -> those of its batch, on the host
    mesh: Mesh
    model: ModelDef
    program: Program
    numbers: Numbers  # what the program takes besides state and batch, on the devices
    kernels: str  # what runs here, as the start says it: "attention xla (why), grouped matmul padded"


def open_session(config: Config, workdir: Path, flags: Flags, lanes: int = 1) -> Session:
    """The run on this machine, with the data that the run in `workdir` goes on with, if there is one.

    Raises:
      UserError: the config does not fit the devices, the data or the folder; nothing is written then.
    """
    full_name = distributed.from_first(lambda: data_opened_as(workdir, config))
    config = replace(config, data__full_name=full_name)
    return distributed.run_on_all(lambda: match_machine(config, workdir, flags, lanes))


def match_machine(config: Config, workdir: Path, flags: Flags, lanes: int = 1) -> Session:
    """Resolves the config against this machine's data, kernels and devices; compiles no step.

    `lanes` is the number of runs that share its program, this one included.

    Token stores that are absent are built. Nothing is written into `workdir`.

    Raises:
      UserError: the data are not those asked for or leave nothing to predict, a kernel that is
        asked for by name cannot run here, or the devices do not divide the batch or the weights.
    """
    task = task_of(config)
    data, config = task.open(config)
    kernels = _kernels(config, task.positions(config))
    mesh = make_mesh(config.mesh, lanes=lanes)
    training = config.training
    microbatch = training.batch_size // training.num_microbatches
    check_divisible(config, dict(mesh.shape), "training.batch_size / num_microbatches", microbatch)
    task.check(config, data)
    if config.eval.every_steps:
        check_divisible(config, dict(mesh.shape), "eval.batch_size", config.eval.batch_size)
    model = task.define(config)
    return Session(
        config=config,
        workdir=workdir,
        flags=flags,
        task=task,
        data=data,
        rows=task.rows(config, data),
        mesh=mesh,
        model=model,
        program=make_program(config, model, mesh),
        numbers=on_devices(numbers_of(config), mesh),
        kernels=kernels,
    )


def _kernels(config: Config, positions: int) -> str:
    """Names the kernels that run here. Raises UserError if one asked for by name cannot."""
    found = {"attention": attention_for(config.execution, config.model, positions)}
    if config.model.moe.num_experts:
        found["grouped matmul"] = grouped_matmul_for(config.execution.grouped_matmul)
    return ", ".join(f"{what} {name}{f' ({why})' if why else ''}" for what, (name, why) in found.items())
