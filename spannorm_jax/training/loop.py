"""The training story, straight from top to bottom."""

import time
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

import jax

from spannorm_jax.config import Config
from spannorm_jax.errors import DIVERGED_EXIT
from spannorm_jax.parallel import distributed, place
from spannorm_jax.parallel.liveness import Watchdog, in_step, stop_signals
from spannorm_jax.parallel.platform import start_jax
from spannorm_jax.run import folder as run_folder
from spannorm_jax.run.provenance import check_agreement
from spannorm_jax.training import record
from spannorm_jax.training.batches import batches_of
from spannorm_jax.training.flags import Flags, check_steps
from spannorm_jax.training.held_out import held_out
from spannorm_jax.training.profiling import StepTrace
from spannorm_jax.training.step_log import Diverged, Progress, StepLog


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
    session = record.open_session(config, workdir, flags)
    config, program, numbers, steps = session.config, session.program, session.numbers, session.config.training.steps
    check_steps(flags.profile_steps, steps)
    check_agreement(config)
    first_process = distributed.is_first()
    with ExitStack() as opened:
        check_own, wandb = distributed.run_on_all(lambda: record.open_folder(opened, session))
        stop = opened.enter_context(stop_signals())
        if distributed.from_first(lambda: record.is_done(session)):
            distributed.print_once(f"{workdir} is done already (step {steps})")
            return 0
        start = record.start_of(session)
        record.announce(session, start)
        record.advise(config)

        with ExitStack() as running:
            running.enter_context(jax.set_mesh(session.mesh))
            watchdog = running.enter_context(closing(Watchdog(config.training.watchdog_minutes)))
            checkpoints = running.enter_context(closing(record.open_checkpoints(session, check_own)))
            running.enter_context(in_step())  # where a process that is lost meanwhile is told apart

            # ---- state: the newest sound checkpoint, or a new one
            first, state = record.first_state(session, checkpoints)
            watchdog.alive("the state was made")
            writer = running.enter_context(closing(record.open_log(session, start, first, wandb)))
            batches = running.enter_context(closing(batches_of(session, range(first, steps + 1))))
            traced = flags.profile_steps if first_process else range(0)
            trace = running.enter_context(closing(StepTrace(traced, first, workdir / run_folder.PROFILE)))

            # ---- steps
            began = time.monotonic()
            train_step = program.train.lower(state, batches.abstract, numbers).compile()
            if config.metrics.signal_every:
                forward_signal = program.signal.lower(state.params, state.model_state, batches.abstract).compile()
            distributed.print_once(f"compiled in {time.monotonic() - began:.1f} s")
            watchdog.alive("the step was compiled")
            # Gloo gives the processes 30 s to meet in a first collective: none may still be compiling then.
            distributed.run_on_all(lambda: None)
            progress = Progress(steps, config.metrics.console_every_s, silent=not first_process)
            log = StepLog(session, writer, progress)
            measure = partial(held_out, config, session.mesh, program.evaluate, session.data)
            try:
                for step in range(first, steps + 1):
                    trace.before(step, state)
                    with jax.transfer_guard("disallow"):  # an implicit transfer would be a wait that nobody sees
                        with jax.profiler.StepTraceAnnotation("train", step_num=step):
                            batch = next(batches)
                            if log.takes_signal(step):  # before the step, which donates the weights
                                # Two programs at once may wait for ever, each for devices that the other holds.
                                seen = jax.block_until_ready(forward_signal(state.params, state.model_state, batch))
                            state, metrics = train_step(state, batch, numbers)
                            if log.takes_signal(step):
                                metrics["signal"] |= seen
                        trace.after(step, state)
                        log.read_previous()  # waits for the step before, while the device works on this one
                    watchdog.alive(f"step {step - 1}")
                    log.dispatched(step, metrics)
                    if record.measured_at(config, step):
                        log.read_previous(partial(measure, state.params, state.model_state))
                        watchdog.alive(f"the held-out loss of step {step}")
                    stopped_by = stop.at(step)
                    if stopped_by or record.saved_at(config, step):
                        log.read_previous()  # a state is saved only when its own step is known to be finite
                        record.save(config, checkpoints, writer, step, state)
                    if stopped_by and step < steps:
                        progress.end_line()
                        checkpoints.wait()
                        distributed.print_once(
                            f"stopped by {stopped_by}, saved at step {step}; the same command goes on"
                        )
                        return flags.stop_code
                checkpoints.finish(steps)
            except Diverged as diverged:
                progress.end_line()
                record.record_divergence(workdir, diverged, checkpoints)
                return DIVERGED_EXIT
        record.record_end(session, checkpoints)
        return 0
