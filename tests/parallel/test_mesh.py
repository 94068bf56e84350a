"""The same training on one device and on eight, in every kind of layout; and meshes that cannot be."""

import functools
import itertools
import math
from dataclasses import dataclass
from functools import partial

import chex
import jax
import numpy as np
import optax
import pytest
from small_model import assert_trees_close, configure, standard_normal, start

from spannorm_jax import config as configs
from spannorm_jax.config import MeshConfig
from spannorm_jax.errors import UserError
from spannorm_jax.model.definition import define
from spannorm_jax.model.placement import PLACEMENTS
from spannorm_jax.parallel.mesh import (
    LOGICAL_AXES,
    arrange,
    check_divisible,
    make_mesh,
    mesh_shape,
    partition_spec,
    sharding,
)
from spannorm_jax.training.numbers import numbers_of
from spannorm_jax.training.optimizer import OPTIMIZERS, Optimizer
from spannorm_jax.training.step import gradients, make_program
from spannorm_jax.training.tasks.text import loss_sums

STEPS = 3
LAYOUTS = {
    "data": {"data": 8},
    "fsdp": {"data": 1, "fsdp": 8},
    "data_tensor": {"data": 4, "tensor": 2},
    "all_three": {"data": 2, "fsdp": 2, "tensor": 2},
    "fsdp_tensor": {"data": 1, "fsdp": 2, "tensor": 4},
    "data_expert": {"data": 2, "expert": 4},
    "fsdp_expert_tensor": {"data": 1, "fsdp": 2, "expert": 2, "tensor": 2},
}
VARIANTS = {
    "separate": {},
    "tied": {"model__tied_head": True},
    # Chunks of the loss, microbatches, grouped queries and remat on top of one another.
    "everything": {
        "model__num_kv_heads": 4,
        "execution__remat": "block",
        "model__qk_norm": True,
        "training__batch_size": 16,
        "training__num_microbatches": 2,
        "training__z_loss": 1e-3,
        "execution__max_logits_mib": 1,
    },
    "moe": {"model__moe__num_experts": 4, "model__moe__every": 2, "model__moe__router_z_loss": 1e-3},
    "moe_bias": {
        "model__moe__num_experts": 4,
        "model__moe__num_shared": 1,
        "model__moe__scores": "sigmoid",
        "model__moe__balance": "bias",
        "execution__remat": "dots",
    },
}
MOE = VARIANTS["moe"]
VARIANTS |= {
    "moe_ring": MOE | {"execution__expert_parallel": "ring"},
    # Of 16 tokens x 2 a device, 12 rows to each of 4 devices, or 24 to each of 2: some overflow, others do not.
    "moe_all_to_all": MOE | {"execution__expert_parallel": "all_to_all", "execution__remat": "dots"},
}


def make_config(**changes):
    small = {"model__width": 32, "model__num_heads": 8, "model__vocab_size": 4096, "data__seq_len": 16}
    return configure(**small | {"training__steps": 10, "optim__lr": 1e-2} | changes)


def drawn(model):
    """Weights from NumPy, which take no compiling: matrices of a size that lets every gradient be seen."""
    rng, scalars = np.random.default_rng(1), PLACEMENTS[model.cfg.placement].scalar_gains

    def draw(w):
        drawn = 0.2 * standard_normal(rng, w) + (w.role == "norm")
        return (drawn * (0.1 if w.site in scalars else 1)).astype(np.float32)  # no norm holds what those multiply

    return model.map_weights(draw)


def trajectory(config, layout, num_devices):
    """[step, (loss, grad_norm)] and the final state, of random tokens that are the same on every mesh."""
    mesh = make_mesh(MeshConfig(**layout), jax.devices()[:num_devices])
    rng = np.random.default_rng(0)
    shape = (config.training.batch_size, config.data.seq_len + 1)
    values = []
    with jax.set_mesh(mesh):
        model = define(config.model, config.execution)
        program = make_program(config, model, mesh)
        state = start(program, drawn(model))
        for _ in range(STEPS):
            tokens = rng.integers(config.model.vocab_size, size=shape, dtype=np.int32)
            state, metrics = program.train(state, program.put({"tokens": tokens}), numbers_of(config))
            scalars = metrics["scalars"]
            values.append((float(scalars["loss"]), float(scalars["grad_norm"])))
    return np.array(values), state


