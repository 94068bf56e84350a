"""Checkpoints, and the only file that knows Orbax.

A checkpoint has items: params, opt_state, model_state (if the model has any) and meta (step and resolved config).
They are separate so that evaluation does not read the optimiser's. Saves are asynchronous: Orbax writes to a temporary
folder and renames it when everything is on disk; just before, `array_store.py` asks each item for its arrays and
`manifest.py` lists the hash of each file. Only checkpoints that are whole and match their manifest are ever read.

Readers and a trainer at work share a folder. A reader holds the checkpoint it reads by a shared lock on its manifest,
and the trainer keeps what is held; the trainer locks what it removes, and a reader passes it over.
"""

import contextlib
import fcntl
import json
import logging
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from spannorm_jax.config import CheckpointConfig
from spannorm_jax.errors import UserError
from spannorm_jax.parallel import distributed
from spannorm_jax.run.array_store import incomplete, join_parts
from spannorm_jax.run.manifest import MANIFEST, fault, write_manifest
from spannorm_jax.run.renamed import item_of, lacks_clipping, model_state_of, names_of, to_new_names, to_old_names
from spannorm_jax.run.state import TrainState

# Orbax reports each save and restore at INFO, and at ERROR what it also raises. Of its warnings these say nothing new:
# a reader's manager is read-only; parts were not joined, which `_seal` does and checks itself; a checkpoint that a
# trainer is removing has no metadata any more, which `_hold` and `fault` find.
_SAID_OTHERWISE = re.compile(r".*(read.only|Skipping merge of OCDBT|Metadata file does not exist)", re.DOTALL)


def _says_more(record: logging.LogRecord) -> bool:
    return record.levelno == logging.WARNING and not _SAID_OTHERWISE.match(record.getMessage())


logging.getLogger("absl").setLevel(logging.WARNING)
logging.getLogger("absl").addFilter(_says_more)


