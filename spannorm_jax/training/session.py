"""What a run needs once its config is matched to this machine."""

from dataclasses import dataclass
from pathlib import Path

from jax.sharding import Mesh

from spannorm_jax.config import Config
from spannorm_jax.data.loader import TrainLoader, check_held_out
from spannorm_jax.data.open import OpenData, open_data
from spannorm_jax.model.definition import ModelDef, define
from spannorm_jax.model.kernels.attention import attention_for
from spannorm_jax.model.moe.grouped_matmul import grouped_matmul_for
from spannorm_jax.parallel.mesh import check_divisible, make_mesh
from spannorm_jax.training.flags import Flags
from spannorm_jax.training.held_out import check_predicts_text
from spannorm_jax.training.numbers import Numbers, numbers_of, on_devices
from spannorm_jax.training.step import Program, make_program


@dataclass(frozen=True)
class Session:
    """A run on this machine: `config` is resolved, and everything else is made from it."""

    config: Config
    workdir: Path
    flags: Flags
    data: OpenData
    mesh: Mesh
    loader: TrainLoader
    model: ModelDef
    program: Program
    numbers: Numbers  # what the program takes besides state and batch, on the devices
    kernels: str  # what runs here, as the start says it: "attention xla (why), grouped matmul padded"


def match_machine(config: Config, workdir: Path, flags: Flags, lanes: int = 1) -> Session:
    """Resolves the config against this machine's data, kernels and devices; compiles no step.

    `lanes` is the number of runs that share its program, this one included.

    Token stores that are absent are built. Nothing is written into `workdir`.

    Raises:
      UserError: the data are not those asked for or leave nothing to predict, a kernel that is
        asked for by name cannot run here, or the devices do not divide the batch or the weights.
    """
    data, config = open_data(config)
    check_held_out(data.eval, data.tokenizer)
    loader = TrainLoader(data.train, config.data.seq_len, config.training.batch_size, config.seed)
    kernels = _kernels(config)
    mesh = make_mesh(config.mesh, lanes=lanes)
    training = config.training
    microbatch = training.batch_size // training.num_microbatches
    check_divisible(config, dict(mesh.shape), "training.batch_size / num_microbatches", microbatch)
    check_predicts_text(config, data)  # though only evaluation may ask for it, once the run is trained
    if config.eval.every_steps:
        check_divisible(config, dict(mesh.shape), "eval.batch_size", config.eval.batch_size)
    model = define(config.model, config.execution)
    return Session(
        config=config,
        workdir=workdir,
        flags=flags,
        data=data,
        mesh=mesh,
        loader=loader,
        model=model,
        program=make_program(config, model, mesh),
        numbers=on_devices(numbers_of(config), mesh),
        kernels=kernels,
    )


def _kernels(config: Config) -> str:
    """Names the kernels that run here. Raises UserError if one asked for by name cannot."""
    found = {"attention": attention_for(config.execution, config.model, config.data.seq_len)}
    if config.model.moe.num_experts:
        found["grouped matmul"] = grouped_matmul_for(config.execution.grouped_matmul)
    return ", ".join(f"{what} {name}{f' ({why})' if why else ''}" for what, (name, why) in found.items())
