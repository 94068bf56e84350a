"""Checkpoints, and the only file that knows Orbax.

A checkpoint has items: params, opt_state, model_state (if the model has any) and meta (step and resolved config).
They are separate so that evaluation does not read the optimiser's. Saves are asynchronous: Orbax writes to a temporary
folder and renames it when everything is on disk, or in a bucket writes a last object; just before, `array_store.py`
asks each item for its arrays and `manifest.py` lists the hash of each file. Only checkpoints that are whole, match
their manifest, and are by their meta that step of that run are ever read: a folder's name says nothing.

Readers and a trainer at work share a folder. A reader holds the checkpoint it reads (`holds.py`), and the trainer
keeps what is held; the trainer locks what it removes, and a reader passes it over.
"""

import json
import logging
import re
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from spannorm_jax.config import CheckpointConfig, Config
from spannorm_jax.config_file import recorded_config
from spannorm_jax.errors import UserError
from spannorm_jax.parallel import distributed
from spannorm_jax.resolution import changed_keys
from spannorm_jax.run import holds, objects
from spannorm_jax.run.array_store import incomplete, join_parts
from spannorm_jax.run.bucket import in_bucket
from spannorm_jax.run.manifest import MANIFEST, fault, write_manifest
from spannorm_jax.run.state import TrainState
from spannorm_jax.run.store import make_folder, move_folder, remove_folder

# Orbax reports each save and restore at INFO, and at ERROR what it also raises. Of its warnings these say nothing new:
# a reader's manager is read-only; parts were not joined, which `_seal` does and checks itself; a checkpoint that a
# trainer is removing has no metadata any more, which `holds` and `fault` find; a save is waited for.
_SAID_OTHERWISE = re.compile(
    r".*(read.only|Waiting for previous save|Skipping merge of OCDBT|Metadata file does not exist)", re.DOTALL
)


def _says_more(record: logging.LogRecord) -> bool:
    return record.levelno == logging.WARNING and not _SAID_OTHERWISE.match(record.getMessage())


_LOOKS, _LOOK_S = 50, 0.1  # of a reader, while a trainer removes all that it finds

logging.getLogger("absl").setLevel(logging.WARNING)
logging.getLogger("absl").addFilter(_says_more)


