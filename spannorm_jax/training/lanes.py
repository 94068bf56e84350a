"""Runs side by side as lanes of one program, each with numbers, seed, folder and end of its own, as if alone.

The step is that of a single run under `vmap`: what a run has on the devices has a leading axis of K lanes here, and
nothing that a lane computes meets another's. So a lane that diverges makes itself NaN and no other, and lanes need not
stand at the same step: each turn takes every lane one step further from where it began. A lane that has ended stays in
the arrays, and what is computed for it is dropped.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from spannorm_jax.config import Config
from spannorm_jax.errors import DIVERGED_EXIT, USER_ERROR_EXIT, UserError, one_line
from spannorm_jax.model.definition import ModelDef
from spannorm_jax.parallel.liveness import Stop, Watchdog, stop_signals
from spannorm_jax.parallel.mesh import LANE, partition_spec
from spannorm_jax.run.state import TrainState
from spannorm_jax.training import record
from spannorm_jax.training.batches import Batches, Index
from spannorm_jax.training.flags import Flags
from spannorm_jax.training.held_out import held_out
from spannorm_jax.training.numbers import Numbers, numbers_of, on_devices
from spannorm_jax.training.program_key import check_lanes
from spannorm_jax.training.session import Session
from spannorm_jax.training.signal import forward_signal
from spannorm_jax.training.step import Program, num_loss_chunks, train_step
from spannorm_jax.training.step_log import Diverged, Progress, StepLog

# ---- one lane -----------------------------------------------------------------------------------


class Lane:
    """A run among others: its folder, and how far it is.

    Attributes:
      first: the step that it began with; turn n takes it to step first + n.
      code: its exit code once it has ended, as `loop.train` returns it; None while it is at work.
    """

    def __init__(self, session: Session, check_own: Callable[[], None], lanes: int):
        """Opens the run's checkpoints. `start` must follow, and `close`, also after an error."""
        self.session, self.config = session, session.config
        self.first = 1
        self.code: int | None = None
        self._lanes, self._open = lanes, ExitStack()
        self._checkpoints = self._open.enter_context(closing(record.open_checkpoints(session, check_own)))

    @property
    def steps(self) -> int:
        return self.config.training.steps

    def start(self, silent: bool) -> TrainState:
        """Records the start, and returns the state to begin with, which has no lane axis."""
        print(f"lane {self.session.workdir}", flush=True)
        record.advise(self.config)
        self.first, state = record.first_state(self.session, self._checkpoints)
        start = record.start_of(self.session, self._lanes)
        self._writer = self._open.enter_context(closing(record.open_log(self.session, start, self.first, None)))
        self._progress = Progress(self.steps, self.config.metrics.console_every_s, silent)
        self._log = StepLog(self.session, self._writer, self._progress)
        return state

    def rows(self, turn: int, start: int, stop: int) -> np.ndarray:
        """Of its batch in a turn, int32 (stop - start, T + 1); after its end those of its last step again."""
        return self.session.loader.rows(min(self.first + turn, self.steps), start, stop)

    def takes_signal(self, turn: int) -> bool:
        """Whether the line of its step in a turn holds the early warnings."""
        return self.code is None and self._log.takes_signal(self.first + turn)

    def read(self, turn: int, metrics: dict[str, Any], measure: Callable[[], dict[str, float]] | None) -> None:
        """Logs a turn's step, with what `measure`, if given, finds of the weights after it. Divergence is an end."""
        self._log.dispatched(self.first + turn, metrics)
        try:
            self._log.read_previous(measure)
        except Diverged as diverged:
            with self._own_folder():
                self._progress.end_line()
                record.record_divergence(self.session.workdir, diverged, self._checkpoints)
                self.close()
                self.code = DIVERGED_EXIT

    def save(self, turn: int, state: TrainState) -> None:
        with self._own_folder():
            record.save(self.config, self._checkpoints, self._writer, self.first + turn, state)

    def end(self, turn: int, stopped_by: str) -> None:
        """Ends the run, whose save has been started, if it has taken its last step or a signal stops all."""
        step = self.first + turn
        if step < self.steps and not stopped_by:
            return
        with self._own_folder():
            self._progress.end_line()
            if step == self.steps:
                self._checkpoints.finish(step)
                self.close()
                record.record_end(self.session, self._checkpoints)
                self.code = 0
            else:
                self._checkpoints.wait()
                self.close()
                print(f"stopped by {stopped_by}, {self.session.workdir} saved at step {step}; the same command goes on")
                self.code = self.session.flags.stop_code

    @contextmanager
    def _own_folder(self) -> Iterator[None]:
        """A lane ends by what is wrong with its own folder, as it would alone; the others go on."""
        try:
            yield
        except UserError as error:
            self._progress.end_line()
            print(f"error: {one_line(error)}", file=sys.stderr, flush=True)
            self.code = USER_ERROR_EXIT
            with suppress(UserError):  # said already
                self.close()

    def close(self) -> None:
        self._open.close()


