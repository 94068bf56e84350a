"""Held-out loss of a run's checkpoint, from its folder alone."""

from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from spannorm_jax.config import Config
from spannorm_jax.errors import UserError
from spannorm_jax.parallel import distributed
from spannorm_jax.parallel.liveness import default_sigterm, in_step
from spannorm_jax.parallel.mesh import check_divisible, make_mesh
from spannorm_jax.parallel.platform import start_jax
from spannorm_jax.parallel.rank import ProcessFlags
from spannorm_jax.run import folder as run_folder
from spannorm_jax.run import lines
from spannorm_jax.run.provenance import check_agreement
from spannorm_jax.run.trained import open_trained
from spannorm_jax.training.held_out import held_out
from spannorm_jax.training.step import make_evaluate
from spannorm_jax.training.tasks import task_of


def evaluate(config: Config, workdir: Path, step: int | None, flags: ProcessFlags, out: Path | None) -> dict[str, Any]:
    """Evaluates a checkpoint (default: that of `open_trained`), appends a line to `out` if given, and returns it.

    An `out` that is not the run's own eval.jsonl is refused before the work where it cannot be
    written. Of several processes (`flags`) each reads its own rows, and process 0 appends.

    The task names its measures (`training.tasks.text` those of text). `floors` are losses on the same predictions
    that need no network.

    Raises:
      UserError: there is no such sound checkpoint, the data differ from the run's, the mesh does not fit, or `out`
        cannot be written; NotRecorded if that shows after the work, which has its result then.
    """
    begin(config, workdir, flags, out)
    with open_trained(workdir, step, "evaluating") as restore:
        task = task_of(config)
        data, config, mesh = distributed.run_on_all(lambda: _match_machine(config))
        check_agreement(config)
        task.warn(config, data)
        with jax.set_mesh(mesh), in_step():
            trained = restore(config, task.define(config), mesh)
            loss_sums = make_evaluate(config, trained.model, mesh)
            result = held_out(config, mesh, loss_sums, data, trained.params, trained.model_state)
    line: dict[str, Any] = {"step": trained.step, **result}
    line |= run_folder.what_is_evaluated(config, trained.step) | {"mesh": dict(mesh.shape)}
    if overlap := task.facts(data).get("eval_overlap"):
        line["eval_overlap"] = overlap
    if distributed.is_first() and (floors := task.floors(config, data, result)):
        line["floors"] = floors
    add_line(out, line)
    return line


def begin(config: Config, workdir: Path, flags: ProcessFlags, out: Path | None) -> None:
    """Starts JAX with the other processes. Raises UserError if that fails, or `out` cannot be written."""
    start_jax(config.platform, flags)
    distributed.check_devices()
    default_sigterm()
    if out is not None and out != workdir / run_folder.EVAL and distributed.is_first():
        _check_writable(out)


def add_line(out: Path | None, line: dict[str, Any]) -> None:
    """Appends an evaluation's line, on process 0. Raises NotRecorded."""
    if out is not None:
        distributed.from_first(lambda: _append(out, line))


class NotRecorded(UserError):
    """An evaluation has its `result`, and its file cannot be written."""

    def __init__(self, message: str, result: dict[str, Any]):
        super().__init__(message)
        self.result = result


def _append(out: Path, line: dict[str, Any]) -> None:
    try:
        lines.append(out, line)
    except OSError as error:
        why = f"{out} cannot be written ({error.strerror})"
        raise NotRecorded(f"not recorded: {why}; --out FILE records it elsewhere", line) from error


def _check_writable(out: Path) -> None:
    try:
        open(out, "ab").close()
    except OSError as error:
        raise UserError(f"--out {out} cannot be written ({error.strerror}); give another file, or none") from error


def _match_machine(config: Config) -> tuple[Any, Config, Mesh]:
    data, config = task_of(config).open(config)
    mesh = make_mesh(config.mesh)
    check_divisible(config, dict(mesh.shape), "eval.batch_size", config.eval.batch_size)
    return data, config, mesh