class Checkpoints:
    """The checkpoints of one run. `close` must be called, also after an error: it waits for the last save."""

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig | None = None,
        run: Config | None = None,
        check_own: Callable[[], None] = lambda: None,
    ):
        """Opens the folder for training with `config`, or read-only without one.

        Args:
          run: the config of the run that the checkpoints must be of; None: whatever run.
          check_own: raises, on every process, if the run's folder is no longer its own. It is called around each save.
        """
        self.folder, self.check_own = folder, check_own
        self._run = run
        self._kept = _KeepHeld(folder, config) if config else None
        self._saving: int | None = None
        self._hold = holds.Hold(folder)
        shared = objects.manager_options(folder)
        if self._kept is None:
            options = ocp.CheckpointManagerOptions(read_only=True, **shared)
        else:
            options = ocp.CheckpointManagerOptions(
                **shared,
                preservation_policy=self._kept,
                cleanup_tmp_directories=True,
                enable_async_checkpointing=True,
                # Orbax calls this when all files are written, just before it renames the temporary folder.
                async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
            )
        self._manager = ocp.CheckpointManager(folder if in_bucket(folder) else folder.resolve(), options=options)

    def steps(self) -> list[int]:
        """Committed steps, ascending."""
        return sorted(self._manager.all_steps())

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def _path(self, step: int) -> Path:
        return self.folder / str(step)

    def _seal(self) -> None:
        folder = self.folder / str(self._saving)
        if not in_bucket(folder):
            (folder,) = self.folder.glob(f"{self._saving}.orbax-checkpoint-tmp*")
        join_parts(folder)
        lacks = incomplete(folder)
        if lacks:
            raise RuntimeError(f"the save of step {self._saving} failed: {lacks}")
        write_manifest(folder)

    def save(self, step: int, state: TrainState, meta: dict[str, Any]) -> None:
        """Starts a save; returns once the state may be donated. An error of the save before is raised here."""
        self.wait()
        self._trim()
        self._saving = step
        trees = {"params": state.params, "opt_state": state.opt_state, "model_state": state.model_state}
        args = {name: ocp.args.StandardSave(tree) for name, tree in trees.items() if tree}
        self._manager.save(step, args=ocp.args.Composite(**args, meta=ocp.args.JsonSave(meta)), force=True)

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """Reads a whole state onto the shardings of `abstract`, whatever mesh wrote it."""
        items = self._restore(
            step, {"params": abstract.params, "opt_state": abstract.opt_state, "model_state": abstract.model_state}
        )
        # Made by the devices that hold it: a host scalar would be placed, and compiled for, differently.
        number = np.asarray(step, abstract.step.dtype)
        restored = jax.make_array_from_callback((), abstract.step.sharding, lambda _: number)
        return TrainState(restored, items["params"], items["opt_state"], items["model_state"])

    def _restore(self, step: int, abstract: dict[str, Any]) -> dict[str, Any]:
        """Items by name, as `abstract` has them; one without arrays is not in the checkpoint.

        Raises:
          UserError: an array has another shape there: an older version laid its weights out otherwise.
        """
        items = {name: ocp.args.StandardRestore(tree) for name, tree in abstract.items() if tree}
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        except ValueError as error:
            shapes = re.search(r"Requested shape: (\(.*?\)) .* the stored shape: (\(.*?\))", str(error))
            if not shapes:
                raise
            raise UserError(
                f"{self._path(step)} is of an older version, which laid weights out otherwise ({shapes[2]}, now "
                f"{shapes[1]}); read it with the commit that its starts.jsonl names, or train anew"
            ) from error
        return {name: restored[name] if tree else {} for name, tree in abstract.items()}

    def restore_model(self, step: int, abstract_params: Any, abstract_model_state: Any) -> tuple[Any, Any]:
        """Reads the parameters and the model state, and nothing else. Raises UserError as `restore_items`."""
        items = self.restore_items(step, {"params": abstract_params, "model_state": abstract_model_state})
        return items["params"], items["model_state"]

    def restore_items(self, step: int, abstract: dict[str, Any]) -> dict[str, Any]:
        """Reads the items of `abstract`, by name, for a reader.

        Raises:
          UserError: a trainer has removed the checkpoint meanwhile, where no lock could hold it.
        """
        try:
            return self._restore(step, abstract)
        except Exception as error:  # each store raises its own kind over a file that has gone
            if (self._path(step) / MANIFEST).exists():
                raise
            raise UserError(
                f"{self._path(step)} was removed while it was read, by a trainer at work; repeat the command, or "
                "train with a larger checkpoint.keep_last"
            ) from error

    def newest_sound(self, before: int | None = None) -> tuple[int | None, list[str]]:
        """The newest step (below `before`) that is sound and the run's, and what is wrong with each newer one."""
        faults: list[str] = []
        for step in reversed([s for s in self.steps() if before is None or s < before]):
            found = self._fault(step)
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
            make_folder(aside)
            remove_folder(aside / str(bad))
            move_folder(self._path(bad), aside / str(bad))
        return step, faults

    def _fault(self, step: int) -> str | None:
        return fault_of(self._path(step), self._run)

    def find(self, step: int | None, at_most: int | None = None) -> tuple[int, list[str]]:
        """The step asked for, or the newest sound one (no later than `at_most`), and what is wrong with each newer one.

        It is held until `close`: a trainer at work leaves it where it is.

        Raises:
          UserError: there is no such checkpoint, or it is not as it was saved, or not this run's.
        """
        found, faults = distributed.from_first(lambda: self._find(step, at_most))
        return found, faults

    def _find(self, wanted: int | None, at_most: int | None) -> tuple[int, list[str]]:
        for _ in range(_LOOKS):
            steps = [step for step in self.steps() if at_most is None or step <= at_most]
            found, faults, gone = self._look(wanted, steps)
            if found is not None:
                return found, faults
            if wanted is not None or not gone:
                break
            time.sleep(_LOOK_S)  # a trainer is removing some, and newer ones come
            self._manager.reload()
        if wanted is None:
            if gone:
                raise UserError(f"{self._path(gone[0])} is being removed by a trainer; repeat the command")
            raise UserError(f"{faults[0]}, and no older checkpoint is sound; put the files back from a copy")
        if gone:
            raise UserError(f"{self._path(wanted)} is being removed by a trainer; choose another --step")
        others = ", ".join(str(s) for s in steps if s != wanted) or "none"
        raise UserError(f"{faults[0]}; put the file back from a copy, or choose another --step (there: {others})")

    def _look(self, wanted: int | None, steps: list[int]) -> tuple[int | None, list[str], list[int]]:
        """The step to read if there is one, what is wrong with newer ones, and those that a trainer is removing."""
        if not steps:
            raise UserError(f"{self.folder} holds no committed checkpoint to read; train longer first")
        if wanted is not None and wanted not in steps:
            raise UserError(
                f"{self.folder} holds no checkpoint of step {wanted}; there are {', '.join(map(str, steps))}"
            )
        faults: list[str] = []
        gone: list[int] = []
        for step in [wanted] if wanted is not None else steps[::-1]:
            found = self._fault(step) if self._hold.take(step) else ""
            if found is None:
                return step, faults, gone
            if found and self._path(step).exists():
                faults.append(found)
            else:
                gone.append(step)
        return None, faults, gone

    def wait(self) -> None:
        """Returns when every save is committed, in a folder that is still the run's own."""
        self._in_own(self._manager.wait_until_finished)
        self.check_own()

    def finish(self, step: int) -> None:
        """Waits for the save of the last step, reads it, and leaves what the config asks to keep.

        Raises:
          UserError: it is not as it was saved, or the folder is not the run's own any more.
        """
        self.wait()
        found = distributed.from_first(lambda: self._fault(step))
        if found:
            raise UserError(f"{found}; repeat the command, which goes on from the last sound checkpoint")
        self._trim()

    def _trim(self) -> None:
        """Removes what `keep_last` does not ask for: a later step has used the newest checkpoint, or none will."""
        assert self._kept is not None
        for step in self._kept.spare(self.steps(), self._kept.last):
            self._in_own(partial(self._manager.delete, step))

    def _in_own(self, act: Callable[[], None]) -> None:
        """Acts on the folder. What fails because it was removed says so."""
        try:
            act()
        except Exception:
            if jax.process_count() == 1:  # the check is one of all processes, and the others may not have failed
                self.check_own()
            if not self.folder.is_dir():
                raise UserError(
                    f"{self.folder} was removed while the run was at work; repeat the command, which begins anew"
                ) from None
            raise

    def close(self) -> None:
        self._hold.release()
        self._in_own(self._manager.close)


