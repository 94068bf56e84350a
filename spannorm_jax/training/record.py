"""A run's folder while it trains: opened, continued, written at the steps that are due, and marked by how it ends."""

from collections.abc import Callable
from contextlib import ExitStack, closing
from functools import cached_property
from typing import Any

import jax

from spannorm_jax.config import Config, to_dict
from spannorm_jax.errors import DIVERGED_EXIT, UserError
from spannorm_jax.model.definition import count_params, flops_per_token
from spannorm_jax.model.initialisation import init_of
from spannorm_jax.parallel import distributed
from spannorm_jax.run import folder as run_folder
from spannorm_jax.run import lines, wandb_log
from spannorm_jax.run.checkpoint import Checkpoints, fault_of
from spannorm_jax.run.metrics import MetricsWriter, NoWriter, open_writer
from spannorm_jax.run.provenance import start_record
from spannorm_jax.run.state import TrainState
from spannorm_jax.run.store import write_json, write_text
from spannorm_jax.training.session import Session
from spannorm_jax.training.step_log import Diverged, Progress, StepLog
from spannorm_jax.validation import notices


class Record:
    """A run's folder while it trains, as a context: the folder is the run's own from its start to its end.

    The order is `is_done`, `begin`, for each step `log.dispatched` and what is due, and one of `end`, `stop` and
    `diverged`, which return the run's exit code. Every process calls all of them; process 0 writes.

    Attributes:
      first: the step to begin with.
      log: of the steps' metrics.
    """

    first: int
    log: StepLog

    def __init__(self, session: Session, lanes: int = 1):
        self.session, self.config, self.workdir = session, session.config, session.workdir
        self._lanes = lanes
        self._lock, self._open = ExitStack(), ExitStack()
        self._check_own: Callable[[], None]
        self._checkpoints: Checkpoints
        self._writer: MetricsWriter | NoWriter
        self._progress: Progress
        self._wandb: Any = None

    def __enter__(self) -> "Record":
        """Opens the folder.

        Raises:
          UserError: process 0 cannot, or another process does not see it.
        """
        with self._lock:  # which an error ends here
            self._check_own = distributed.run_on_all(self._open_folder)
            self._lock = self._lock.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        with ExitStack() as stack:  # `open_run` has to see the error: it says what is wrong with the folder
            stack.push(self._lock)
            stack.push(self._open)
            stack.__exit__(*error)

    def close(self) -> None:
        """Closes what is written, also after an error, once the last save is. The folder is still the run's own."""
        self._open.close()

    def _open_folder(self) -> Callable[[], None]:
        """Returns what raises UserError, on every process, once the folder is no longer the run's own."""
        if not distributed.is_first():
            if not (self.workdir / run_folder.CONFIG).exists():
                raise UserError(
                    f"--workdir {self.workdir} is not shared: process 0 has opened it, and it is not here; share it"
                )
            return lambda: distributed.from_first(lambda: None)
        self._wandb = wandb_log.load(self.config)
        check_own = self._lock.enter_context(run_folder.open_run(self.workdir, self.config))
        for name, text in self.session.task.files(self.session.data).items():
            write_text(self.workdir / name, text)
        return lambda: distributed.from_first(check_own)

    # ---- the start ------------------------------------------------------------------------------

    def is_done(self) -> bool:
        """Whether the run has ended at its last step, and that checkpoint is sound. If it is not, it is done no more.

        A record without checkpoints is done.
        """
        return distributed.from_first(self._is_done)

    def _is_done(self) -> bool:
        mark, checkpoints = self.workdir / run_folder.DONE, self.workdir / run_folder.CHECKPOINTS
        if not mark.exists():
            return False
        last = checkpoints / str(self.config.training.steps)
        fault = fault_of(last, self.config) if any(checkpoints.glob("*")) else None
        if fault:
            print(f"not done: {fault}", flush=True)
            mark.unlink()
        return not fault

    @property
    def _counted(self) -> str:
        """A token, or an image."""
        return self.session.task.counted(self.config)[0].removesuffix("s")

    def announce(self) -> None:
        """Says what is about to run."""
        config, session, facts = self.config, self.session, self._facts
        active = f"{facts['active_params']:,} active" if config.model.moe.num_experts else "all active"
        processes = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
        devices = f"{facts['num_devices']} x {facts['device']}{processes}, mesh {facts['mesh']}"
        distributed.print_once(
            f"{config.model.placement} / {init_of(config.model)}: {config.model.depth} blocks, width "
            f"{config.model.width}, {facts['num_params']:,} parameters ({active}), "
            f"{facts[f'flops_per_{self._counted}'] / 1e6:,.1f} MFLOP/{self._counted}\n"
            f"{devices}, compute {config.model.dtype}, {session.kernels}\n"
            f"{session.task.announced(config, session.data)}"
        )
        session.task.warn(config, session.data)
        shape = session.mesh.shape
        if session.program.replicated_bytes and shape["fsdp"] * shape["expert"] * shape["tensor"] > 1:
            distributed.print_once(
                f"{session.program.replicated_bytes / 1e3:,.1f} kB of the optimiser's state have another shape than "
                "their weights: every device holds them whole"
            )

    @cached_property
    def _facts(self) -> dict[str, Any]:
        """A start as a line of starts.jsonl, without its first step."""
        session = self.session
        positions, of_row = session.task.positions(self.config), session.task.counted(self.config)[1]
        return start_record(
            session.flags.module,
            session.flags.argv,
            session.task.facts(session.data),
            {
                "mesh": dict(session.mesh.shape),
                "lanes": self._lanes,
                "num_params": count_params(session.model),
                "active_params": count_params(session.model, active=True),
                f"flops_per_{self._counted}": flops_per_token(session.model, positions) * positions // of_row,
            },
        )

    def begin(self, silent: bool = False) -> TrainState:
        """The state to begin with: of the newest sound checkpoint, or a new one. It records the start.

        Raises:
          UserError: there are checkpoints, and none is sound.
        """
        for notice in notices(self.config):
            distributed.print_once(f"warning: {notice}")
        folder = self.workdir / run_folder.CHECKPOINTS
        self._checkpoints = self._open.enter_context(
            closing(Checkpoints(folder, self.config.checkpoint, self.config, self._check_own))
        )
        restored, faults = self._checkpoints.resume(self.workdir / run_folder.DAMAGED)
        for fault in faults:
            distributed.print_once(f"passed over a checkpoint: {fault}")
        if restored is None:
            state = self.session.program.init(self.config.seed)
        else:
            state = self._checkpoints.restore(restored, self.session.program.abstract_state)
            distributed.print_once(f"continuing after step {restored}")
        self.first = (restored or 0) + 1
        self._writer = self._open.enter_context(closing(self._open_writer()))
        self._progress = Progress(self.config.training.steps, self.config.metrics.console_every_s, silent)
        self.log = StepLog(self.session, self._writer, self._progress)
        return state

    def _open_writer(self) -> MetricsWriter | NoWriter:
        if not distributed.is_first():
            return NoWriter()
        lines.append(self.workdir / run_folder.STARTS, self._facts | {"first_step": self.first})
        (self.workdir / run_folder.DIVERGED).unlink(missing_ok=True)
        wandb_run = wandb_log.open_run(self._wandb, self.config, self.workdir)
        return open_writer(self.config, self.workdir, self.first - 1, wandb_run)

    # ---- the steps ------------------------------------------------------------------------------

    def save(self, step: int, state: TrainState) -> None:
        """Starts a save. The step's own metrics have been read: what is saved is known to be finite."""
        self._checkpoints.wait()  # which tells of a removed folder before the writer tells of its file
        self._writer.sync()
        self._checkpoints.save(step, state, {"step": step, "config": to_dict(self.config)})

    # ---- the end --------------------------------------------------------------------------------

    def end(self) -> int:
        """Marks the run as done, once its last save is read again and all is closed."""
        self._progress.end_line()
        self._checkpoints.finish(self.config.training.steps)
        self.close()
        self._check_own()
        if distributed.is_first():
            write_json(self.workdir / run_folder.DONE, {"step": self.config.training.steps})
        distributed.print_once(f"done: {self.workdir}")
        return 0

    def stop(self, step: int, stopped_by: str) -> int:
        """Waits for the save of a step that a signal made the last."""
        self._progress.end_line()
        self._checkpoints.wait()
        self.close()
        run = f"{self.workdir} " if self._lanes > 1 else ""
        distributed.print_once(f"stopped by {stopped_by}, {run}saved at step {step}; the same command goes on")
        return self.session.flags.stop_code

    def diverged(self, diverged: Diverged) -> int:
        """Writes DIVERGED, and says which checkpoint is good.

        A step's numbers are of the weights before it: those that this step met are not good.
        """
        self._progress.end_line()
        met = diverged.record["step"] - 1
        self._checkpoints.wait()
        good, _ = distributed.from_first(lambda: self._checkpoints.newest_sound(before=met))
        last = f"the last good checkpoint is step {good}" if good is not None else "there is no good checkpoint"
        if met in self._checkpoints.steps():
            last += f" (that of step {met} holds the weights with which this happened)"
        distributed.print_once(f"stopped: {diverged}; {last}")  # first: there may be no room for the file
        if distributed.is_first():
            mark = diverged.record | {"last_good_checkpoint": good}
            write_json(self.workdir / run_folder.DIVERGED, mark)
        self.close()
        return DIVERGED_EXIT

    def end_line(self) -> None:
        """Leaves the console's line of progress, for the next to stand on its own."""
        self._progress.end_line()


def measured_at(config: Config, step: int) -> bool:
    """Whether the held-out measures are due after a step."""
    every = config.eval.every_steps
    return bool(every) and (step % every == 0 or step == config.training.steps)


def saved_at(config: Config, step: int) -> bool:
    """Whether a checkpoint is due after a step."""
    every = config.checkpoint.every_steps
    return step == config.training.steps or bool(every and step % every == 0)
