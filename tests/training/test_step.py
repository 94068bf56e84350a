"""The train step: accumulation and chunked loss; that it learns, never recompiles, and names what is not finite."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.extend.core import jaxprs_in_params
from small_model import (
    BATCH,
    SEQ_LEN,
    VOCAB,
    assert_trees_close,
    batch,
    configure,
    drawn_params,
    gradients_of,
    program_of,
    start,
)

from spannorm_jax.model.definition import define
from spannorm_jax.model.placement import PLACEMENTS
from spannorm_jax.parallel.mesh import make_mesh
from spannorm_jax.training.numbers import numbers_of, on_devices
from spannorm_jax.training.step import make_program
from spannorm_jax.training.step_log import first_nonfinite, host_metrics
from spannorm_jax.training.tasks.text import loss_sums, num_loss_chunks

# ---- accumulation ------------------------------------------------------------------------------------------


def one_step(config):
    """(gradients, loss sums, state after one update, metrics) from the drawn weights."""
    program = program_of(config)
    grads, sums = gradients_of(config)(drawn_params(), batch())
    state, metrics = program.train(start(program, drawn_params()), batch(), numbers_of(config))
    return grads, sums, state, metrics


# eps is large: with 1e-8 the first Adam update is the gradient's sign, and rounding decides that of a small one.
SMOOTH = {"optim__eps": 1e-3, "training__z_loss": 0.1}


@pytest.fixture(scope="module")
def full_batch():
    return one_step(configure(**SMOOTH))


@pytest.mark.parametrize("k", [2, 4, 8])
def test_microbatches_equal_the_full_batch(k, full_batch):
    """Loss, gradients and updated weights. Sums in another order: largest error seen 1.4e-6 of a leaf's largest
    gradient, 2e-7 of the loss."""
    grads, sums, state, metrics = one_step(configure(training__num_microbatches=k, **SMOOTH))
    assert float(sums["count"]) == BATCH * SEQ_LEN
    assert_trees_close(grads, full_batch[0], 5e-6)
    assert_trees_close(sums, full_batch[1], 1e-6)
    assert_trees_close(state.params, full_batch[2].params, 5e-7)
    assert_trees_close(metrics, full_batch[3], 2e-6)


def test_the_gradient_is_that_of_the_mean(full_batch):
    """Not of the sum: the same rows twice over give the same gradient."""
    config = configure(**SMOOTH)
    twice = {"tokens": np.concatenate([batch()["tokens"]] * 2)}
    grads, sums = gradients_of(config)(drawn_params(), twice)
    assert float(sums["count"]) == 2 * BATCH * SEQ_LEN
    assert_trees_close(grads, full_batch[0], 5e-6)


def test_gradient_norms_are_those_of_the_gradients(full_batch):
    grads, _, _, metrics = jax.tree.map(lambda x: np.asarray(x, np.float64), full_batch)
    flat = np.concatenate([g.ravel() for g in jax.tree.leaves(grads)])
    assert metrics["scalars"]["grad_norm"] == pytest.approx(np.linalg.norm(flat), rel=1e-6)
    for layer in range(2):
        of_block = np.concatenate([g[layer].ravel() for g in jax.tree.leaves(grads["blocks"])])
        assert metrics["per_block"]["block_grad_norm"][layer] == pytest.approx(np.linalg.norm(of_block), rel=1e-6)
    others = metrics["diagnosis"]["other_grad_norm"]
    assert set(others) == {"embed", "ends", "head"}
    for name, norm in others.items():
        part = np.concatenate([g.ravel() for g in jax.tree.leaves(grads[name])])
        assert norm == pytest.approx(np.linalg.norm(part), rel=1e-6)


def test_branches_come_in_update_by_update():
    """ProRes: update t is made with min(1, t / (T l)), and a state holds the factors of the update that comes next."""
    config = configure(model__placement="pre", model__branch_warmup_steps=2.0)
    model, program = define(config.model, config.execution), program_of(config)
    state = program.init(0)
    for update in range(1, 5):
        factors = np.minimum(1, update / np.array([2.0, 4.0], np.float32))
        np.testing.assert_array_equal(state.model_state["blocks"]["warmup_factor"], factors)
        plain, fixed = jax.device_get((state.params, {"blocks": {"warmup_factor": factors}}))
        log_probs = jax.nn.log_softmax(model.bind(plain, fixed)(batch()["tokens"][:, :-1]))
        nll = -np.mean(np.take_along_axis(np.asarray(log_probs), batch()["tokens"][:, 1:, None], axis=-1))
        state, metrics = program.train(state, batch(), numbers_of(config))
        assert metrics["scalars"]["loss"] == pytest.approx(nll, rel=1e-6)


# ---- loss ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied_head", [False, True])
@pytest.mark.parametrize(("seq_len", "chunks"), [(8, 2), (8, 3), (8, 7), (8, 8), (13, 2), (13, 5), (13, 13), (1, 1)])
def test_a_chunked_loss_is_the_whole_loss(seq_len, chunks, tied_head):
    """Sums and gradient, with some positions left out. Largest error seen 5e-7 of a leaf's largest."""
    model = define(configure(model__tied_head=tied_head).model)
    rng = np.random.default_rng(1)
    weights = (rng.random((BATCH, seq_len)) < 0.7).astype(np.float32)
    tokens = rng.integers(VOCAB, size=(BATCH, seq_len + 1)).astype(np.int32)

    def loss(params, num_chunks):
        sums = loss_sums(model.bind(params), {"tokens": tokens, "weights": weights}, 0.1, num_chunks=num_chunks)
        return sums["objective"], sums

    run = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    grads, sums = run(drawn_params("span", tied_head), chunks)
    whole_grads, whole_sums = run(drawn_params("span", tied_head), 1)
    assert float(sums["count"]) == weights.sum()
    assert float(sums["correct"]) == float(whole_sums["correct"])
    assert_trees_close(sums, whole_sums, 1e-6)
    assert_trees_close(grads, whole_grads, 5e-6)


