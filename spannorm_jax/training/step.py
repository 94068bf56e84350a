"""The train step and the evaluation step: free functions over pytrees, jitted with shardings at the edge.

Sums of losses and counts are carried everywhere and divided once, so that accumulation over microbatches, padding
and any mesh give the mean of the full batch.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from spannorm_jax.config import Config
from spannorm_jax.model.definition import ModelDef, abstract_model_state, abstract_params
from spannorm_jax.model.moe.router import Stats, balanced_bias, load_balance_loss
from spannorm_jax.model.stack import STACKS
from spannorm_jax.parallel.xla_options import xla_options
from spannorm_jax.run.state import TrainState
from spannorm_jax.training.numbers import Numbers, numbers_of
from spannorm_jax.training.optimizer import learning_rate, make_optimizer, optimizer_shardings
from spannorm_jax.training.signal import block_squares, forward_signal, squares
from spannorm_jax.training.task import Batch, LossSums, Rows, abstract_batch, microbatches
from spannorm_jax.training.tasks import task_of

# ---- loss -------------------------------------------------------------------------------------


def router_losses(balance: str, stats: Stats, numbers: Numbers) -> dict[str, Array]:
    """What the routers add to the mean loss, weighted and summed over blocks: `aux_loss`, `router_z_loss`."""
    weight = numbers.aux_loss if balance == "aux_loss" else 0.0
    return {
        "aux_loss": weight * jnp.sum(load_balance_loss(stats)),
        "router_z_loss": numbers.router_z_loss * jnp.sum(stats["z"] / stats["tokens"]),
    }


# ---- steps ------------------------------------------------------------------------------------


def objective(
    config: Config,
    model: ModelDef,
    params: Any,
    model_state: Any,
    batch: Batch,
    loss_sums: LossSums,
    numbers: Numbers,
) -> tuple[Array, dict[str, Any]]:
    """What training descends, summed over a batch, and the loss sums."""
    sums = loss_sums(model.bind(params, model_state), batch, numbers.z_loss)
    total = sums.pop("objective")
    if "router" in sums:
        losses = router_losses(config.model.moe.balance, sums["router"], numbers)
        # Times the count, since the total is divided by the whole batch's.
        losses = {name: sums["count"] * value for name, value in losses.items()}
        sums |= {"router_losses": losses}
        total += sum(losses.values())
    return total, sums


def gradients(
    config: Config,
    model: ModelDef,
    params: Any,
    model_state: Any,
    batch: Batch,
    loss_sums: LossSums,
    numbers: Numbers,
) -> tuple[Any, dict[str, Any]]:
    """Gradient of the mean loss, and the loss sums, over `training.num_microbatches` pieces of the batch.

    The load-balance loss is not linear in the batch: with microbatches it is the mean of theirs.
    """
    k = config.training.num_microbatches
    grad_fn = jax.grad(
        lambda params, batch: objective(config, model, params, model_state, batch, loss_sums, numbers), has_aux=True
    )
    if k == 1:
        grads, sums = grad_fn(params, batch)
    else:
        pieces = microbatches(batch, k)

        def add_piece(total: Any, piece: Batch) -> tuple[Any, None]:
            grads = grad_fn(params, piece)
            with jax.named_scope("accumulate"):
                return jax.tree.map(jnp.add, total, grads), None

        shapes = jax.eval_shape(grad_fn, params, jax.tree.map(lambda x: x[0], pieces))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        (grads, sums), _ = jax.lax.scan(add_piece, zeros, pieces)
    with jax.named_scope("accumulate"):
        return jax.tree.map(lambda g: g / sums["count"], grads), sums


def gradient_norms(model: ModelDef, grads: Any) -> tuple[Array, Array, dict[str, Array]]:
    """Norms before clipping: of the gradient, of each block's (L,), of each part outside blocks."""
    blocks = block_squares(model, grads)
    others = {name: squares(g, keep=0) for name, g in grads.items() if name not in STACKS.values()}
    total = jnp.sqrt(jnp.sum(blocks) + sum(others.values()))
    return total, jnp.sqrt(blocks), {name: jnp.sqrt(s) for name, s in others.items()}


def train_step(
    config: Config,
    model: ModelDef,
    loss_sums: LossSums,
    state: TrainState,
    batch: Batch,
    numbers: Numbers,
) -> tuple[TrainState, dict[str, dict[str, Any]]]:
    """One update; `step` numbers updates from 1. Only options that change the compiled program are read from `config`.

    The metrics are those of the weights before it, in groups that say when a line of metrics.jsonl
    holds them: `scalars` and `per_moe_block` always, `per_block` every metrics.block_grad_every
    steps, `signal` every metrics.signal_every. Their order is that of the line. `diagnosis` is in
    no line: it names what is not finite.
    """
    optim = config.optim
    grads, sums = gradients(config, model, state.params, state.model_state, batch, loss_sums, numbers)
    with jax.named_scope("optimizer"):
        optimizer = make_optimizer(optim, model, numbers)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        model_state = model.next_model_state(
            state.model_state,
            state.step + 2,
            lambda bias_LxE: balanced_bias(bias_LxE, sums["router"]["counts"], numbers.bias_rate),
        )
    step = state.step + 1
    with jax.named_scope("metrics"):
        grad_norm, block_grad_norm, other_grad_norm = gradient_norms(model, grads)
        metrics = {  # an OrderedDict keeps its order under jit, where a dict is sorted
            "scalars": OrderedDict(
                loss=sums["nll"] / sums["count"],
                accuracy=sums["correct"] / sums["count"],
                grad_norm=grad_norm,
                lr=learning_rate(optim.schedule, numbers, step),
                log_z=sums["log_z"] / sums["count"],
                clip_factor=jnp.minimum(1.0, numbers.clip_norm / grad_norm),
                z_loss=numbers.z_loss * sums["z"] / sums["count"],
                **{name: value / sums["count"] for name, value in sums.get("router_losses", {}).items()},
            ),
            "per_moe_block": router_metrics(sums["router"]) if "router" in sums else {},
            "per_block": OrderedDict(block_grad_norm=block_grad_norm),
            "signal": OrderedDict(update_norm=jnp.sqrt(block_squares(model, updates))),
            "diagnosis": {"other_grad_norm": other_grad_norm},
        }
    return TrainState(step, params, opt_state, model_state), metrics