def fault_of(checkpoint: Path, run: Config | None) -> str | None:
    """What is wrong with a checkpoint and what would mend it, naming the file; None if it can be read.

    It is wrong too if its meta says that it is of another step than its folder, or of another run than `run`.
    """
    found = fault(checkpoint)
    if found is None:
        found = incomplete(checkpoint)
    return found or _foreign(checkpoint, run)


def _foreign(checkpoint: Path, run: Config | None) -> str | None:
    """What the meta of a sound checkpoint says against its being that step of this run."""
    path = checkpoint / "meta" / "metadata"
    if not path.is_file():  # it says nothing
        return None
    meta = json.loads(path.read_text(encoding="utf-8"))
    if meta.get("step", int(checkpoint.name)) != int(checkpoint.name):
        return f"{checkpoint} is the checkpoint of step {meta['step']} under another name"
    if run is None or "config" not in meta:
        return None
    try:
        changed = changed_keys(recorded_config(meta["config"]), run)
    except UserError as error:
        return f"{checkpoint} was saved with a config that this version does not know ({error})"
    for key, then, now in changed:
        if key != "model.dtype":  # which the machine may have chosen
            return f"{checkpoint} is of another run: it was saved with {key}={then!r}, and this run has {now!r}"
    return None


class _KeepHeld(policies.PreservationPolicy):
    """Keeps what the config says and what a reader holds. What goes is locked until the next choice.

    The weights of the newest checkpoint may be bad, as only the next step tells; the one before it is good. So two are
    kept at least, until the next save begins.
    """

    def __init__(self, folder: Path, config: CheckpointConfig):
        self.last, self._every = config.keep_last, config.keep_every
        self._claims = holds.Claims(folder)

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        spare = self.spare([info.step for info in checkpoints], max(2, self.last))
        return [info.step not in spare for info in checkpoints]

    def spare(self, steps: Sequence[int], last: int) -> list[int]:
        """Those that nobody needs, with the `last` newest kept. They are locked until the next choice."""
        self._claims.release()  # of the choice before, whose removals are done
        spare = [s for s in sorted(steps)[:-last] if not self._every or s % self._every]
        return distributed.from_first(lambda: [step for step in spare if self._claims.take(step)])
