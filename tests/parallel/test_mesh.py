"""The same training on one device and on eight, in every kind of layout; and meshes that cannot be."""

import jax
import numpy as np
import pytest

from spannorm_jax import config as configs
from spannorm_jax.config import Config, MeshConfig, replace, resolve
from spannorm_jax.errors import UserError
from spannorm_jax.model.decoder import define
from spannorm_jax.parallel.mesh import LOGICAL_AXES, check_divisible, make_mesh, mesh_shape, partition_spec
from spannorm_jax.training.step import make_program

STEPS = 3
LAYOUTS = {
    "data": {"data": 8},
    "fsdp": {"data": 1, "fsdp": 8},
    "data_tensor": {"data": 4, "tensor": 2},
    "all_three": {"data": 2, "fsdp": 2, "tensor": 2},
    "fsdp_tensor": {"data": 1, "fsdp": 2, "tensor": 4},
}
VARIANTS = {
    "separate": {},
    "tied": {"model__tied_head": True},
    # Chunks of the loss, microbatches, grouped queries and remat on top of one another.
    "everything": {
        "model__num_kv_heads": 4,
        "model__remat": "block",
        "model__qk_norm": True,
        "training__batch_size": 16,
        "training__num_microbatches": 2,
        "training__z_loss": 1e-3,
        "training__max_logits_mib": 1,
    },
}


def make_config(**changes):
    small = {
        "model__depth": 2,
        "model__width": 32,
        "model__num_heads": 8,
        "model__vocab_size": 4096,
        "data__seq_len": 16,
        "training__batch_size": 8,
        "training__steps": 10,
        "optim__lr": 1e-2,
    }
    return resolve(replace(Config(), **small | changes), vocab_size=256, platform="cpu", fingerprint="")


def trajectory(config, layout, num_devices):
    """[step, (loss, grad_norm)] and the final state, of random tokens that are the same on every mesh."""
    mesh = make_mesh(MeshConfig(**layout), jax.devices()[:num_devices])
    rng = np.random.default_rng(0)
    shape = (config.training.batch_size, config.data.seq_len + 1)
    values = []
    with jax.set_mesh(mesh):
        program = make_program(config, define(config.model), mesh)
        state = program.init(config.seed)
        for _ in range(STEPS):
            tokens = rng.integers(config.model.vocab_size, size=shape, dtype=np.int32)
            state, metrics = program.train(state, jax.device_put(tokens, program.batch_sharding))
            values.append((float(metrics["loss"]), float(metrics["grad_norm"])))
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


CASES = [("span", variant, layout) for variant in VARIANTS for layout in LAYOUTS]
CASES += [(placement, "separate", "all_three") for placement in ("pre", "post", "span_raw")]


@pytest.mark.parametrize(("placement", "variant", "layout"), CASES)
def test_eight_devices_train_as_one(one_device, placement, variant, layout):
    config, expected = one_device(placement, variant)
    values, _ = trajectory(config, LAYOUTS[layout], 8)
    # Sums in another order: measured 4e-7 at most over all cases, which AdamW's first steps (signs of gradients) could
    # amplify on other hardware. A wrong reduction is off by a factor, a lost shard by 1e-2.
    np.testing.assert_allclose(values, expected, rtol=5e-6)


def test_every_weight_and_moment_lies_as_the_table_says():
    config = make_config()
    layout = {"data": 2, "fsdp": 2, "tensor": 2}
    _, state = trajectory(config, layout, 8)
    model = define(config.model)
    size = {axis: int(np.prod([layout[m] for m in mesh_axes])) for axis, mesh_axes in LOGICAL_AXES.items()}

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
            return jax.device_get(make_program(config, define(config.model), mesh).init(3).params)

    jax.tree.map(np.testing.assert_array_equal, weights({"data": 1}, 1), weights(LAYOUTS["all_three"], 8))


def test_minus_one_takes_the_devices_that_are_left():
    assert mesh_shape(MeshConfig(data=-1, tensor=2), 8) == {"data": 4, "fsdp": 1, "tensor": 2}
    assert mesh_shape(MeshConfig(data=2, fsdp=-1), 8) == {"data": 2, "fsdp": 4, "tensor": 1}


@pytest.mark.parametrize("sizes", [{"data": 3}, {"data": -1, "tensor": 3}, {"data": 16}, {"data": 2, "fsdp": 2}])
def test_a_mesh_that_does_not_multiply_to_the_devices(sizes):
    with pytest.raises(UserError, match=r"mesh\.data=.* 8 devices .*-1"):
        mesh_shape(MeshConfig(**sizes), 8)


@pytest.mark.parametrize(
    ("changes", "shape", "says"),
    [
        ({}, {"data": 16}, "training.batch_size=8 .*mesh.data x mesh.fsdp=16"),
        ({"model__width": 24}, {"fsdp": 16}, "model.width=24 .*mesh.fsdp=16"),
        ({"model__num_heads": 4}, {"tensor": 8}, "model.num_heads=4 .*mesh.tensor=8"),
        ({"model__num_kv_heads": 2}, {"tensor": 4}, "model.num_kv_heads=2 .*mesh.tensor=4"),
        ({"model__ffn_dim": 36}, {"tensor": 8}, "model.ffn_dim=36 .*mesh.tensor=8"),
        ({"model__vocab_size": 257}, {"tensor": 2}, "model.vocab_size=257 .*mesh.tensor=2"),
    ],
)
def test_a_mesh_that_does_not_divide_the_model(changes, shape, says):
    rows = 16 if "fsdp" in shape else 8
    with pytest.raises(UserError, match=says):
        full = {"data": 1, "fsdp": 1, "tensor": 1} | shape
        check_divisible(make_config(**changes), full, "training.batch_size", rows)


def test_a_misused_axis_is_a_fault():
    with pytest.raises(KeyError):
        partition_spec(("embde",))
    with pytest.raises(ValueError, match="twice"):
        partition_spec(("heads", "ffn"))


def test_the_config_knows_the_axes_of_the_mesh():
    assert {m for axes in LOGICAL_AXES.values() for m in axes} == set(configs.MeshConfig.__dataclass_fields__)
