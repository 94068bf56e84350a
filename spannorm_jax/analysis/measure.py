"""The signal of a model, measured: every number of docs/signal.md, group by group."""

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from spannorm_jax.analysis import blocks, fields, gradients, replaced
from spannorm_jax.analysis.groups import Settings
from spannorm_jax.analysis.sharpness import sharpness
from spannorm_jax.config import Config, MeshConfig, replace, to_dict
from spannorm_jax.errors import UserError
from spannorm_jax.model.definition import ModelDef
from spannorm_jax.model.kernels.attention import attention_for
from spannorm_jax.parallel.mesh import make_mesh
from spannorm_jax.parallel.platform import start_jax
from spannorm_jax.run.provenance import start_record
from spannorm_jax.run.trained import open_trained
from spannorm_jax.training.step import make_program
from spannorm_jax.training.task import Batch
from spannorm_jax.training.tasks import task_of


@dataclass(frozen=True)
class Measured:
    """A model with weights: what is measured."""

    config: Config
    model: ModelDef
    params: Any
    model_state: Any
    opt_state: Any = None  # for the group `sharpness`, of a model that has been updated


def signal(
    config: Config, workdir: Path | None, step: int | None, settings: Settings, argv: list[str]
) -> dict[str, Any]:
    """The record of a model at initialisation, or of a run's checkpoint (None: the newest sound one).

    Raises:
      UserError: the data, the tokens or the checkpoint are not there or too few, as the line says.
    """
    start_jax(config.platform)
    with contextlib.ExitStack() as stack:
        restore = stack.enter_context(open_trained(workdir, step, "measuring")) if workdir else None
        task = task_of(config)
        data, config = task.open(replace(config, mesh=MeshConfig()))
        attention_for(config.execution, config.model, settings.tokens or config.data.seq_len)
        mesh = make_mesh(config.mesh, jax.devices()[:1])
        stack.enter_context(jax.set_mesh(mesh))
        facts: dict[str, Any] = {"config": to_dict(config)}
        model = task.define(config)
        if restore:
            opt_state = make_program(config, model, mesh).abstract_state.opt_state
            trained = restore(config, model, mesh, opt_state if "sharpness" in settings.only else None)
            what = Measured(config, trained.model, trained.params, trained.model_state, trained.opt_state)
            facts["step"] = trained.step
        else:
            params = jax.jit(model.init)(jax.random.key(config.seed))
            what = Measured(config, model, params, model.init_model_state())
            facts["step"] = 0
        batch, fit_batch, settings = probe_batch(config, data, settings)
        facts["settings"] = dataclasses.asdict(settings)
        record = start_record("spannorm_jax.analysis.signal", argv, task.facts(data), facts)
        return record | measure(what, batch, fit_batch, settings)


# ---- rows ---------------------------------------------------------------------------------------------