@pytest.fixture(scope="module")
def one_device():
    made = {}

    def get(placement, variant):
        if (placement, variant) not in made:
            config = make_config(model__placement=placement, **VARIANTS[variant])
            made[placement, variant] = config, trajectory(config, {"data": 1}, 1)[0]
        return made[placement, variant]

    return get


# SpanNorm with a separate head on every layout, and in its other variants on those that shard most; every other
# placement with one of both heads, on a layout that shards weights.
CASES = [("span", "separate", layout) for layout in LAYOUTS if "expert" not in layout]
CASES += [("span", "tied", layout) for layout in ("fsdp", "all_three", "fsdp_tensor")]
CASES += [("span", "everything", layout) for layout in ("data", "all_three", "fsdp_tensor")]
CASES += [("span", "moe", layout) for layout in ("data", "all_three", "fsdp_tensor")]
CASES += [("pre", "moe_bias", layout) for layout in ("all_three", "fsdp_expert_tensor")]
CASES += [
    ("span", f"moe_{mode}", layout)
    for mode in ("ring", "all_to_all")
    for layout in ("data_expert", "fsdp_expert_tensor")
]
CASES += [
    (placement, ("separate", "tied")[i % 2], ("all_three", "fsdp", "fsdp_tensor")[i % 3])
    for i, placement in enumerate(sorted(set(PLACEMENTS) - {"span"}))
]


@pytest.mark.parametrize(("placement", "variant", "layout"), CASES)
def test_eight_devices_train_as_one(one_device, placement, variant, layout):
    config, expected = one_device(placement, variant)
    values, _ = trajectory(config, LAYOUTS[layout], 8)
    # Sums in another order: measured 7e-7 at most over all cases, which AdamW's first steps (signs of gradients) could
    # amplify on other hardware. A wrong reduction is off by a factor, a lost shard by 1e-2.
    np.testing.assert_allclose(values[0], expected[0], rtol=5e-6)
    # With experts that rounding also decides which of two nearly even ones a token takes: 2e-5 was seen after a step.
    np.testing.assert_allclose(values, expected, rtol=2e-4 if variant.startswith("moe") else 5e-6)


@pytest.mark.parametrize("layout", ["fsdp", "all_three"])
def test_an_optimiser_whose_state_is_factored_trains_as_on_one_device(layout, monkeypatch):
    """Adafactor (Shazeer & Stern 2018): a row and a column for each matrix, which no weight's sharding fits."""

    def direction(model, numbers):
        return [optax.scale_by_factored_rms(min_dim_size_to_factor=8), optax.clip_by_block_rms(1.0)]

    monkeypatch.setitem(OPTIMIZERS, "factored", Optimizer(direction))
    config = make_config(optim__name="factored")
    want, _ = trajectory(config, {"data": 1}, 1)
    values, state = trajectory(config, LAYOUTS[layout], 8)
    np.testing.assert_allclose(values, want, rtol=5e-6)
    assert want[-1, 0] < want[0, 0] - 0.02
    model, mesh = define(config.model, config.execution), make_mesh(MeshConfig(**LAYOUTS[layout]), jax.devices()[:8])
    program = make_program(config, model, mesh)
    whole = [x for x in jax.tree.leaves(state.opt_state) if x.ndim and x.sharding.is_fully_replicated]
    gains = [x for x in jax.tree.leaves(state.params) if x.sharding.is_fully_replicated]  # their state lies as they do
    assert program.replicated_bytes == sum(x.nbytes for x in whole) - sum(x.nbytes for x in gains) > 0


# Of each weight's largest gradient: the largest error seen was 2.2e-6.
same_gradients = functools.partial(assert_trees_close, tolerance=1e-5)


