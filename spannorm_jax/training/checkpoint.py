"""Checkpoints, and the only file that knows Orbax.

A checkpoint has three items: params, opt_state and meta (step and resolved config). They are separate so that
evaluation reads the parameters alone. Saves are asynchronous: Orbax writes to a temporary folder and renames it when
everything is on disk; just before, `manifest.py` lists the hash of each file in it. Only checkpoints that match their
manifest are ever read.
"""

import logging
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from spannorm_jax.config import CheckpointConfig
from spannorm_jax.errors import UserError
from spannorm_jax.parallel import distributed
from spannorm_jax.training.manifest import fault, write_manifest
from spannorm_jax.training.step import TrainState

# Orbax reports each save and restore at INFO, its read-only mode at WARNING, and what it also raises at ERROR.
logging.getLogger("absl").setLevel(logging.CRITICAL)


class Checkpoints:
    """The checkpoints of one run. `close` must be called, also after an error: it waits for the last save."""

    def __init__(self, folder: Path, config: CheckpointConfig | None = None):
        """Opens the folder for training with `config`, or read-only without one."""
        self.folder = folder
        self._saving: int | None = None
        if config is None:
            options = ocp.CheckpointManagerOptions(read_only=True)
        else:
            options = ocp.CheckpointManagerOptions(
                max_to_keep=config.keep_last,
                keep_period=config.keep_every or None,
                cleanup_tmp_directories=True,
                enable_async_checkpointing=True,
                # Orbax calls this when all files are written, just before it renames the temporary folder.
                async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
            )
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def steps(self) -> list[int]:
        """Committed steps, ascending."""
        return sorted(self._manager.all_steps())

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def _path(self, step: int) -> Path:
        return self.folder / str(step)

    def _seal(self) -> None:
        (folder,) = self.folder.glob(f"{self._saving}.orbax-checkpoint-tmp*")
        write_manifest(folder)

    def save(self, step: int, state: TrainState, meta: dict[str, Any]) -> None:
        """Starts a save; returns once the state may be donated. An error of the save before is raised here."""
        self._manager.wait_until_finished()
        self._saving = step
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
        # Made by the devices that hold it: a host scalar would be placed, and compiled for, differently.
        number = np.asarray(step, abstract.step.dtype)
        restored = jax.make_array_from_callback((), abstract.step.sharding, lambda _: number)
        return TrainState(restored, items.params, items.opt_state)

    def restore_params(self, step: int, abstract_params: Any) -> Any:
        """Reads the parameters alone."""
        args = ocp.args.Composite(params=ocp.args.StandardRestore(abstract_params))
        return self._manager.restore(step, args=args).params

    def newest_sound(self) -> tuple[int | None, list[str]]:
        """The newest step whose files are as they were saved, and what is wrong with each newer one."""
        faults = []
        for step in reversed(self.steps()):
            found = fault(self._path(step))
            if found is None:
                return step, faults
            faults.append(found)
        return None, faults

    def resume(self, aside: Path) -> tuple[int | None, list[str]]:
        """The step to continue from (None: from the beginning), and what is wrong with each newer checkpoint.

        Those are moved to `aside`: they make room for their step's next save, and nothing is thrown away.

        Raises:
          UserError: all checkpoints are gone bad; they are left as they are.
        """
        step, faults = distributed.from_first(lambda: self._resume(aside))
        if faults:
            self._manager.reload()
        return step, faults

    def _resume(self, aside: Path) -> tuple[int | None, list[str]]:
        step, faults = self.newest_sound()
        if step is None and faults:
            raise UserError(
                f"{faults[0]}, and no older checkpoint is sound; put the files back from a copy, or remove "
                f"{self.folder} to train from the beginning"
            )
        for bad in [s for s in self.steps() if step is None or s > step]:
            aside.mkdir(exist_ok=True)
            shutil.rmtree(aside / str(bad), ignore_errors=True)
            self._path(bad).rename(aside / str(bad))
        return step, faults

    def find(self, step: int | None) -> tuple[int, list[str]]:
        """The step asked for, or the newest sound one, and what is wrong with each newer one.

        Raises:
          UserError: there is no such checkpoint, or it is not as it was saved.
        """
        return tuple(distributed.from_first(lambda: self._find(step)))

    def _find(self, step: int | None) -> tuple[int, list[str]]:
        steps = self.steps()
        if not steps:
            raise UserError(f"{self.folder} holds no committed checkpoint yet; train longer first")
        if step is None:
            step, faults = self.newest_sound()
            if step is None:
                raise UserError(f"{faults[0]}, and no older checkpoint is sound; put the files back from a copy")
            return step, faults
        if step not in steps:
            raise UserError(f"{self.folder} holds no checkpoint of step {step}; there are {', '.join(map(str, steps))}")
        found = fault(self._path(step))
        if found:
            others = ", ".join(str(s) for s in steps if s != step) or "none"
            raise UserError(f"{found}; put the file back from a copy, or choose another --step (there: {others})")
        return step, []

    def wait(self) -> None:
        """Returns when every save is committed."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()
