"""Runs side by side as lanes of one program, each with numbers, seed, folder and end of its own, as if alone.

The step is that of a single run under `vmap`: what a run has on the devices has a leading axis of K lanes here, and
nothing that a lane computes meets another's. So a lane that diverges makes itself NaN and no other, and lanes need not
stand at the same step: each turn takes every lane one step further from where it began. A lane that has ended stays in
the arrays, and what is computed for it is dropped.
"""

import sys
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
from spannorm_jax.errors import USER_ERROR_EXIT, UserError, one_line
from spannorm_jax.model.definition import ModelDef
from spannorm_jax.parallel.liveness import Stop, Watchdog, stop_signals
from spannorm_jax.parallel.mesh import LANE, partition_spec
from spannorm_jax.parallel.xla_options import xla_options
from spannorm_jax.run.state import TrainState
from spannorm_jax.training.batches import Batches, Span
from spannorm_jax.training.flags import Flags
from spannorm_jax.training.held_out import held_out
from spannorm_jax.training.numbers import Numbers, numbers_of, on_devices
from spannorm_jax.training.program_key import check_lanes
from spannorm_jax.training.record import Record, measured_at, saved_at
from spannorm_jax.training.session import Session, open_session
from spannorm_jax.training.signal import forward_signal
from spannorm_jax.training.step import Program, train_step
from spannorm_jax.training.step_log import Diverged
from spannorm_jax.training.task import Rows
from spannorm_jax.training.tasks import task_of
from spannorm_jax.training.turn import compile_turn

# ---- one lane -----------------------------------------------------------------------------------


class Lane:
    """A run among others: its record, and how far it is.

    Attributes:
      code: its exit code once it has ended, as `loop.train` returns it; None while it is at work.
    """

    def __init__(self, record: Record):
        self.record, self.session, self.config = record, record.session, record.config
        self.code: int | None = None

    @property
    def first(self) -> int:
        """The step that it began with; turn n takes it to step first + n."""
        return self.record.first

    @property
    def steps(self) -> int:
        return self.config.training.steps

    def rows(self, turn: int, start: int, stop: int) -> Rows:
        """Rows start..stop of its batch in a turn. A lane that has ended repeats its last batch."""
        return self.session.rows(min(self.first + turn, self.steps), start, stop)

    def takes_signal(self, turn: int) -> bool:
        """Whether the line of its step in a turn holds the early warnings."""
        return self.code is None and self.record.log.takes_signal(self.first + turn)

    def read(self, turn: int, metrics: dict[str, Any], measure: Callable[[], dict[str, float]] | None) -> None:
        """Logs a turn's step, with what `measure`, if given, finds of the weights after it. Divergence is an end."""
        self.record.log.dispatched(self.first + turn, metrics)
        try:
            self.record.log.read_previous(measure)
        except Diverged as diverged:
            with self._own_folder():
                self.code = self.record.diverged(diverged)

    def save(self, turn: int, state: TrainState) -> None:
        with self._own_folder():
            self.record.save(self.first + turn, state)

    def end(self, turn: int, stopped_by: str) -> None:
        """Ends the run, whose save has been started, if it has taken its last step or a signal stops all."""
        step = self.first + turn
        with self._own_folder():
            if step == self.steps:
                self.code = self.record.end()
            elif stopped_by:
                self.code = self.record.stop(step, stopped_by)

    @contextmanager
    def _own_folder(self) -> Iterator[None]:
        """A lane ends by what is wrong with its own folder, as it would alone; the others go on."""
        try:
            yield
        except UserError as error:
            self.record.end_line()
            print(f"error: {one_line(error)}", file=sys.stderr, flush=True)
            self.code = USER_ERROR_EXIT
            with suppress(UserError):  # said already
                self.record.close()


# ---- what they share on the devices -----------------------------------------------------------------


