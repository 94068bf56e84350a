"""The way to a trained model: the parameters of a run's checkpoint, on the mesh that is here."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from spannorm_jax.config import Config, flatten
from spannorm_jax.config_file import recorded_config
from spannorm_jax.errors import UserError
from spannorm_jax.model.definition import ModelDef, abstract_model_state, abstract_params, define
from spannorm_jax.parallel import distributed
from spannorm_jax.run.checkpoint import Checkpoints
from spannorm_jax.run.folder import CHECKPOINTS, CONFIG


@dataclass(frozen=True)
class Trained:
    """A run's model with the weights and the model state after `step` updates, float32, sharded over `mesh`."""

    config: Config
    model: ModelDef
    mesh: Mesh
    step: int
    params: Any
    model_state: Any


@contextlib.contextmanager
def open_trained(workdir: Path, step: int | None, doing: str) -> Iterator[Callable[[Config, Mesh], Trained]]:
    """Finds a checkpoint (None: the newest sound one) and yields a function that restores it.

    The checkpoint is held until the end of the context: a trainer at work does not remove it. Newer
    ones that are damaged are named on stderr, with what is done instead (`doing`, as in
    "evaluating"). The function takes the run's resolved config and a mesh that divides its weights;
    it reads what the model needs and nothing else. Every process calls both.

    Raises:
      UserError: there is no such sound checkpoint, it is of another model than the config, or it was
        removed where no lock could hold it.
    """
    with contextlib.closing(Checkpoints(workdir / CHECKPOINTS)) as checkpoints:
        found, faults = checkpoints.find(step)
        for fault in faults:  # stdout may be one JSON line
            distributed.print_once(f"passed over a checkpoint: {fault}; {doing} step {found}", sys.stderr)

        def restore(config: Config, mesh: Mesh) -> Trained:
            _check_model(workdir, found, checkpoints.config(found), config)
            model = define(config.model, config.execution)
            params, model_state = checkpoints.restore_model(
                found, abstract_params(model, mesh), abstract_model_state(model, mesh)
            )
            return Trained(config, model, mesh, found, params, model_state)

        yield restore


def _check_model(workdir: Path, step: int, saved: dict[str, Any] | None, config: Config) -> None:
    """Raises UserError if the config that a checkpoint was saved with has another model than the folder's."""
    if saved is None:
        return
    then, now = flatten(recorded_config(saved)), flatten(config)
    for key in now:
        if key.startswith("model.") and key != "model.dtype" and then[key] != now[key]:
            raise UserError(
                f"{workdir / CHECKPOINTS / str(step)} is of another architecture: it was saved with {key}={then[key]}, "
                f"and {workdir / CONFIG} says {now[key]}; put the file or the checkpoint back that belongs to it"
            )
