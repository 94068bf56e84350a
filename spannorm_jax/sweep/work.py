"""Trains and evaluates runs of a sweep in this process, through the command lines that a user would type.

One by one, or as lanes of one program: then they are trained together, and evaluated one by one.
"""

import contextlib
import traceback
from collections.abc import Sequence
from pathlib import Path

from spannorm_jax import evaluate, train
from spannorm_jax.durable import InUse, disk_at_fault
from spannorm_jax.errors import UserError, one_line
from spannorm_jax.parallel import distributed
from spannorm_jax.run.folder import EVAL
from spannorm_jax.sweep.expansion import Run
from spannorm_jax.sweep.records import ENDED, FAILED, RUNNING, STOPPED, STOPPED_EXIT, RunPlace, write_asked


def work(
    run: Run, place: RunPlace, *, retry: bool, wait: bool = False, processes: Sequence[str] = ()
) -> tuple[str, str]:
    """Does what is left of a run, and returns its state and, if it has failed, the reason.

    A failure is recorded, with its traceback in what is printed. JAX has started (`platform.start_jax`).
    Every process of a run calls this; process 0 keeps the records.

    Args:
      retry: try a run that has failed again; otherwise it stays failed.
      wait: for another process that is at work on the run, rather than raise.
      processes: flags of `command.add_flags`, as for `spannorm_jax.train`.

    Raises:
      InUse: another process is at work on the run.
      UserError: the disk is full, or the like: no failure of the run, which goes on once that is mended.
    """
    with contextlib.ExitStack() as held:
        distributed.from_first(lambda: held.enter_context(place.claim(wait)))
        state = distributed.from_first(lambda: _begin(run, place, retry))
        if state in (*ENDED, FAILED):
            return state, distributed.from_first(place.failure)
        return _go_on(run, place, processes)


def work_in_lanes(runs: Sequence[Run], out: Path, *, retry: bool) -> list[tuple[str, str]]:
    """Does what is left of runs of one program, and returns of each what `work` does, in their order.

    A run that another runner is at work on is left out: its state is RUNNING. What is printed goes to
    the runs' logs; of what they do together, to the first one's. If they cannot be trained together,
    each is trained alone, so that only the one at fault fails.

    Raises:
      UserError: as for `work`.
    """
    ends: dict[str, tuple[str, str]] = {}
    places = {run.name: RunPlace(out, run.name) for run in runs}
    with contextlib.ExitStack() as held:
        for run in runs:
            place = places[run.name]
            try:
                held.enter_context(place.claim())
            except InUse as error:
                ends[run.name] = RUNNING, str(error)
                continue
            state = _begin(run, place, retry)
            if state in (*ENDED, FAILED):
                ends[run.name] = state, place.failure()
        left = [run for run in runs if run.name not in ends]
        together = [run for run in left if not places[run.name].trained()]
        if len(together) > 1 and _stopped_in_lanes(together, places):
            ends |= {run.name: (STOPPED, "") for run in left}
        for run in left:
            if run.name not in ends:
                with places[run.name].printing():
                    try:
                        ends[run.name] = _go_on(run, places[run.name], ())
                    except InUse as error:
                        ends[run.name] = RUNNING, str(error)
    return [ends[run.name] for run in runs]


def _stopped_in_lanes(runs: Sequence[Run], places: dict[str, RunPlace]) -> bool:
    """Trains claimed runs as lanes, as far as that can be done; whether a signal has stopped them."""
    from spannorm_jax.training.lanes import train_lanes

    first, *others = (places[run.name] for run in runs)
    for place in others:
        with place.printing():
            print(f"trained as a lane; what is printed stands in {first.log}", flush=True)
    with first.printing():
        try:
            commands = [train.parse(_argv(run, places[run.name])) for run in runs]
            codes = train_lanes([(config, workdir, flags) for config, workdir, flags, _ in commands])
            return STOPPED_EXIT in codes
        except Exception as error:
            if disk_at_fault(error):
                raise
            if not isinstance(error, UserError):
                traceback.print_exc()
            print(f"these {len(runs)} runs cannot be trained as lanes, and are trained alone: {one_line(error)}")
    return False


def _go_on(run: Run, place: RunPlace, processes: Sequence[str]) -> tuple[str, str]:
    """`work` on a run that is claimed and begun. A failure is recorded."""
    try:
        if not _train_and_evaluate(run, place, processes):
            return STOPPED, ""
    except Exception as error:
        if isinstance(error, InUse) or disk_at_fault(error):
            raise
        if not isinstance(error, UserError):
            traceback.print_exc()
        reason = one_line(error) if isinstance(error, UserError) else f"{type(error).__name__}: {one_line(error)}"
        if distributed.is_first():
            place.fail(reason)
        return FAILED, reason
    state = distributed.from_first(place.state_at_rest)
    if state not in ENDED:
        raise UserError(f"{place.workdir / EVAL} cannot be written; mend that and repeat the command, which goes on")
    return state, ""


def _begin(run: Run, place: RunPlace, retry: bool) -> str:
    """The state to go on from, once the run is claimed."""
    if retry:
        place.forgive()
    state = place.state_at_rest()
    if state not in (*ENDED, FAILED):
        write_asked(place, run)
    return state


def _train_and_evaluate(run: Run, place: RunPlace, processes: Sequence[str]) -> bool:
    """False if a signal stopped it. Raises what train and evaluate raise."""
    # A run that is done and waits for its evaluation may have lost its last checkpoint, which train then makes again.
    if distributed.from_first(place.to_train) and train.main([*_argv(run, place), *processes]) == STOPPED_EXIT:
        return False
    if (step := distributed.from_first(place.to_evaluate)) is not None:
        evaluate.main(["--workdir", str(place.workdir), f"--step={step}", *processes])
    return True


def _argv(run: Run, place: RunPlace) -> list[str]:
    return [*run.argv, "--workdir", str(place.workdir), f"--stop_code={STOPPED_EXIT}"]