def router_metrics(stats: Stats) -> dict[str, Array]:
    """Of each block with experts: the largest load over the mean, the mean entropy (nats), and the
    assignments beyond the capacity of `all_to_all`."""
    counts = stats["counts"]
    return OrderedDict(
        expert_load_max=jnp.max(counts, axis=-1) / jnp.mean(counts, axis=-1),
        router_entropy=stats["entropy"] / stats["tokens"],
        expert_overflow=stats["overflow"],
    )


def init_state(model: ModelDef, optimizer: optax.GradientTransformation, seed: Array) -> TrainState:
    params = model.init(jax.random.key(seed))
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), model.init_model_state())


# ---- the jitted edge ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Program:
    """A model's compiled functions on a mesh, with the shardings that they share.

    init(seed) -> state; train(state, batch, numbers) -> (state, metrics), which donates the state;
    signal(params, model_state, batch) -> `signal.forward_signal` of its first microbatch, and
    evaluate(params, model_state, batch) -> loss sums of a held-out batch, which donate nothing.
    """

    mesh: Mesh
    abstract_state: TrainState  # ShapeDtypeStructs with shardings: what a checkpoint is restored to
    abstract_batch: dict[str, jax.ShapeDtypeStruct]  # with shardings
    replicated_bytes: int  # of the optimiser's arrays that have another shape than their weight
    init: Callable[[int], TrainState]
    train: jax.stages.Wrapped
    signal: jax.stages.Wrapped
    evaluate: jax.stages.Wrapped

    def put(self, rows: Rows) -> Batch:
        """A whole batch of training, from the host to the devices."""
        return jax.device_put(rows, jax.tree.map(lambda x: x.sharding, self.abstract_batch))


def make_program(config: Config, model: ModelDef, mesh: Mesh) -> Program:
    """Binds the step functions of a resolved config to a mesh; compiles nothing yet."""
    task = task_of(config)
    # Its state alone is made with this one, and that is the same for all numbers.
    optimizer = make_optimizer(config.optim, model, numbers_of(config))
    replicated = NamedSharding(mesh, PartitionSpec())
    batch = abstract_batch(task.train_fields(config), mesh)
    batch_shardings = jax.tree.map(lambda x: x.sharding, batch)
    params = abstract_params(model, mesh)
    params_shardings = jax.tree.map(lambda x: x.sharding, params)
    opt_shardings, replicated_bytes = optimizer_shardings(optimizer, params, replicated)
    shardings = TrainState(
        cast(Any, replicated),
        params_shardings,
        opt_shardings,
        jax.tree.map(lambda x: x.sharding, abstract_model_state(model, mesh)),
    )
    init = partial(init_state, model, optimizer)
    abstract_state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        jax.eval_shape(init, 0),
        shardings,
    )
    microbatch = config.training.batch_size // config.training.num_microbatches
    loss_sums = task.loss_sums(config, dict(mesh.shape), microbatch)

    return Program(
        mesh=mesh,
        abstract_state=abstract_state,
        abstract_batch=batch,
        replicated_bytes=replicated_bytes,
        init=jax.jit(init, out_shardings=shardings),
        train=jax.jit(
            partial(train_step, config, model, loss_sums),
            in_shardings=(shardings, batch_shardings, replicated),
            out_shardings=(shardings, replicated),
            donate_argnums=0,
            compiler_options=xla_options(mesh),
        ),
        signal=jax.jit(
            partial(forward_signal, model, task.inputs, config.training.num_microbatches),
            in_shardings=(shardings.params, shardings.model_state, batch_shardings),
            out_shardings=replicated,
            compiler_options=xla_options(mesh),
        ),
        evaluate=make_evaluate(config, model, mesh),
    )


def make_evaluate(config: Config, model: ModelDef, mesh: Mesh) -> jax.stages.Wrapped:
    """evaluate(params, model_state, batch) -> loss sums, jitted, for a held-out batch. It donates nothing."""
    task = task_of(config)
    loss_sums = task.loss_sums(config, dict(mesh.shape), config.eval.batch_size)
    abstract = abstract_params(model, mesh), abstract_model_state(model, mesh)
    batch = abstract_batch(task.eval_fields(config), mesh)

    def evaluate(params: Any, model_state: Any, batch: Batch) -> dict[str, Any]:
        return loss_sums(model.bind(params, model_state), batch)

    return jax.jit(
        evaluate,
        in_shardings=jax.tree.map(lambda x: x.sharding, (*abstract, batch)),
        out_shardings=NamedSharding(mesh, PartitionSpec()),
        compiler_options=xla_options(mesh),
    )
