"""The training story, straight from top to bottom."""

from collections.abc import Callable
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

import jax

from spannorm_jax.config import Config
from spannorm_jax.parallel import distributed
from spannorm_jax.parallel.liveness import Watchdog, in_step, stop_signals
from spannorm_jax.parallel.platform import start_jax
from spannorm_jax.parallel.rank import ProcessFlags
from spannorm_jax.run.folder import PROFILE
from spannorm_jax.run.provenance import check_agreement
from spannorm_jax.training.batches import batches_of
from spannorm_jax.training.flags import Flags, check_steps
from spannorm_jax.training.held_out import held_out
from spannorm_jax.training.profiling import StepTrace
from spannorm_jax.training.record import Record, measured_at, saved_at
from spannorm_jax.training.session import Session, open_session
from spannorm_jax.training.step_log import Diverged
from spannorm_jax.training.turn import compile_turn


def train(
    config: Config,
    workdir: Path,
    flags: Flags,
    processes: ProcessFlags,
    change: Callable[[Session], Session] = lambda session: session,
) -> int:
    """Trains to `training.steps`, a signal or a non-finite number: 0, `flags.stop_code` or 3.

    Started again with the same config and folder, it goes on from the newest committed checkpoint.
    `flags.profile_steps` are traced by the profiler, as far as they are still to come. Of several
    `processes`, process 0 writes the folder and the console. Each of them reads its own rows of a
    batch and writes its part of the checkpoints. An experiment may `change` the step.

    Raises:
      UserError: the config does not fit the devices, the data or the folder, and nothing is written; or it is not the
        other processes' config or folder.
    """
    # ---- this machine, and the run's folder
    start_jax(config.platform, processes)
    distributed.check_devices()
    session = change(open_session(config, workdir, flags))
    config, program, steps = session.config, session.program, session.config.training.steps
    check_steps(flags.profile_steps, steps)
    check_agreement(config)
    first_process = distributed.is_first()
    with ExitStack() as running:
        record = running.enter_context(Record(session))
        stop = running.enter_context(stop_signals())
        if record.is_done():
            distributed.print_once(f"{workdir} is done already (step {steps})")
            return 0
        record.announce()
        running.enter_context(jax.set_mesh(session.mesh))
        watchdog = running.enter_context(closing(Watchdog(config.training.watchdog_minutes)))
        running.enter_context(in_step())  # where a process that is lost meanwhile is told apart

        # ---- state: the newest sound checkpoint, or a new one
        state = record.begin(silent=not first_process)
        watchdog.alive("the state was made")
        batches = running.enter_context(closing(batches_of(session, range(record.first, steps + 1))))
        traced = flags.profile_steps if first_process else range(0)
        trace = running.enter_context(closing(StepTrace(traced, record.first, workdir / PROFILE)))
        turn = compile_turn(program, state, batches, session.numbers, bool(config.metrics.signal_every))
        watchdog.alive("the step was compiled")
        # Gloo gives the processes 30 s to meet in a first collective: none may still be compiling then.
        distributed.run_on_all(lambda: None)

        # ---- steps
        log = record.log
        log.start()
        measure = partial(held_out, config, session.mesh, program.evaluate, session.data)
        try:
            for step in range(record.first, steps + 1):
                trace.before(step, state)
                with jax.transfer_guard("disallow"):  # an implicit transfer would be a wait that nobody sees
                    state, metrics = turn(step, state, log.takes_signal(step))
                    trace.after(step, state)
                    log.read_previous()  # waits for the step before, while the device works on this one
                watchdog.alive(f"step {step - 1}")
                log.dispatched(step, metrics)
                if measured_at(config, step):
                    log.read_previous(partial(measure, state.params, state.model_state))
                    watchdog.alive(f"the held-out loss of step {step}")
                stopped_by = stop.at(step)
                if stopped_by or saved_at(config, step):
                    log.read_previous()  # a state is saved only when its own step is known to be finite
                    record.save(step, state)
                if stopped_by and step < steps:
                    return record.stop(step, stopped_by)
            return record.end()
        except Diverged as diverged:
            return record.diverged(diverged)
