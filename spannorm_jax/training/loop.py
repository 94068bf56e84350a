"""The training story, straight from top to bottom."""

import time
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import jax

from spannorm_jax.config import Config, replace, to_dict
from spannorm_jax.data.open import say_overlap
from spannorm_jax.durable import append_line, write_json, write_text
from spannorm_jax.errors import DIVERGED_EXIT, UserError
from spannorm_jax.model.definition import count_params, flops_per_token
from spannorm_jax.parallel import distributed, place
from spannorm_jax.parallel.liveness import Watchdog, in_step, stop_signals
from spannorm_jax.parallel.platform import start_jax
from spannorm_jax.run import folder as run_folder
from spannorm_jax.run import wandb_log
from spannorm_jax.run.checkpoint import Checkpoints
from spannorm_jax.run.metrics import open_writer
from spannorm_jax.run.provenance import check_agreement, start_record
from spannorm_jax.run.state import TrainState
from spannorm_jax.training.batches import Batches
from spannorm_jax.training.flags import Flags, check_steps
from spannorm_jax.training.held_out import held_out
from spannorm_jax.training.profiling import StepTrace
from spannorm_jax.training.session import Session, match_machine
from spannorm_jax.training.step_log import Diverged, Progress, StepLog
from spannorm_jax.validation import notices


def train(config: Config, workdir: Path, flags: Flags, processes: place.Flags) -> int:
    """Trains to `training.steps`, a signal or a non-finite number: 0, `flags.stop_code` or 3.

    Started again with the same config and folder, it goes on from the newest committed checkpoint.
    `flags.profile_steps` are traced by the profiler, as far as they are still to come. Of several
    `processes`, process 0 writes the folder and the console. Each of them reads its own rows of a
    batch and writes its part of the checkpoints.

    Raises:
      UserError: the config does not fit the devices, the data, the folder or the other processes;
        nothing is written then.
    """
    # ---- this machine, and the run's folder
    start_jax(config.platform, processes)
    distributed.check_devices()
    full_name = distributed.from_first(lambda: run_folder.data_opened_as(workdir, config))
    config = replace(config, data__full_name=full_name)
    session = distributed.run_on_all(lambda: match_machine(config, workdir, flags))
    config, program, numbers, steps = session.config, session.program, session.numbers, session.config.training.steps
    check_steps(flags.profile_steps, steps)
    check_agreement(config)
    first_process = distributed.is_first()
    with ExitStack() as opened:
        wandb = distributed.run_on_all(lambda: _open_folder(opened, session))
        stop = opened.enter_context(stop_signals())
        if distributed.from_first((workdir / run_folder.DONE).exists):
            distributed.print_once(f"{workdir} is done already (step {steps})")
            return 0
        start = _announce(session)

        with ExitStack() as running:
            running.enter_context(jax.set_mesh(session.mesh))
            watchdog = running.enter_context(closing(Watchdog(config.training.watchdog_minutes)))
            folder = workdir / run_folder.CHECKPOINTS
            checkpoints = running.enter_context(closing(Checkpoints(folder, config.checkpoint)))
            running.enter_context(in_step())  # where a process that is lost meanwhile is told apart

            # ---- state: the newest sound checkpoint, or a new one
            first, state = _first_state(session, checkpoints)
            watchdog.alive("the state was made")
            if first_process:
                append_line(workdir / run_folder.STARTS, start | {"first_step": first})
                (workdir / run_folder.DIVERGED).unlink(missing_ok=True)
            wandb_run = wandb_log.open_run(wandb, config, workdir) if first_process else None
            writer = running.enter_context(closing(open_writer(config, workdir, first - 1, wandb_run)))
            batches = running.enter_context(closing(Batches(session, range(first, steps + 1))))
            traced = flags.profile_steps if first_process else range(0)
            trace = running.enter_context(closing(StepTrace(traced, first, workdir / run_folder.PROFILE)))

            # ---- steps
            began = time.monotonic()
            train_step = program.train.lower(state, batches.abstract, numbers).compile()
            distributed.print_once(f"compiled in {time.monotonic() - began:.1f} s")
            watchdog.alive("the step was compiled")
            # Gloo gives the processes 30 s to meet in a first collective: none may still be compiling then.
            distributed.run_on_all(lambda: None)
            progress = Progress(steps, config.metrics.console_every_s, silent=not first_process)
            log = StepLog(session, writer, progress)
            eval_every = config.eval.every_steps
            measure = partial(held_out, config, session.mesh, program.evaluate, session.data)
            try:
                for step in range(first, steps + 1):
                    trace.before(step, state)
                    with jax.transfer_guard("disallow"):  # an implicit transfer would be a wait that nobody sees
                        with jax.profiler.StepTraceAnnotation("train", step_num=step):
                            state, metrics = train_step(state, next(batches), numbers)
                        trace.after(step, state)
                        log.read_previous()  # waits for the step before, while the device works on this one
                    watchdog.alive(f"step {step - 1}")
                    log.dispatched(step, metrics)
                    if eval_every and (step % eval_every == 0 or step == steps):
                        log.read_previous(partial(measure, state.params, state.router))
                        watchdog.alive(f"the held-out loss of step {step}")
                    due = config.checkpoint.every_steps and step % config.checkpoint.every_steps == 0
                    stopped_by = stop.at(step)
                    if due or stopped_by or step == steps:
                        log.read_previous()  # a state is saved only when its own step is known to be finite
                        writer.sync()
                        checkpoints.save(step, state, {"step": step, "config": to_dict(config)})
                    if stopped_by and step < steps:
                        progress.end_line()
                        checkpoints.wait()
                        distributed.print_once(
                            f"stopped by {stopped_by}, saved at step {step}; the same command goes on"
                        )
                        return flags.stop_code
                checkpoints.wait()
            except Diverged as diverged:
                progress.end_line()
                checkpoints.wait()
                _record_divergence(workdir, diverged, checkpoints.steps())
                return DIVERGED_EXIT
        if first_process:
            write_json(workdir / run_folder.DONE, {"step": steps})
        distributed.print_once(f"done: {workdir}")
        return 0