def gradients_on(config, layout, num_devices, tokens, num_chunks=1):
    """Of the drawn weights, on the host."""
    model, mesh = define(config.model, config.execution), make_mesh(MeshConfig(**layout), jax.devices()[:num_devices])
    shardings = model.map_weights(lambda spec: sharding(mesh, spec.axes))
    loss = partial(loss_sums, num_chunks=num_chunks)
    with jax.set_mesh(mesh):
        run = jax.jit(
            lambda params, batch: gradients(config, model, params, {}, batch, loss, numbers_of(config))[0],
            in_shardings=(shardings, {"tokens": sharding(mesh, ("batch", "time"))}),
            out_shardings=shardings,
        )
        return jax.device_get(run(drawn(model), {"tokens": tokens}))


@pytest.mark.parametrize("tied_head", [False, True])
@pytest.mark.parametrize("layout", ["fsdp", "all_three", "fsdp_tensor"])
def test_every_gradient_is_that_of_one_device(layout, tied_head):
    """Weight by weight and, in the embedding, row by row: the gradient of a lookup in a sharded table is a scatter-add
    across shards, which XLA has had wrong. A few tokens stand many times, on both sides of the shards' borders; the
    rows of all others get exactly 0 from the lookup.
    """
    config = make_config(model__tied_head=tied_head, model__vocab_size=256)
    borders = np.array([0, 63, 64, 127, 128, 255])
    tokens = np.random.default_rng(0).choice(borders, size=(8, 17)).astype(np.int32)
    one, eight = gradients_on(config, {"data": 1}, 1, tokens), gradients_on(config, LAYOUTS[layout], 8, tokens)
    if not tied_head:
        assert set(np.flatnonzero(np.any(eight["embed"], axis=1))) == set(tokens[:, :-1].ravel())
    same_gradients(eight, one)
    assert np.any(one["embed"])


@pytest.mark.parametrize(("layout", "more"), [("data", 1.05), ("fsdp", 1.05), ("all_three", 1.4)])
def test_bfloat16_gradients_are_as_near_to_float32_on_eight_devices_as_on_one(layout, more):
    """Sums over devices add little to a weight's error, 1 to 2% of its gradient: 1.009 times it was seen, with `tensor`
    1.22, whose devices sum parts of a product that are rounded.
    """
    tokens = np.random.default_rng(0).integers(256, size=(8, 17)).astype(np.int32)
    full, half = (make_config(model__vocab_size=256, model__dtype=dtype) for dtype in ("float32", "bfloat16"))
    exact = jax.tree.leaves(gradients_on(full, {"data": 1}, 1, tokens))

    def errors(layout, n):
        grads = jax.tree.leaves(gradients_on(half, layout, n, tokens))
        return np.array([np.linalg.norm(g - e) / np.linalg.norm(e) for g, e in zip(grads, exact, strict=True)])

    one = errors({"data": 1}, 1)
    assert np.all((one > 2**-9) & (one < 0.03))
    assert np.all(errors(LAYOUTS[layout], 8) < more * one)


@pytest.mark.parametrize("num_chunks", [3, 5])
@pytest.mark.parametrize("layout", ["all_three", "fsdp_tensor"])
def test_a_loss_in_pieces_of_a_prime_length_is_that_of_one_device_at_once(layout, num_chunks):
    config = make_config(model__vocab_size=256, data__seq_len=13)
    tokens = np.random.default_rng(0).integers(256, size=(8, 14)).astype(np.int32)
    same_gradients(
        gradients_on(config, LAYOUTS[layout], 8, tokens, num_chunks), gradients_on(config, {"data": 1}, 1, tokens)
    )


@pytest.mark.parametrize("layout", ["fsdp", "fsdp_tensor"])
def test_evaluation_is_that_of_one_device(layout):
    """Sums over rows of which some are padding."""
    config = make_config(eval__batch_size=8, model__num_kv_heads=4)
    tokens = np.random.default_rng(0).integers(4096, size=(8, 17), dtype=np.int32)
    weights = np.ones((8, 16), np.float32)
    weights[5:] = 0

    def sums(layout, n):
        mesh = make_mesh(MeshConfig(**layout), jax.devices()[:n])
        with jax.set_mesh(mesh):
            model = define(config.model, config.execution)
            program = make_program(config, model, mesh)
            where = program.abstract_batch["tokens"].sharding
            batch = jax.device_put({"tokens": tokens, "weights": weights}, where)
            state = start(program, drawn(model))
            return jax.device_get(program.evaluate(state.params, state.model_state, batch))

    one, eight = sums({"data": 1}, 1), sums(LAYOUTS[layout], 8)
    assert one["count"] == eight["count"] == 80
    assert one["correct"] == eight["correct"]
    for name in ("nll", "z"):
        np.testing.assert_allclose(eight[name], one[name], rtol=1e-6)


