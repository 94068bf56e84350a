"""The way to a trained model: the parameters of a run's checkpoint, on the mesh that is here."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from spannorm_jax.config import Config
from spannorm_jax.errors import UserError
from spannorm_jax.model.definition import ModelDef, abstract_model_state, abstract_params
from spannorm_jax.parallel import distributed
from spannorm_jax.run.checkpoint import Checkpoints
from spannorm_jax.run.folder import CHECKPOINTS, DIVERGED, read_config, read_mark


@dataclass(frozen=True)
class Trained:
    """A run's model with the weights and the model state after `step` updates, float32, sharded over `mesh`."""

    config: Config
    model: ModelDef
    mesh: Mesh
    step: int
    params: Any
    model_state: Any
    opt_state: Any  # {} if it was not asked for


@contextlib.contextmanager
def open_trained(workdir: Path, step: int | None, doing: str) -> Iterator[Callable[..., Trained]]:
    """Finds a checkpoint and yields a function that restores it.

    Without a step it is the newest sound one, or where the run diverged the last good one, which is
    said. The checkpoint is held until the end of the context: a trainer at work does not remove it.
    Newer ones that are damaged or not the run's are named on stderr, with what is done instead
    (`doing`, as in "evaluating"). The function takes the run's resolved config, its model and a mesh that divides
    its weights; it reads what the model needs and nothing else, and of the optimiser what `opt_state` has, if any.
    Every process calls both.

    Raises:
      UserError: there is no such sound checkpoint of this run, or it was removed where no lock could
        hold it.
    """
    good = distributed.from_first(lambda: _last_good(workdir)) if step is None else None
    with contextlib.closing(Checkpoints(workdir / CHECKPOINTS, run=read_config(workdir))) as checkpoints:
        found, faults = checkpoints.find(step, good)
        if good is not None:
            distributed.print_once(f"{workdir} diverged: {doing} step {found}, its last good checkpoint", sys.stderr)
        for fault in faults:  # stdout may be one JSON line
            distributed.print_once(f"passed over a checkpoint: {fault}; {doing} step {found}", sys.stderr)

        def restore(config: Config, model: ModelDef, mesh: Mesh, opt_state: Any = None) -> Trained:
            abstract = {"params": abstract_params(model, mesh), "model_state": abstract_model_state(model, mesh)}
            return Trained(
                config, model, mesh, found, **checkpoints.restore_items(found, abstract | {"opt_state": opt_state})
            )

        yield restore


def _last_good(workdir: Path) -> int | None:
    """The last good checkpoint of a run that diverged; None if it did not, or was not asked for one then.

    Raises:
      UserError: it diverged before there was one.
    """
    mark = read_mark(workdir / DIVERGED) or {}
    good = mark.get("last_good_checkpoint")
    if good is None and "last_good_checkpoint" in mark:
        raise UserError(
            f"{workdir} diverged at step {mark.get('step')}, before it had a good checkpoint; --step N takes one all "
            f"the same, as far as there are any in {CHECKPOINTS}/"
        )
    return good