def _open_folder(stack: ExitStack, session: Session) -> Any:
    """Opens the run's folder on process 0, and returns wandb there if it is asked for.

    Raises:
      UserError: process 0 cannot open the folder, or another process does not see it.
    """
    config, workdir = session.config, session.workdir
    if distributed.is_first():
        wandb = wandb_log.load(config)
        stack.enter_context(run_folder.open_run(workdir, config))
        if session.data.tokenizer.source:
            write_text(workdir / run_folder.TOKENIZER, session.data.tokenizer.source)
        return wandb
    if not (workdir / run_folder.CONFIG).exists():
        raise UserError(f"--workdir {workdir} is not shared: process 0 has opened it, and it is not here; share it")
    return None


def _announce(session: Session) -> dict[str, Any]:
    """Says what is about to run, and returns it as a line of starts.jsonl."""
    config, model, data = session.config, session.model, session.data
    facts: dict[str, Any] = {
        "mesh": dict(session.mesh.shape),
        "num_params": count_params(model),
        "active_params": count_params(model, active=True),
        "flops_per_token": flops_per_token(model, config.data.seq_len),
    }
    start = start_record("spannorm_jax.train", session.flags.argv, data, facts)
    active = f"{facts['active_params']:,} active" if config.model.moe.num_experts else "all active"
    processes = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    distributed.print_once(
        f"{config.model.placement} / {config.model.init}: {config.model.depth} blocks, width {config.model.width}, "
        f"{facts['num_params']:,} parameters ({active}), {facts['flops_per_token'] / 1e6:,.1f} MFLOP a token\n"
        f"{start['num_devices']} x {start['device']}{processes}, mesh {facts['mesh']}, compute {config.model.dtype}, "
        f"{session.kernels}\n"
        f"data {data.train.dataset} ({config.data.tokenizer}), {data.train.num_tokens:,} training tokens, "
        f"fingerprint {config.data.fingerprint}"
    )
    say_overlap(config, data)
    for notice in notices(config):
        distributed.print_once(f"warning: {notice}")
    return start


def _first_state(session: Session, checkpoints: Checkpoints) -> tuple[int, TrainState]:
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


def _record_divergence(workdir: Path, diverged: Diverged, kept: list[int]) -> None:
    """Writes DIVERGED, and says which of the `kept` checkpoints is good.

    A step's numbers are of the weights before it: those that this step met are not good.
    """
    met = diverged.record["step"] - 1
    good = max((saved for saved in kept if saved < met), default=None)
    last = f"the last good checkpoint is step {good}" if good else "there is no good checkpoint"
    if met in kept:
        last += f" (that of step {met} holds the weights with which this happened)"
    if distributed.is_first():
        write_json(workdir / run_folder.DIVERGED, diverged.record | {"last_good_checkpoint": good})
    distributed.print_once(f"stopped: {diverged}; {last}")