def test_every_weight_and_moment_lies_as_the_table_says():
    config = make_config()
    layout = {"data": 2, "fsdp": 2, "expert": 1, "tensor": 2}
    _, state = trajectory(config, layout, 8)
    model = define(config.model, config.execution)
    size = {axis: int(np.prod([layout.get(m, 1) for m in mesh_axes])) for axis, mesh_axes in LOGICAL_AXES.items()}

    def check(spec, *arrays):
        expected = tuple(n // size[axis] for n, axis in zip(spec.shape, spec.axes, strict=True))
        for array in arrays:
            assert {shard.data.shape for shard in array.addressable_shards} == {expected}

    moments = state.opt_state[1][0]
    model.map_weights(check, state.params, moments.mu, moments.nu)
    # The table is not all replication: an eighth of the big matrices would be lost on a mistake.
    assert state.params["blocks"]["ffn"]["out"].addressable_shards[0].data.size * 4 == (
        state.params["blocks"]["ffn"]["out"].size
    )


def test_a_new_state_does_not_depend_on_the_mesh():
    config = make_config()

    def weights(layout, n):
        mesh = make_mesh(MeshConfig(**layout), jax.devices()[:n])
        with jax.set_mesh(mesh):
            return jax.device_get(make_program(config, define(config.model, config.execution), mesh).init(3).params)

    chex.assert_trees_all_equal(weights({"data": 1}, 1), weights(LAYOUTS["all_three"], 8))


def test_minus_one_takes_the_devices_that_are_left():
    assert mesh_shape(MeshConfig(data=-1, tensor=2), 8) == {"data": 4, "fsdp": 1, "expert": 1, "tensor": 2}
    assert mesh_shape(MeshConfig(data=2, fsdp=-1), 8) == {"data": 2, "fsdp": 4, "expert": 1, "tensor": 1}


@pytest.mark.parametrize("sizes", [{"data": 3}, {"data": -1, "tensor": 3}, {"data": 16}, {"data": 2, "fsdp": 2}])
def test_a_mesh_that_does_not_multiply_to_the_devices(sizes):
    with pytest.raises(UserError, match=r"mesh\.data=.* 8 devices .*-1"):
        mesh_shape(MeshConfig(**sizes), 8)


@pytest.mark.parametrize(
    ("changes", "shape", "says"),
    [
        ({}, {"data": 16}, "training.batch_size=8 .*mesh.data x mesh.fsdp x mesh.expert=16"),
        ({"model__width": 24}, {"fsdp": 16}, "model.width=24 .*mesh.fsdp=16"),
        ({"model__num_heads": 4}, {"tensor": 8}, "model.num_heads=4 .*mesh.tensor=8"),
        ({"model__num_kv_heads": 2}, {"tensor": 4}, "model.num_kv_heads=2 .*mesh.tensor=4"),
        ({"model__ffn_dim": 36}, {"tensor": 8}, "model.ffn_dim=36 .*mesh.tensor=8"),
        ({"model__moe__num_experts": 6}, {"expert": 4}, "model.moe.num_experts=6 .*mesh.expert=4"),
        ({}, {"expert": 4}, "mesh.expert=4 .*num_experts=0"),
        ({"model__vocab_size": 257}, {"tensor": 2}, "model.vocab_size=257 .*mesh.tensor=2"),
    ],
)
def test_a_mesh_that_does_not_divide_the_model(changes, shape, says):
    rows = 16 if "fsdp" in shape else 8
    with pytest.raises(UserError, match=says):
        full = {"data": 1, "fsdp": 1, "expert": 1, "tensor": 1} | shape
        check_divisible(make_config(**changes), full, "training.batch_size", rows)


def test_a_mesh_of_too_few_devices():
    with pytest.raises(UserError, match=r"mesh\.data=8.* 4 devices .*write -1"):
        make_mesh(MeshConfig(data=8), jax.devices()[:4])
    one = {"lane": 1, "expert": 1, "tensor": 1}
    assert dict(make_mesh(MeshConfig(), jax.devices()[:4]).shape) == one | {"data": 4, "fsdp": 1}
    assert dict(make_mesh(MeshConfig(fsdp=2)).shape) == one | {"data": 4, "fsdp": 2}


@pytest.mark.parametrize(
    ("layout", "devices", "lanes", "lane", "data"),
    [
        ({}, 1, 4, 1, 1),
        ({}, 8, 1, 1, 8),
        ({}, 8, 4, 4, 2),
        ({}, 8, 7, 4, 2),
        ({}, 8, 100, 8, 1),
        ({"fsdp": 2}, 8, 3, 2, 2),
        ({"fsdp": 2, "tensor": 2}, 8, 8, 2, 1),
        ({"data": 8}, 8, 4, 1, 8),  # replicas that are named stay
        ({"data": 2, "fsdp": -1}, 8, 4, 1, 2),
    ],
)
def test_lanes_take_the_devices_that_replicas_leave(layout, devices, lanes, lane, data):
    shape = dict(make_mesh(MeshConfig(**layout), jax.devices()[:devices], lanes).shape)
    assert (shape["lane"], shape["data"], math.prod(shape.values())) == (lane, data, devices)


@dataclass(frozen=True)
class FakeDevice:
    """What JAX says of a device, as far as meshes depend on it."""

    id: int
    slice_index: int
    platform: str = "tpu"
    device_kind: str = "TPU v5"
    coords: tuple[int, int, int] = (0, 0, 0)
    core_on_chip: int = 0
    process_index: int = 0


def slices(number, x, y, z):
    chips = itertools.product(range(number), range(z), range(y), range(x))
    return [FakeDevice(i, n, coords=(x, y, z)) for i, (n, z, y, x) in enumerate(chips)]


@pytest.mark.parametrize(
    ("number", "sizes", "across"),
    [
        (1, (1, 8, 4, 1), (1, 1, 1, 1)),  # 16b's mesh on a v5p-64; fsdp=8 is no axis of its 4 x 4 x 2 chips
        (2, (2, 4, 1, 8), (2, 1, 1, 1)),
        (4, (2, 8, 4, 2), (2, 2, 1, 1)),
        (4, (1, 1, 32, 4), (1, 1, 4, 1)),
    ],
)
def test_the_outer_axes_go_across_slices(number, sizes, across):
    devices = slices(number, 4, 4, 2)
    array = arrange(dict(zip(LOGICAL_AXES["batch"] + ("tensor",), sizes, strict=True)), devices)
    assert array.shape == sizes and set(array.flat) == set(devices)
    for index in np.ndindex(sizes):
        parts = [i // (size // n) for i, size, n in zip(index, sizes, across, strict=True)]
        assert array[index].slice_index == np.ravel_multi_index(parts, across)


def test_hosts_of_gpus_follow_one_another():
    """JAX numbers GPUs host by host, and calls each host a slice; the order it lists them in may be another."""
    devices = [FakeDevice(i, slice_index=i // 8, platform="gpu", device_kind="NVIDIA H200") for i in range(16)]
    array = arrange({"data": 1, "fsdp": 2, "expert": 4, "tensor": 2}, devices[::-1])
    assert [d.slice_index for d in array[0, 0].flat] == [0] * 8 and array[0, 1, 0, 0].id == 8


def test_a_mesh_that_divides_everything_is_accepted():
    full = {"data": 2, "fsdp": 2, "expert": 1, "tensor": 2}
    check_divisible(make_config(), full, "training.batch_size", 8)
    with pytest.raises(UserError, match=r"eval\.batch_size=6 "):
        check_divisible(make_config(), full, "eval.batch_size", 6)


def test_a_misused_axis_is_a_fault():
    with pytest.raises(KeyError):
        partition_spec(("embde",))
    with pytest.raises(ValueError, match="twice"):
        partition_spec(("heads", "ffn"))


def test_the_config_knows_the_axes_of_the_mesh():
    """But for that of lanes, which no run's config sets."""
    known = {m for axes in LOGICAL_AXES.values() for m in axes}
    assert known == {"lane", *configs.MeshConfig.__dataclass_fields__}