class LaneProgram:
    """The compiled functions of K lanes on a program's mesh; K is a multiple of its axis `lane`.

    stack(*states) -> state with a lane axis; train(state, batch, numbers) -> (state, metrics), which donates the
    state; signal(params, model_state, batch) -> `signal.forward_signal` of each lane; take(state, lane) ->
    the state of one lane, as a single run has it.
    """

    def __init__(self, config: Config, model: ModelDef, program: Program, num_lanes: int):
        """`config` is that of any of the lanes, and `program` what makes its single run."""
        mesh, shardings = program.mesh, jax.tree.map(lambda x: x.sharding, program.abstract_state)
        microbatch = config.training.batch_size // config.training.num_microbatches
        rows = microbatch * num_lanes // mesh.shape[LANE]  # of all lanes on a device
        task = task_of(config)
        signal = partial(forward_signal, model, task.inputs, config.training.num_microbatches)
        step = partial(train_step, config, model, task.loss_sums(config, dict(mesh.shape), rows))

        def laned(sharding: NamedSharding) -> NamedSharding:
            return NamedSharding(mesh, PartitionSpec(*partition_spec(("lanes",)), *sharding.spec))

        in_lanes = jax.tree.map(laned, shardings)
        replicated = NamedSharding(mesh, PartitionSpec())
        self.abstract_batch = {
            name: jax.ShapeDtypeStruct((num_lanes, *x.shape), x.dtype, sharding=laned(x.sharding))
            for name, x in program.abstract_batch.items()
        }
        self.batch_shardings = jax.tree.map(lambda x: x.sharding, self.abstract_batch)
        self.train = jax.jit(
            jax.vmap(step, spmd_axis_name=LANE),
            in_shardings=(in_lanes, self.batch_shardings, laned(replicated)),
            out_shardings=(in_lanes, replicated),
            donate_argnums=0,
            compiler_options=xla_options(mesh),
        )
        self.signal = jax.jit(
            jax.vmap(signal, spmd_axis_name=LANE),
            in_shardings=(in_lanes.params, in_lanes.model_state, self.batch_shardings),
            out_shardings=replicated,
            compiler_options=xla_options(mesh),
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
    sessions = [open_session(*run, lanes=len(runs)) for run in runs]
    with ExitStack() as opened:
        records = [opened.enter_context(Record(session, len(runs))) for session in sessions]
        stop = opened.enter_context(stop_signals())
        lanes = {record.workdir: Lane(record) for record in records if not record.is_done()}
        if lanes:
            _train(list(lanes.values()), stop)
        return [lanes[record.workdir].code or 0 if record.workdir in lanes else 0 for record in records]


def _train(lanes: Sequence[Lane], stop: Stop) -> None:
    """Trains all of them to their ends."""
    session = lanes[0].session
    mesh = session.mesh
    print(f"{len(lanes)} lanes of one program; what they share is said of the first, {session.workdir}")
    lanes[0].record.announce()
    with ExitStack() as running:
        running.enter_context(jax.set_mesh(mesh))
        watchdog = running.enter_context(closing(Watchdog(session.config.training.watchdog_minutes)))

        # ---- states: each lane's own, then all of them with a lane axis
        longest = max(lanes, key=lambda lane: lane.steps)  # whose progress is shown
        states = []
        for lane in lanes:
            print(f"lane {lane.session.workdir}", flush=True)
            states.append(lane.record.begin(silent=lane is not longest))
        watchdog.alive("the states were made")
        spare = -len(lanes) % mesh.shape[LANE]  # copies of the last lane, which fill the last devices
        seats = [*lanes, *lanes[-1:] * spare]
        program = LaneProgram(session.config, session.model, session.program, len(seats))
        state = program.stack(*states, *states[-1:] * spare)
        del states
        for lane in lanes:
            lane.end(-1, "")  # one whose last save was committed, and nothing after it
        if not _at_work(lanes):
            return
        numbers = on_devices(stacked_numbers([lane.config for lane in seats]), mesh, ("lanes",))
        turns = max(lane.steps - lane.first + 1 for lane in lanes)
        batches = running.enter_context(closing(_batches(program, seats, turns)))
        turn = compile_turn(program, state, batches, numbers, bool(session.config.metrics.signal_every))
        watchdog.alive("the step was compiled")

        # ---- turns: a step of every lane
        for lane in lanes:
            lane.record.log.start()
        pending: tuple[int, Any] | None = None  # the turn whose metrics are still to be read
        for n in range(turns):
            with jax.transfer_guard("disallow"):
                state, metrics = turn(n, state, any(lane.takes_signal(n) for lane in lanes))
                if pending:
                    _read(lanes, *pending)  # waits for the turn before, while the device works on this one
            watchdog.alive(f"turn {n - 1} of the lanes")
            pending = n, metrics
            stopped_by = stop.at(n)
            saved = [i for i, lane in _at_work(lanes) if stopped_by or saved_at(lane.config, lane.first + n)]
            measured = [i for i, lane in _at_work(lanes) if measured_at(lane.config, lane.first + n)]
            if saved or measured:
                measures = {i: partial(_measure, program, session, lanes[i], state, i) for i in measured}
                _read(lanes, *pending, measures)
                pending = None
                for i, lane in _at_work(lanes):
                    if i in saved:  # and has not diverged
                        lane.save(n, program.take(state, i))
                watchdog.alive(f"what was due after turn {n}")
                for _, lane in _at_work(lanes):
                    lane.end(n, stopped_by)
            if not _at_work(lanes):
                break


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
    """Those of all lanes, (K, B, ...), one a turn."""

    def read(turn: int, lane_span: Span, rows: Span) -> Rows:
        each = [lane.rows(turn, *rows) for lane in lanes[slice(*lane_span)]]
        return jax.tree.map(lambda *xs: np.stack(xs), *each)

    return Batches(program.abstract_batch, read, range(turns), leading=2)
