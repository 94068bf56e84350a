"""A run's folder while it trains: opened, continued, written at the steps that are due, and marked by how it ends.

The loop calls these for its one run, and the loop of lanes for each of its own.
"""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax

from spannorm_jax.config import Config, replace, to_dict
from spannorm_jax.data.open import say_overlap
from spannorm_jax.durable import append_line, write_json, write_text
from spannorm_jax.errors import UserError
from spannorm_jax.model.definition import count_params, flops_per_token
from spannorm_jax.model.initialisation import init_of
from spannorm_jax.parallel import distributed
from spannorm_jax.run import folder as run_folder
from spannorm_jax.run import wandb_log
from spannorm_jax.run.checkpoint import Checkpoints, fault_of
from spannorm_jax.run.metrics import MetricsWriter, NoWriter, open_writer
from spannorm_jax.run.provenance import start_record
from spannorm_jax.run.state import TrainState
from spannorm_jax.training.flags import Flags
from spannorm_jax.training.session import Session, match_machine
from spannorm_jax.training.step_log import Diverged
from spannorm_jax.validation import notices

# ---- the start --------------------------------------------------------------------------------


def open_session(config: Config, workdir: Path, flags: Flags, lanes: int = 1) -> Session:
    """The run on this machine, with the data that the run in `workdir` goes on with, if there is one.

    Raises:
      UserError: the config does not fit the devices, the data or the folder; nothing is written then.
    """
    full_name = distributed.from_first(lambda: run_folder.data_opened_as(workdir, config))
    config = replace(config, data__full_name=full_name)
    return distributed.run_on_all(lambda: match_machine(config, workdir, flags, lanes))


def open_folder(stack: ExitStack, session: Session) -> tuple[Callable[[], None], Any]:
    """Opens the run's folder on process 0.

    Returns a function that raises UserError, on every process, once it is no longer the run's own; and, on process 0,
    wandb if it is asked for.

    Raises:
      UserError: process 0 cannot open the folder, or another process does not see it.
    """
    config, workdir = session.config, session.workdir
    if distributed.is_first():
        wandb = wandb_log.load(config)
        check_own = stack.enter_context(run_folder.open_run(workdir, config))
        if session.data.tokenizer.source:
            write_text(workdir / run_folder.TOKENIZER, session.data.tokenizer.source)
        return lambda: distributed.from_first(check_own), wandb
    if not (workdir / run_folder.CONFIG).exists():
        raise UserError(f"--workdir {workdir} is not shared: process 0 has opened it, and it is not here; share it")
    return lambda: distributed.from_first(lambda: None), None


def open_checkpoints(session: Session, check_own: Callable[[], None]) -> Checkpoints:
    """The checkpoints of the run, to be closed."""
    folder, config = session.workdir / run_folder.CHECKPOINTS, session.config
    return Checkpoints(folder, config.checkpoint, config, check_own)


def is_done(session: Session) -> bool:
    """Whether the run has ended at its last step, and that checkpoint is sound. If it is not, the run is done no more.

    A record without checkpoints is done. Process 0 calls this.
    """
    mark, checkpoints = session.workdir / run_folder.DONE, session.workdir / run_folder.CHECKPOINTS
    if not mark.exists():
        return False
    last = checkpoints / str(session.config.training.steps)
    found = fault_of(last, session.config) if any(checkpoints.glob("*")) else None
    if found:
        print(f"not done: {found}", flush=True)
        mark.unlink()
    return not found


def start_of(session: Session, lanes: int = 1) -> dict[str, Any]:
    """A start as a line of starts.jsonl, but for the step that it begins with."""
    facts: dict[str, Any] = {
        "mesh": dict(session.mesh.shape),
        "lanes": lanes,
        "num_params": count_params(session.model),
        "active_params": count_params(session.model, active=True),
        "flops_per_token": flops_per_token(session.model, session.config.data.seq_len),
    }
    return start_record("spannorm_jax.train", session.flags.argv, session.data, facts)