@pytest.mark.parametrize("chunks", [1, 3])
def test_a_batch_of_padding_alone_adds_nothing(chunks):
    model, weights = define(configure().model), np.zeros((BATCH, SEQ_LEN), np.float32)

    def loss(params):
        sums = loss_sums(model.bind(params), batch() | {"weights": weights}, 1.0, num_chunks=chunks)
        return sums["objective"], sums

    grads, sums = jax.jit(jax.grad(loss, has_aux=True))(drawn_params())
    assert all(not np.any(x) for x in jax.tree.leaves((grads, sums)))  # NaN is not 0


def test_sums_are_those_of_the_positions_with_weight():
    """All four against NumPy, from the logits in float64."""
    decoder = define(configure().model).bind(drawn_params())
    weights = np.zeros((BATCH, SEQ_LEN), np.float32)
    weights[:3, 2:] = 1
    sums = loss_sums(decoder, batch() | {"weights": weights})
    logits, targets = np.asarray(decoder(batch()["tokens"][:, :-1]), np.float64), batch()["tokens"][:, 1:]
    log_z = np.log(np.sum(np.exp(logits), axis=-1))
    nll = log_z - np.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(sums["nll"], np.sum(nll * weights), rtol=1e-6)
    np.testing.assert_allclose(sums["z"], np.sum(log_z**2 * weights), rtol=1e-6)
    assert float(sums["count"]) == 18
    assert float(sums["correct"]) == np.sum((np.argmax(logits, axis=-1) == targets) * weights)


def arrays_in(jaxpr):
    """(shape, dtype) of every value that a jaxpr and those inside it make."""
    for eqn in jaxpr.eqns:
        yield from ((v.aval.shape, v.aval.dtype) for v in eqn.outvars if hasattr(v.aval, "shape"))
        for inner in jaxprs_in_params(eqn.params):
            yield from arrays_in(inner)


@pytest.mark.parametrize("microbatches", [1, 2])
def test_no_more_logits_live_than_the_limit(microbatches):
    """With a vocabulary of 2^15 and 8 x 8 positions the logits are 8 MiB; a limit of 1 MiB holds for every array."""
    config = configure(model__vocab_size=2**15, execution__max_logits_mib=1, training__num_microbatches=microbatches)
    program = program_of(config)
    jaxpr = program.train.trace(program.abstract_state, program.abstract_batch, numbers_of(config)).jaxpr.jaxpr
    logits = {shape for shape, _ in arrays_in(jaxpr) if len(shape) == 3 and shape[-1] == 2**15}
    sizes = {math.prod(shape) * 4 for shape in logits}
    assert max(sizes) == 2**20  # and not smaller: chunks are no finer than needed