def probe_batch(config: Config, data: Any, settings: Settings) -> tuple[Batch, Batch | None, Settings]:
    """The probe rows, the rows that affine maps are fitted on (None without `affine`), and the settings filled in.

    Raises:
      UserError: a split is too short for so many rows, a statistic needs more tokens, or a setting is of text alone.
    """
    T, task = settings.tokens or config.data.seq_len, task_of(config)
    for flag, value in (("--tokens", settings.tokens), ("--text random", settings.text == "random")):
        if value and config.task != "text":
            raise UserError(
                f"{flag} is of task=text: an image has all its patches, {config.data.seq_len} here; leave it out"
            )
    if T < 2:
        raise UserError(f"--tokens makes rows of {T} token, and the correlation of tokens needs 2; write 2 or more")
    if settings.text == "random":
        batch = {"tokens": jnp.asarray(_distinct(config, T, settings.rows))}
    else:
        batch = jax.tree.map(jnp.asarray, task.sample(data.eval, T, settings.rows, "--rows"))
    if "affine" not in settings.only:
        return batch, None, dataclasses.replace(settings, tokens=T, fit_tokens=0)
    model = task.define(config)
    shapes = jax.eval_shape(lambda key: model.bind(model.init(key)).run(task.inputs(batch)).stream, jax.random.key(0))
    needed = replaced.unknowns(shapes)
    rows = -(-(settings.fit_tokens or 4 * needed) // T)
    replaced.check_tokens(rows * T, needed)
    fit_batch = jax.tree.map(jnp.asarray, task.sample(data.train, T, rows, "--fit_tokens"))
    return batch, fit_batch, dataclasses.replace(settings, tokens=T, fit_tokens=rows * T)


def _distinct(config: Config, T: int, rows: int) -> np.ndarray:
    """(rows, T + 1) tokens, in each row no two alike, drawn by the config's seed: what a prediction is for."""
    vocabulary = config.model.vocab_size
    if vocabulary < T + 1:
        raise UserError(
            f"--text random makes rows of different tokens, and the vocabulary has {vocabulary} for {T + 1}; "
            f"write --tokens {vocabulary - 1} or less"
        )
    rng = np.random.default_rng(config.seed)
    return np.stack([rng.permutation(vocabulary)[: T + 1] for _ in range(rows)]).astype(np.int32)


# ---- groups ---------------------------------------------------------------------------------------------


@np.errstate(all="ignore")
def measure(what: Measured, batch: Batch, fit_batch: Batch | None, settings: Settings) -> dict[str, Any]:
    """The numbers of the groups that are asked for, as plain Python; call it under a mesh of one device or none.

    Of weights that are not finite, or whose stream is not, they are NaN.
    """
    task = task_of(what.config)
    inputs, targets = task.inputs(batch), task.targets(batch)
    found: dict[str, Any] = {}
    if "forward" in settings.only:
        found |= _forward(what, inputs, targets, settings.probes)
    grads = None
    if {"backward", "update"} & set(settings.only):
        of_loss = jax.jit(partial(gradients.of_loss, what.model))
        grads, meters, squares = of_loss(what.params, what.model_state, inputs, targets)
    if "backward" in settings.only:
        found |= _backward(what, inputs, settings.probes, meters, squares)
    if "sharpness" in settings.only:
        found |= sharpness(what.config, what.params, what.model_state, what.opt_state, batch)
    if not {"update", "skip", "affine"} & set(settings.only):
        return found
    trace = jax.jit(lambda p, r, x: blocks.traced(what.model.bind(p, r), x))
    before = trace(what.params, what.model_state, inputs)
    if "update" in settings.only:
        found |= _update(what, inputs, grads, trace, before)
    del grads
    if {"skip", "affine"} & set(settings.only):
        fit_on = None if fit_batch is None else task.inputs(fit_batch)
        found |= _replaced(what, targets, fit_on, settings, trace, before)
    return found


def _key(config: Config, purpose: int) -> Array:
    return jax.random.fold_in(jax.random.key(config.seed), 2**31 + purpose)


def _plain(x: Any) -> Any:
    return np.asarray(jax.device_get(x), np.float64).tolist()


def _forward(what: Measured, inputs: Array, targets: Array, probes: int) -> dict[str, Any]:
    depth = what.config.model.depth
    keys = jax.random.split(_key(what.config, 0), (depth, probes))
    run = jax.jit(lambda p, r, x, y, k: blocks.forward(what.model.bind(p, r), x, y, k))
    whole, of_blocks = run(what.params, what.model_state, inputs, targets, keys)
    ranks = {
        name: [effective_rank(grams) for grams in jax.device_get(of_blocks.pop(grams_name))]
        for name, grams_name in (("effective_rank", "stream_gram"), ("ffn_effective_rank", "ffn_gram"))
    }
    found = {name: _plain(value) for name, value in (whole | of_blocks).items()} | ranks
    # Of the gradient that enters block l over that of the last block: the blocks from l to the one before the last.
    later = np.cumprod(found["block_skip_gain"][-2::-1])[::-1]
    found["skip_path"] = [*later.tolist(), 1.0]
    experts = [i for spec in what.model.specs() if spec.site == "router" for i in spec.layers]
    for name in ("expert_load", "expert_load_max", "router_entropy"):
        if name in found:
            own = dict(zip(experts, found[name], strict=True))
            found[name] = [own.get(layer) for layer in range(depth)]
    return found


def effective_rank(grams_BxNxN: np.ndarray) -> float:
    """`fields.effective_rank`, mean over rows. NaN where there are no shares: of what is not finite, and of zeros."""
    if not grams_BxNxN.any(axis=(1, 2)).all():
        return math.nan
    # On the host: XLA's solver also makes the eigenvectors, which takes much longer.
    return float(np.mean([fields.effective_rank(gram.astype(np.float64)) for gram in grams_BxNxN]))


def _relative(squares_L: np.ndarray) -> list[float]:
    return np.sqrt(squares_L / squares_L[-1]).tolist()


def _backward(what: Measured, inputs: Array, probes: int, loss_meters: Array, loss_squares: Any) -> dict[str, Any]:
    run = jax.jit(partial(gradients.of_probe, what.model))
    keys = jax.random.split(_key(what.config, 1), probes)
    each = [jax.device_get(run(what.params, what.model_state, inputs, key)) for key in keys]
    mean = jax.tree.map(lambda *xs: np.mean([np.asarray(x, np.float64) for x in xs], axis=0), *each)
    meters, squares = mean
    return {
        "stream_grad_norm": _relative(meters),
        "stream_loss_grad_norm": _relative(np.asarray(loss_meters, np.float64)),
        "weight_grad_norm": gradients.by_site(what.model, jax.tree.map(np.sqrt, squares)),
        "weight_loss_grad_norm": gradients.by_site(what.model, jax.tree.map(np.sqrt, jax.device_get(loss_squares))),
    }


def _update(what: Measured, inputs: Array, grads: Any, trace: Any, before: Any) -> dict[str, Any]:
    params = jax.jit(partial(gradients.updated, what.config, what.model), donate_argnums=1)(what.params, grads)

    def logits(params: Any, model_state: Any, stream: Any) -> Array:
        model = what.model.bind(params, model_state)
        return model.logits(model.leave(stream))

    @jax.jit
    def changes(params: Any, new_params: Any, model_state: Any, before: Any, new: Any) -> tuple[Array, Array]:
        streams = [
            jnp.concatenate([blocks.first(entering)[1:], blocks.first(last)[None]]) for entering, last in (before, new)
        ]
        by_block = jax.lax.map(lambda pair: _change(*pair), tuple(streams))
        return by_block, _change(logits(params, model_state, before[1]), logits(new_params, model_state, new[1]))

    by_block, of_logits = changes(
        what.params, params, what.model_state, before, trace(params, what.model_state, inputs)
    )
    return {"update_stream_change": _plain(by_block), "update_logits_change": _plain(of_logits)}


def _change(old: Array, new: Array) -> Array:
    old, new = old.astype(jnp.float32), new.astype(jnp.float32)
    return jnp.linalg.norm(new - old) / jnp.linalg.norm(old)


def _replaced(
    what: Measured, targets: Array, fit_on: Array | None, settings: Settings, trace: Any, before: Any
) -> dict[str, Any]:
    run = jax.jit(lambda p, r, stream, done, y: replaced.loss_from(what.model.bind(p, r), stream, done, y))
    depth = what.config.model.depth
    chosen = replaced.chosen_blocks(depth, settings.blocks)

    def loss(stream: Any, done: int) -> float:
        return float(run(what.params, what.model_state, stream, jnp.int32(done), targets))

    whole = loss(before[1], depth - 1)

    def change(streams: Sequence[Any]) -> list[float | None]:
        costs = {layer: loss(stream, layer) - whole for stream, layer in zip(streams, chosen, strict=True)}
        return [costs.get(layer) for layer in range(depth)]

    found: dict[str, Any] = {}
    entering = (replaced.block_of(before, layer)[0] for layer in chosen)
    if "skip" in settings.only:
        found["skip_loss_change"] = change(list(entering))
    if "affine" in settings.only:
        fitted_on = trace(what.params, what.model_state, fit_on)
        mapped = [replaced.replacement(fitted_on, replaced.block_of(before, layer)[0], layer) for layer in chosen]
        found["affine_loss_change"] = change(mapped)
        costs = np.array([cost for cost in found["affine_loss_change"] if cost is not None])
        useful = np.where(np.isfinite(costs), costs > replaced.USEFUL * whole, math.nan)
        found["useful_share"] = float(np.mean(useful))
    return found
