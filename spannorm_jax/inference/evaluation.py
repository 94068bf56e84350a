"""Held-out loss of a run's checkpoint, from its folder alone."""

import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from spannorm_jax.config import Config, MeshConfig
from spannorm_jax.data.loader import check_held_out, eval_batches
from spannorm_jax.data.open import OpenData, open_data, say_overlap
from spannorm_jax.durable import append_line
from spannorm_jax.errors import UserError
from spannorm_jax.model.definition import define
from spannorm_jax.parallel import distributed
from spannorm_jax.parallel.liveness import default_sigterm, in_step
from spannorm_jax.parallel.mesh import check_divisible, make_mesh
from spannorm_jax.parallel.platform import start_jax
from spannorm_jax.run import folder as run_folder
from spannorm_jax.run.checkpoint import Checkpoints
from spannorm_jax.run.provenance import check_agreement
from spannorm_jax.training.step import Program, make_program

_LARGEST_EXPONENT = math.log(sys.float_info.max)


def here(config: Config) -> Config:
    """A run's config for evaluation on this machine: the mesh and platform that trained it need not be here."""
    return dataclasses.replace(config, platform="auto", mesh=MeshConfig())


def evaluate(
    config: Config, workdir: Path, step: int | None, flags: distributed.Flags, out: Path | None
) -> dict[str, Any]:
    """Evaluates a checkpoint (default: the newest), appends a line to `out` if there is one, and returns that line.

    A run's eval.jsonl that cannot be written is said on stderr; another `out` is refused before
    the work. Of several processes (`flags`) each reads its own rows, and process 0 appends.

    `loss` is in nats per token, `bits_per_byte` counts the bytes of the text that the predicted tokens stand for
    (the cost of predicting where documents end is in the bits), `accuracy` is the share of next tokens ranked first.

    Raises:
      UserError: there is no such sound checkpoint, the data differ from the run's, the mesh does not fit, or `out`
        cannot be written.
    """
    start_jax(config.platform, flags)
    distributed.check_devices()
    default_sigterm()
    if out is not None and out != workdir / run_folder.EVAL and distributed.is_first():
        _check_writable(out)
    checkpoints = Checkpoints(workdir / run_folder.CHECKPOINTS)
    try:
        step, faults = checkpoints.find(step)
        for found in faults:  # not on stdout, which may be one JSON line
            distributed.say(f"passed over a checkpoint: {found}; evaluating step {step}", sys.stderr)
        data, config, mesh = distributed.together(lambda: _fit(config))
        check_agreement(config)
        say_overlap(config, data)
        with jax.set_mesh(mesh), in_step():
            program = make_program(config, define(config.model), mesh)
            params = checkpoints.restore_params(step, program.abstract_state.params)
            result = {"step": step, **held_out(config, program, params, data)}
    finally:
        checkpoints.close()
    line = result | {"split": config.data.eval_split, "fingerprint": config.data.fingerprint, "mesh": dict(mesh.shape)}
    if data.eval_overlap:
        line["eval_overlap"] = data.eval_overlap
    if out is not None and distributed.is_first():
        try:
            append_line(out, line)
        except OSError as error:
            print(
                f"not recorded: {out} cannot be written ({error.strerror}); --out FILE records it elsewhere",
                file=sys.stderr,
            )
    return line


def _check_writable(out: Path) -> None:
    try:
        open(out, "ab").close()
    except OSError as error:
        raise UserError(f"--out {out} cannot be written ({error.strerror}); give another file, or none") from error


def _fit(config: Config) -> tuple[OpenData, Config, Mesh]:
    data, config = open_data(config)
    check_held_out(data.eval, data.tokenizer)
    mesh = make_mesh(config.mesh)
    check_divisible(config, dict(mesh.shape), "eval.batch_size", config.eval.batch_size)
    return data, config, mesh


def held_out(config: Config, program: Program, params: Any, data: OpenData) -> dict[str, float]:
    """Loss, perplexity, bits per byte and accuracy over the fixed part of the held-out split.

    Raises:
      UserError: no token of that part stands for text.
    """
    totals = {"nll": 0.0, "correct": 0.0, "count": 0.0}
    num_bytes = 0
    batches = eval_batches(data.eval, config.data.seq_len, config.eval.tokens, config.eval.batch_size)
    for tokens, weights in batches:
        num_bytes += int(np.sum(data.tokenizer.token_bytes[tokens[:, 1:]] * weights))
        arrays = (  # each process the rows of its own devices
            jax.make_array_from_callback(x.shape, program.batch_sharding, x.__getitem__) for x in (tokens, weights)
        )
        sums = jax.device_get(program.evaluate(params, *arrays))
        totals = {key: total + float(sums[key]) for key, total in totals.items()}
    if not num_bytes:
        raise UserError(
            f"config key eval.tokens={config.eval.tokens} predicts no text, only ends of documents; write more, or 0"
        )
    loss = totals["nll"] / totals["count"]
    return {
        "loss": loss,
        "perplexity": math.exp(loss) if loss < _LARGEST_EXPONENT else math.inf,
        "bits_per_byte": totals["nll"] / math.log(2) / num_bytes,
        "accuracy": totals["correct"] / totals["count"],
        "tokens": int(totals["count"]),
        "bytes": num_bytes,
    }