@pytest.mark.parametrize(
    ("rows", "mesh", "mib", "chunks"),
    [
        (8, {"data": 1, "fsdp": 1, "expert": 1, "tensor": 1}, 256, 1),
        (8, {"data": 1, "fsdp": 1, "expert": 1, "tensor": 1}, 4, 2),  # 8 x 8 x 2^15 x 4 bytes = 8 MiB
        (8, {"data": 2, "fsdp": 2, "expert": 1, "tensor": 1}, 1, 2),
        (8, {"data": 2, "fsdp": 2, "expert": 1, "tensor": 2}, 1, 1),
        (8, {"data": 1, "fsdp": 1, "expert": 1, "tensor": 1}, 3, 4),
        (1024, {"data": 1, "fsdp": 1, "expert": 1, "tensor": 1}, 1, 8),  # nothing is finer than one position
    ],
)
def test_chunks_are_as_few_as_fit_on_a_device(rows, mesh, mib, chunks):
    config = configure(model__vocab_size=2**15, execution__max_logits_mib=mib)
    assert num_loss_chunks(config, mesh, rows) == chunks


ONE = {"data": 1, "fsdp": 1, "expert": 1, "tensor": 1}


@pytest.mark.parametrize(
    ("seq_len", "fit", "chunks"),
    [(1021, 150, 7), (1021, 1021, 1), (1021, 910, 2), (1021, 341, 3), (1021, 1, 1021), (1024, 150, 8), (1023, 150, 11)],
)
def test_a_length_without_divisors_is_cut_into_as_few_pieces(seq_len, fit, chunks):
    """`fit` positions take the limit of 1 MiB, or a little less; 1023 is 11 x 93."""
    rows = 2**18 // VOCAB // fit
    config = configure(data__seq_len=seq_len, execution__max_logits_mib=1)
    assert num_loss_chunks(config, ONE, rows) == chunks


def test_z_loss_gradient_is_the_finite_difference():
    """Of mean(nll) + 0.5 mean(log Z ^ 2) in the float64 reference, weight by weight.

    Difference error about 1e-10; float32's, largest seen, 1.2e-6 of |g| / sqrt(n), what a unit direction meets.
    """
    config = configure(training__z_loss=0.5)
    tokens = batch(rows=2)["tokens"]
    grads, sums = gradients_of(config)(drawn_params(), {"tokens": tokens})
    exact, options = reference.to_float64(drawn_params()), reference.Options("span")

    def objective(params):
        z = np.log(np.sum(np.exp(reference.logits(params, tokens[:, :-1], options)), axis=-1))
        return reference.loss(params, tokens, options) + 0.5 * np.mean(z**2), np.sum(z**2)

    assert float(sums["z"]) == pytest.approx(objective(exact)[1], rel=1e-5)
    leaves, treedef = jax.tree.flatten(exact)
    rng = np.random.default_rng(1)
    for i, (path, grad) in enumerate(jax.tree.leaves_with_path(grads)):
        grad = np.asarray(grad, np.float64)
        direction = rng.standard_normal(grad.shape)
        direction /= np.linalg.norm(direction)
        ends = []
        for step in (1e-5, -1e-5):
            moved = [leaf + step * direction if j == i else leaf for j, leaf in enumerate(leaves)]
            ends.append(objective(jax.tree.unflatten(treedef, moved))[0])
        error = abs(np.vdot(grad, direction) - (ends[0] - ends[1]) / 2e-5)
        assert error < 1e-5 * np.linalg.norm(grad) / grad.size**0.5, jax.tree_util.keystr(path)


# ---- learning, compiling, failing --------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_one_sequence_is_learnt_by_heart(placement):
    """From log(32) = 3.5 nats to almost none in 80 updates; without positions or attention the repeats are a coin toss.

    The row says 5 -> 1 and then 5 -> 2: only who sees what came before can tell.
    """
    config = configure(model__placement=placement, training__steps=80, optim__lr=0.02, optim__weight_decay=0.0)
    program, numbers = program_of(config), numbers_of(config)
    state = program.init(0)
    tokens = np.tile(np.array([5, 1, 5, 2, 5, 3, 5, 4, 5], np.int32), (BATCH, 1))
    losses = []
    for _ in range(80):
        state, metrics = program.train(state, {"tokens": tokens}, numbers)
        losses.append(metrics["scalars"]["loss"])
    assert float(losses[0]) > 3
    assert float(losses[-1]) < 0.05
    assert float(metrics["scalars"]["accuracy"]) == 1
    held_out = {"tokens": tokens, "weights": np.ones((BATCH, SEQ_LEN), np.float32)}
    sums = program.evaluate(state.params, state.model_state, held_out)
    assert float(sums["correct"]) == float(sums["count"]) == BATCH * SEQ_LEN