# ---- what they share on the devices -----------------------------------------------------------------


class LaneProgram:
    """The compiled functions of K lanes on a program's mesh; K is a multiple of its axis `lane`.

    stack(*states) -> state with a lane axis; train(state, tokens_KxBxT1, numbers) -> (state, metrics), which donates
    the state; signal(params, model_state, tokens_KxBxT1) -> `signal.forward_signal` of each lane; take(state, lane) ->
    the state of one lane, as a single run has it.
    """

    def __init__(self, config: Config, model: ModelDef, program: Program, num_lanes: int):
        """`config` is that of any of the lanes, and `program` what makes its single run."""
        mesh, shardings = program.mesh, jax.tree.map(lambda x: x.sharding, program.abstract_state)
        microbatch = config.training.batch_size // config.training.num_microbatches
        rows = microbatch * num_lanes // mesh.shape[LANE]  # of all lanes on a device
        step = partial(train_step, config, model, num_loss_chunks(config, dict(mesh.shape), rows))

        def laned(sharding: NamedSharding) -> NamedSharding:
            return NamedSharding(mesh, PartitionSpec(*partition_spec(("lanes",)), *sharding.spec))

        in_lanes = jax.tree.map(laned, shardings)
        replicated = NamedSharding(mesh, PartitionSpec())
        self.batch_sharding = laned(program.batch_sharding)
        self.train = jax.jit(
            jax.vmap(step, spmd_axis_name=LANE),
            in_shardings=(in_lanes, self.batch_sharding, laned(replicated)),
            out_shardings=(in_lanes, replicated),
            donate_argnums=0,
        )
        self.signal = jax.jit(
            jax.vmap(partial(forward_signal, model, config.training.num_microbatches), spmd_axis_name=LANE),
            in_shardings=(in_lanes.params, in_lanes.model_state, self.batch_sharding),
            out_shardings=replicated,
        )
        self.stack = jax.jit(lambda *states: jax.tree.map(lambda *xs: jnp.stack(xs), *states), out_shardings=in_lanes)
        self.take = jax.jit(
            lambda state, lane: jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, lane, keepdims=False), state),
            out_shardings=shardings,
        )


def stacked_numbers(configs: Sequence[Config]) -> Numbers:
    """Those of the lanes, (K,) each, on the host."""
    return jax.tree.map(lambda *xs: np.stack(xs), *map(numbers_of, configs))


# ---- the story ------------------------------------------------------------------------------------


def train_lanes(runs: Sequence[tuple[Config, Path, Flags]]) -> list[int]:
    """Trains each run as `loop.train` does, and returns their exit codes; JAX has started, in one process.

    A run may have begun alone, and may go on alone. A signal saves and stops all of them.

    Raises:
      UserError: they cannot be lanes of one program, or one of them does not fit the machine, the data or its folder.
    """
    if jax.process_count() > 1:
        raise UserError("lanes are for one process, and this is one of several; train the runs one by one")
    check_lanes({workdir.name: config for config, workdir, _ in runs})
    sessions = [record.open_session(*run, lanes=len(runs)) for run in runs]
    with ExitStack() as opened:
        checks = [record.open_folder(opened, session)[0] for session in sessions]
        stop = opened.enter_context(stop_signals())
        left = [
            (session, check_own)
            for session, check_own in zip(sessions, checks, strict=True)
            if not record.is_done(session)
        ]
        codes = {lane.session.workdir: lane.code for lane in _train(left, stop)} if left else {}
        return [codes.get(session.workdir) or 0 for session in sessions]


