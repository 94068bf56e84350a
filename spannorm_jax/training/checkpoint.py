"""Checkpoints, and the only file that knows Orbax.

A checkpoint has three items: params, opt_state and meta (step and resolved config). They are separate so that
evaluation reads the parameters alone. Saves are asynchronous, and only committed steps count: Orbax writes to a
temporary folder and renames it when everything is on disk.
"""

import logging
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import orbax.checkpoint as ocp

from spannorm_jax.config import CheckpointConfig
from spannorm_jax.errors import UserError
from spannorm_jax.training.step import TrainState

# Orbax reports each save and restore at INFO, and its read-only mode at WARNING.
logging.getLogger("absl").setLevel(logging.ERROR)


class Checkpoints:
    """The checkpoints of one run. `close` must be called, also after an error: it waits for the last save."""

    def __init__(self, folder: Path, config: CheckpointConfig | None = None):
        """Opens the folder for training with `config`, or read-only without one."""
        self.folder = folder
        if config is None:
            options = ocp.CheckpointManagerOptions(read_only=True)
        else:
            options = ocp.CheckpointManagerOptions(
                max_to_keep=config.keep_last,
                keep_period=config.keep_every or None,
                cleanup_tmp_directories=True,
                enable_async_checkpointing=True,
            )
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def steps(self) -> list[int]:
        """Committed steps, ascending."""
        return sorted(self._manager.all_steps())

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, meta: dict[str, Any]) -> None:
        """Starts a save; returns once the state may be donated."""
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(state.params),
                opt_state=ocp.args.StandardSave(state.opt_state),
                meta=ocp.args.JsonSave(meta),
            ),
            force=True,
        )

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """Reads a whole state onto the shardings of `abstract`, whatever mesh wrote it."""
        items = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(abstract.params),
                opt_state=ocp.args.StandardRestore(abstract.opt_state),
            ),
        )
        # Made by the device that holds it: a host scalar would be placed, and compiled for, differently.
        restored = jnp.asarray(step, abstract.step.dtype, device=abstract.step.sharding)
        return TrainState(restored, items.params, items.opt_state)

    def restore_params(self, step: int, abstract_params: Any) -> Any:
        """Reads the parameters alone."""
        args = ocp.args.Composite(params=ocp.args.StandardRestore(abstract_params))
        return self._manager.restore(step, args=args).params

    def find(self, step: int | None) -> int:
        """The step asked for, or the newest.

        Raises:
          UserError: there is no such committed checkpoint.
        """
        steps = self.steps()
        if not steps:
            raise UserError(f"{self.folder} holds no committed checkpoint yet; train longer first")
        if step is None:
            return steps[-1]
        if step not in steps:
            raise UserError(f"{self.folder} holds no checkpoint of step {step}; there are {', '.join(map(str, steps))}")
        return step

    def wait(self) -> None:
        """Returns when every save is committed."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()