@pytest.mark.parametrize("devices", [1, 8])
def test_nothing_is_compiled_after_the_first_step(devices):
    """Counts JAX's own compile events: one program for the first step, none for later ones."""
    config = configure()
    program = make_program(
        config, define(config.model, config.execution), make_mesh(config.mesh, jax.devices()[:devices])
    )
    batches = [program.put(batch(i)) for i in range(5)]
    numbers = on_devices(numbers_of(config), program.mesh)
    events = []

    def on_event(event, duration, **_):
        if "backend_compile" in event or "jaxpr_trace" in event:
            events.append(event)

    with jax.set_mesh(program.mesh):
        state = program.init(0)  # not `start`: what init hands over is what a run begins with
        jax.monitoring.register_event_duration_secs_listener(on_event)
        try:
            counts = []
            for each in batches:
                state, _ = program.train(state, each, numbers)
                counts.append(len(events))
        finally:
            jax.monitoring.unregister_event_duration_listener(on_event)
    assert counts[0] > 0, "the events have other names in this JAX"
    assert counts[1:] == counts[:1] * 4
    assert int(state.step) == 5


def test_a_donated_state_is_gone():
    """The state's memory is reused, so a step needs it once, not twice."""
    config = configure()
    program = program_of(config)
    old = start(program, drawn_params())
    program.train(old, batch(), numbers_of(config))
    assert all(x.is_deleted() for x in jax.tree.leaves((old.params, old.opt_state)))


def test_the_same_seed_is_the_same_run_and_another_is_not():
    config = configure()
    program = program_of(config)

    def run(seed):
        state, metrics = program.train(program.init(seed), batch(), numbers_of(config))
        return jax.device_get((state.params, metrics["scalars"]["loss"]))

    chex.assert_trees_all_equal(run(3), run(3))
    assert run(3)[1] != run(4)[1]


def host(loss, total, blocks, others):
    """A step's metrics on the host, as far as the search for what is not finite reads them."""
    return {
        "scalars": {"loss": loss, "grad_norm": total},
        "per_block": {"block_grad_norm": blocks},
        "diagnosis": {"other_grad_norm": others},
    }


@pytest.mark.parametrize(
    ("blocks", "others", "says"),
    [
        ((), (), None),
        ((2, 1), (), "block 1 (counted from 0, the first of 2 such blocks)"),
        ((0, 1, 2), ("embed", "head"), "block 0 (counted from 0, the first of 3 such blocks)"),
        ((), ("head",), "head"),
    ],
)
def test_the_first_block_is_named(blocks, others, says):
    norms = {name: math.inf if name in others else 1.0 for name in ("embed", "ends", "head")}
    per_block = [math.nan if i in blocks else 1.0 for i in range(3)]
    total = math.nan if says else 1.0
    assert first_nonfinite(host(2.0, total, per_block, norms)) == (says and f"the gradient of {says}")


def test_a_loss_or_a_norm_that_alone_is_not_finite_is_named():
    assert first_nonfinite(host(math.nan, 1.0, [1.0], {"embed": 1.0})) == "the loss"
    overflown = host(2.0, math.inf, [1.0], {"embed": 1.0})  # squares that overflow as a sum
    assert first_nonfinite(overflown) == "the gradient norm"


def test_a_number_that_is_not_finite_is_noticed_in_the_step_that_makes_it():
    """An infinite weight in block 1 makes the loss NaN, and backward that reaches every block."""
    config = configure()
    program = program_of(config)
    state, metrics = program.train(start(program, drawn_params()), batch(), numbers_of(config))
    assert first_nonfinite(host_metrics(metrics)) is None
    state.params["blocks"]["ffn"]["out"] = state.params["blocks"]["ffn"]["out"].at[1, 0, 0].set(jnp.inf)
    metrics = host_metrics(program.train(state, batch(), numbers_of(config))[1])
    assert not np.isfinite(metrics["scalars"]["loss"])
    assert "block 0 (counted from 0, the first of 2 such blocks)" in first_nonfinite(metrics)