def _train(sessions: Sequence[tuple[Session, Callable[[], None]]], stop: Stop) -> list[Lane]:
    """Trains all of them to their ends. Beside each is what tells whether its folder is still its own."""
    session = sessions[0][0]
    mesh = session.mesh
    print(f"{len(sessions)} lanes of one program; what they share is said of the first, {session.workdir}")
    record.announce(session, record.start_of(session, len(sessions)))
    with ExitStack() as running:
        running.enter_context(jax.set_mesh(mesh))
        watchdog = running.enter_context(closing(Watchdog(session.config.training.watchdog_minutes)))
        lanes = [running.enter_context(closing(Lane(*each, len(sessions)))) for each in sessions]

        # ---- states: each lane's own, then all of them with a lane axis
        longest = max(lanes, key=lambda lane: lane.steps)  # whose progress is shown
        states = [lane.start(silent=lane is not longest) for lane in lanes]
        watchdog.alive("the states were made")
        spare = -len(lanes) % mesh.shape[LANE]  # copies of the last lane, which fill the last devices
        seats = [*lanes, *lanes[-1:] * spare]
        program = LaneProgram(session.config, session.model, session.program, len(seats))
        state = program.stack(*states, *states[-1:] * spare)
        del states
        for lane in lanes:
            lane.end(-1, "")  # one whose last save was committed, and nothing after it
        if not _at_work(lanes):
            return lanes
        numbers = on_devices(stacked_numbers([lane.config for lane in seats]), mesh, ("lanes",))
        turns = max(lane.steps - lane.first + 1 for lane in lanes)
        batches = running.enter_context(closing(_batches(program, seats, turns)))

        # ---- turns: a step of every lane
        began = time.monotonic()
        step = program.train.lower(state, batches.abstract, numbers).compile()
        if session.config.metrics.signal_every:
            signal = program.signal.lower(state.params, state.model_state, batches.abstract).compile()
        print(f"compiled in {time.monotonic() - began:.1f} s", flush=True)
        watchdog.alive("the step was compiled")
        pending: tuple[int, Any] | None = None  # the turn whose metrics are still to be read
        for turn in range(turns):
            with jax.transfer_guard("disallow"):
                with jax.profiler.StepTraceAnnotation("train", step_num=turn):
                    batch = next(batches)
                    seen = {}
                    if any(lane.takes_signal(turn) for lane in lanes):  # as in `loop.train`
                        seen = jax.block_until_ready(signal(state.params, state.model_state, batch))
                    state, metrics = step(state, batch, numbers)
                    metrics["signal"] |= seen
                if pending:
                    _read(lanes, *pending)  # waits for the turn before, while the device works on this one
            watchdog.alive(f"turn {turn - 1} of the lanes")
            pending = turn, metrics
            stopped_by = stop.at(turn)
            saved = [i for i, lane in _at_work(lanes) if stopped_by or record.saved_at(lane.config, lane.first + turn)]
            measured = [i for i, lane in _at_work(lanes) if record.measured_at(lane.config, lane.first + turn)]
            if saved or measured:
                measures = {i: partial(_measure, program, session, lanes[i], state, i) for i in measured}
                _read(lanes, *pending, measures)
                pending = None
                for i, lane in _at_work(lanes):
                    if i in saved:  # and has not diverged
                        lane.save(turn, program.take(state, i))
                watchdog.alive(f"what was due after turn {turn}")
                for _, lane in _at_work(lanes):
                    lane.end(turn, stopped_by)
            if not _at_work(lanes):
                break
        return lanes


def _at_work(lanes: Sequence[Lane]) -> list[tuple[int, Lane]]:
    return [(i, lane) for i, lane in enumerate(lanes) if lane.code is None]


def _read(lanes: Sequence[Lane], turn: int, metrics: Any, measures: dict[int, Any] | None = None) -> None:
    """Brings a turn's metrics to the host, those of all lanes at once, and logs them."""
    values = jax.device_get(metrics)
    for i, lane in _at_work(lanes):
        lane.read(turn, jax.tree.map(lambda x, i=i: x[i], values), (measures or {}).get(i))


def _measure(program: LaneProgram, session: Session, lane: Lane, state: TrainState, i: int) -> dict[str, float]:
    """The held-out loss of a lane, on its own data; `session` is the one whose program measures for all."""
    own = program.take(state, i)
    return held_out(lane.config, session.mesh, session.program.evaluate, lane.session.data, own.params, own.model_state)


def _batches(program: LaneProgram, lanes: Sequence[Lane], turns: int) -> Batches:
    """Int32 (K, B, T + 1), one a turn."""
    config = lanes[0].config
    shape = (len(lanes), config.training.batch_size, config.data.seq_len + 1)

    def read(turn: int, index: Index) -> np.ndarray:
        start, stop, _ = index[1].indices(shape[1])
        return np.stack([lane.rows(turn, start, stop) for lane in lanes[index[0]]])

    return Batches(jax.ShapeDtypeStruct(shape, "int32", sharding=program.batch_sharding), read, range(turns))
