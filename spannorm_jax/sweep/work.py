"""One run of a sweep in this process: trained and evaluated through the command lines that a user would type."""

import contextlib
import traceback
from collections.abc import Sequence

from spannorm_jax import evaluate, train
from spannorm_jax.errors import UserError, one_line
from spannorm_jax.parallel import distributed
from spannorm_jax.sweep.expansion import Run
from spannorm_jax.sweep.records import ENDED, FAILED, STOPPED, STOPPED_EXIT, Place, write_asked


def work(run: Run, place: Place, *, retry: bool, wait: bool = False, processes: Sequence[str] = ()) -> tuple[str, str]:
    """Does what is left of a run, and returns its state and, if it has failed, the reason.

    A failure is recorded, with its traceback in what is printed. JAX has started (`platform.start_jax`).
    Every process of a run calls this; process 0 keeps the records.

    Args:
      retry: try a run that has failed again; otherwise it stays failed.
      wait: for another process that is at work on the run, rather than raise.
      processes: flags of `command.add_flags`, as for `spannorm_jax.train`.

    Raises:
      InUse: another runner is at work on the run.
    """
    with contextlib.ExitStack() as held:
        distributed.from_first(lambda: held.enter_context(place.claim(wait)))
        state = distributed.from_first(lambda: _begin(run, place, retry))
        if state in (*ENDED, FAILED):
            return state, distributed.from_first(place.failure)
        try:
            if not _train_and_evaluate(run, place, processes):
                return STOPPED, ""
        except Exception as error:
            if not isinstance(error, UserError):
                traceback.print_exc()
            reason = one_line(error) if isinstance(error, UserError) else f"{type(error).__name__}: {one_line(error)}"
            if distributed.is_first():
                place.fail(reason)
            return FAILED, reason
        return distributed.from_first(place.state_at_rest), ""


def _begin(run: Run, place: Place, retry: bool) -> str:
    """The state to go on from, once the run is claimed."""
    if retry:
        place.forgive()
    state = place.state_at_rest()
    if state not in (*ENDED, FAILED):
        write_asked(place, run)
    return state


def _train_and_evaluate(run: Run, place: Place, processes: Sequence[str]) -> bool:
    """False if a signal stopped it. Raises what train and evaluate raise."""
    if not distributed.from_first(place.trained):
        argv = [*run.argv, "--workdir", str(place.workdir), f"--stop_code={STOPPED_EXIT}", *processes]
        if train.main(argv) == STOPPED_EXIT:
            return False
    if distributed.from_first(place.to_evaluate):
        evaluate.main(["--workdir", str(place.workdir), *processes])
    return True