class Checkpoints:
    """The checkpoints of one run. `close` must be called, also after an error: it waits for the last save."""

    def __init__(self, folder: Path, config: CheckpointConfig | None = None):
        """Opens the folder for training with `config`, or read-only without one."""
        self.folder = folder
        self._saving: int | None = None
        self._held: IO[bytes] | None = None
        if config is None:
            options = ocp.CheckpointManagerOptions(read_only=True)
        else:
            options = ocp.CheckpointManagerOptions(
                preservation_policy=_KeepHeld(folder, config),
                cleanup_tmp_directories=True,
                enable_async_checkpointing=True,
                # Orbax calls this when all files are written, just before it renames the temporary folder.
                async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
            )
        self._manager = ocp.CheckpointManager(folder.resolve(), options=options)

    def steps(self) -> list[int]:
        """Committed steps, ascending."""
        return sorted(self._manager.all_steps())

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def _path(self, step: int) -> Path:
        return self.folder / str(step)

    def _seal(self) -> None:
        (folder,) = self.folder.glob(f"{self._saving}.orbax-checkpoint-tmp*")
        join_parts(folder)
        lacks = incomplete(folder)
        if lacks:
            raise RuntimeError(f"the save of step {self._saving} failed: {lacks}")
        write_manifest(folder)

    def save(self, step: int, state: TrainState, meta: dict[str, Any]) -> None:
        """Starts a save; returns once the state may be donated. An error of the save before is raised here."""
        self._manager.wait_until_finished()
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
        """Items by name, as `abstract` has them, whatever their form when they were saved."""
        if "opt_state" in abstract and lacks_clipping(self._path(step) / "opt_state"):
            clipping, optimizer = abstract["opt_state"]  # clipping holds no array
            items = self._restore_named(step, abstract | {"opt_state": optimizer})
            return items | {"opt_state": (clipping, items["opt_state"])}
        return self._restore_named(step, abstract)

    def _restore_named(self, step: int, abstract: dict[str, Any]) -> dict[str, Any]:
        """Items by name, as `abstract` names their weights, whatever they were called when they were saved."""
        asked = {name: tree for name, tree in abstract.items() if tree}
        old = names_of(self._path(step) / "params")
        if old:
            among = {"model_state"} if old.bias else set()  # the weights
            asked = {name: to_old_names(tree, old) for name, tree in asked.items() if name not in among}
        items = {item_of(name, self._path(step)): ocp.args.StandardRestore(tree) for name, tree in asked.items()}
        restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        found = {name: restored[item_of(name, self._path(step))] for name in asked}
        if not old:
            return {name: found.get(name, {}) for name in abstract}
        if old.bias and abstract["model_state"]:
            found["model_state"] = model_state_of(found["params"])
        return {name: to_new_names(found[name], tree, old) if tree else {} for name, tree in abstract.items()}

    def restore_model(self, step: int, abstract_params: Any, abstract_model_state: Any) -> tuple[Any, Any]:
        """Reads the parameters and the model state, and nothing else.

        Raises:
          UserError: a trainer has removed the checkpoint meanwhile, where no lock could hold it.
        """
        try:
            items = self._restore(step, {"params": abstract_params, "model_state": abstract_model_state})
            return items["params"], items["model_state"]
        except Exception as error:  # each store raises its own kind over a file that has gone
            if (self._path(step) / MANIFEST).exists():
                raise
            raise UserError(
                f"{self._path(step)} was removed while it was read, by a trainer at work; repeat the command, or "
                "train with a larger checkpoint.keep_last"
            ) from error

    def config(self, step: int) -> dict[str, Any] | None:
        """The config that a checkpoint was saved with, as a dictionary; None if it does not say."""
        path = self._path(step) / "meta" / "metadata"
        return json.loads(path.read_text(encoding="utf-8")).get("config") if path.is_file() else None

    def newest_sound(self) -> tuple[int | None, list[str]]:
        """The newest step whose files are as they were saved, and what is wrong with each newer one."""
        faults: list[str] = []
        for step in reversed(self.steps()):
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
            aside.mkdir(exist_ok=True)
            shutil.rmtree(aside / str(bad), ignore_errors=True)
            self._path(bad).rename(aside / str(bad))
        return step, faults

    def _fault(self, step: int) -> str | None:
        """What is wrong with a checkpoint and what would mend it, naming the file; None if it can be read."""
        found = fault(self._path(step))
        if found is None and (lacks := incomplete(self._path(step))):
            found = lacks
            if "never joined" in lacks:  # as saved in a folder with brackets, before that was noticed
                found += (
                    "; its data are there, and this joins them: python -c 'import sys; from pathlib import Path; "
                    "from spannorm_jax.run.checkpoint import rescue; rescue(Path(sys.argv[1]))' "
                    f"{str(self._path(step))!r}"
                )
        return found

    def find(self, step: int | None) -> tuple[int, list[str]]:
        """The step asked for, or the newest sound one, and what is wrong with each newer one.

        It is held until `close`: a trainer at work leaves it where it is.

        Raises:
          UserError: there is no such checkpoint, or it is not as it was saved.
        """
        found, faults = distributed.from_first(lambda: self._find(step))
        return found, faults

    def _find(self, wanted: int | None) -> tuple[int, list[str]]:
        steps = self.steps()
        if not steps:
            raise UserError(f"{self.folder} holds no committed checkpoint yet; train longer first")
        if wanted is not None and wanted not in steps:
            raise UserError(
                f"{self.folder} holds no checkpoint of step {wanted}; there are {', '.join(map(str, steps))}"
            )
        faults: list[str] = []
        for step in [wanted] if wanted is not None else steps[::-1]:
            if not self._hold(step):
                continue
            found = self._fault(step)
            if found is None:
                return step, faults
            faults.append(found)
        if not faults:  # all were being removed: newer ones have come
            self._manager.reload()
            if wanted is None and self.steps() != steps:
                return self._find(None)
            raise UserError(f"{self._path(wanted or steps[-1])} is being removed by a trainer; choose another --step")
        if wanted is None:
            raise UserError(f"{faults[0]}, and no older checkpoint is sound; put the files back from a copy")
        others = ", ".join(str(s) for s in steps if s != wanted) or "none"
        raise UserError(f"{faults[0]}; put the file back from a copy, or choose another --step (there: {others})")

    def _hold(self, step: int) -> bool:
        """Keeps a trainer from removing a checkpoint; False if it has gone, or a trainer is removing it."""
        self._release()
        path = self._path(step) / MANIFEST
        try:
            self._held = open(path, "rb")  # noqa: SIM115 (closed by _release)
            fcntl.flock(self._held, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # no manifest, which `fault` names, or no locks on this file system
            return self._path(step).exists()
        return os.fstat(self._held.fileno()).st_nlink > 0

    def _release(self) -> None:
        if self._held:
            self._held.close()
            self._held = None

    def wait(self) -> None:
        """Returns when every save is committed."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._release()
        self._manager.close()


class _KeepHeld(policies.PreservationPolicy):
    """Orbax's choice of what to keep, and what a reader holds. What goes is locked until the next choice."""

    def __init__(self, folder: Path, config: CheckpointConfig):
        kept = [policies.LatestN(config.keep_last)]
        if config.keep_every:
            kept.append(policies.EveryNSteps(config.keep_every))
        self._usual = policies.AnyPreservationPolicy(kept)
        self._folder = folder
        self._locks = contextlib.ExitStack()

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        self._locks.close()  # of the choice before, whose removals are done
        usual = self._usual.should_preserve(checkpoints, context=context)
        spare = [info.step for info, keep in zip(checkpoints, usual, strict=True) if not keep]
        held = distributed.from_first(lambda: [step for step in spare if not self._claim(step)])
        return [keep or info.step in held for info, keep in zip(checkpoints, usual, strict=True)]

    def _claim(self, step: int) -> bool:
        """Locks out readers; False if one holds the checkpoint."""
        try:
            file = self._locks.enter_context((self._folder / str(step) / MANIFEST).open("r+b"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # no locks on this file system, or no manifest: nobody holds it
            pass
        return True


def rescue(checkpoint: Path) -> None:
    """Joins the parts of a checkpoint that was sealed without it, and seals it anew.

    Raises:
      ValueError: the checkpoint is not as it was saved, or is not whole even then.
    """
    found = fault(checkpoint)
    if found is None:
        join_parts(checkpoint)
        found = incomplete(checkpoint)
    if found:
        raise ValueError(found)
    write_manifest(checkpoint)