def announce(session: Session, start: dict[str, Any]) -> None:
    """Says what is about to run."""
    config, data = session.config, session.data
    active = f"{start['active_params']:,} active" if config.model.moe.num_experts else "all active"
    processes = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    distributed.print_once(
        f"{config.model.placement} / {init_of(config.model)}: {config.model.depth} blocks, width {config.model.width}, "
        f"{start['num_params']:,} parameters ({active}), {start['flops_per_token'] / 1e6:,.1f} MFLOP a token\n"
        f"{start['num_devices']} x {start['device']}{processes}, mesh {start['mesh']}, compute {config.model.dtype}, "
        f"{session.kernels}\n"
        f"data {data.train.dataset} ({config.data.tokenizer}), {data.train.num_tokens:,} training tokens, "
        f"fingerprint {config.data.fingerprint}"
    )
    say_overlap(config, data)


def advise(config: Config) -> None:
    """Says what a user should know of the config before its results are believed."""
    for notice in notices(config):
        distributed.print_once(f"warning: {notice}")


def first_state(session: Session, checkpoints: Checkpoints) -> tuple[int, TrainState]:
    """The step to begin with, and the state before it.

    Raises:
      UserError: there are checkpoints, and none is sound.
    """
    restored, faults = checkpoints.resume(session.workdir / run_folder.DAMAGED)
    for fault in faults:
        distributed.print_once(f"passed over a checkpoint: {fault}")
    if restored is None:
        return 1, session.program.init(session.config.seed)
    state = checkpoints.restore(restored, session.program.abstract_state)
    distributed.print_once(f"continuing after step {restored}")
    return restored + 1, state


def open_log(session: Session, start: dict[str, Any], first: int, wandb: Any) -> MetricsWriter | NoWriter:
    """Records the start, and returns the writer of the metrics from step `first` on."""
    config, workdir = session.config, session.workdir
    if not distributed.is_first():
        return NoWriter()
    append_line(workdir / run_folder.STARTS, start | {"first_step": first})
    (workdir / run_folder.DIVERGED).unlink(missing_ok=True)
    return open_writer(config, workdir, first - 1, wandb_log.open_run(wandb, config, workdir))


# ---- the steps --------------------------------------------------------------------------------


def measured_at(config: Config, step: int) -> bool:
    """Whether the held-out loss is due after a step."""
    every = config.eval.every_steps
    return bool(every) and (step % every == 0 or step == config.training.steps)


def saved_at(config: Config, step: int) -> bool:
    """Whether a checkpoint is due after a step."""
    every = config.checkpoint.every_steps
    return step == config.training.steps or bool(every and step % every == 0)


def save(
    config: Config, checkpoints: Checkpoints, writer: MetricsWriter | NoWriter, step: int, state: TrainState
) -> None:
    """Starts a save. The step's own metrics have been read: what is saved is known to be finite."""
    checkpoints.wait()  # which tells of a removed folder before the writer tells of its file
    writer.sync()
    checkpoints.save(step, state, {"step": step, "config": to_dict(config)})


# ---- the end ----------------------------------------------------------------------------------


def record_end(session: Session, checkpoints: Checkpoints) -> None:
    """Marks the run as done, once `checkpoints.finish` has read its last one and all is closed."""
    checkpoints.check_own()
    if distributed.is_first():
        write_json(session.workdir / run_folder.DONE, {"step": session.config.training.steps})
    distributed.print_once(f"done: {session.workdir}")


def record_divergence(workdir: Path, diverged: Diverged, checkpoints: Checkpoints) -> None:
    """Writes DIVERGED, and says which checkpoint is good.

    A step's numbers are of the weights before it: those that this step met are not good.
    """
    met = diverged.record["step"] - 1
    checkpoints.wait()
    good, _ = distributed.from_first(lambda: checkpoints.newest_sound(before=met))
    last = f"the last good checkpoint is step {good}" if good else "there is no good checkpoint"
    if met in checkpoints.steps():
        last += f" (that of step {met} holds the weights with which this happened)"
    distributed.print_once(f"stopped: {diverged}; {last}")  # first: there may be no room for the file
    if distributed.is_first():
        write_json(workdir / run_folder.DIVERGED, diverged.record | {"last_good_checkpoint": good})
