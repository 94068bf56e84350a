"""What the plan of a step says, against sums by hand; and the command, on devices that this machine lacks."""

import functools
import math
import os
import subprocess
import sys

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType
from planned import CONFIGS
from processes import LIMIT_S

from spannorm_jax.config import replace
from spannorm_jax.config_file import load, resolve_without_data
from spannorm_jax.errors import UserError
from spannorm_jax.model.definition import define
from spannorm_jax.parallel.mesh import check_divisible, make_mesh, mesh_shape
from spannorm_jax.plan import dry_run
from spannorm_jax.resolution import resolve
from spannorm_jax.training.step import make_program

DEPTH, WIDTH, HIDDEN, VOCAB, ROWS, TIME = 5, 64, 192, 512, 16, 32
MATRICES = 4 * WIDTH * WIDTH + 3 * WIDTH * HIDDEN  # of a block
GAINS = 2 * WIDTH
ALL_GAINS = DEPTH * GAINS + WIDTH
PARAMS = DEPTH * (MATRICES + GAINS) + 2 * VOCAB * WIDTH + WIDTH


@functools.cache
def needs(data=1, fsdp=1, **changes):
    """On eight devices: `data` x `fsdp`."""
    small = {
        "model__depth": DEPTH,
        "model__width": WIDTH,
        "model__ffn_dim": HIDDEN,
        "model__vocab_size": VOCAB,
        "data__seq_len": TIME,
        "training__batch_size": ROWS,
    }
    config = replace(load(f"{CONFIGS}/dense.py", []), **small | changes, mesh__data=data, mesh__fsdp=fsdp)
    config = resolve(config, vocab_size=256, platform="accelerator", fingerprint="")
    live = len(jax.live_arrays())
    found = dry_run.measure(config, make_mesh(config.mesh))
    assert len(jax.live_arrays()) <= live + 1  # at most a random key
    return found


def test_memory_of_a_device_is_what_lies_there():
    found = needs(data=2, fsdp=4)
    counters = 2 * 4  # AdamW's and the schedule's
    assert found.params == PARAMS
    here = (PARAMS - ALL_GAINS) * 4 // 4 + ALL_GAINS * 4  # gains are whole on every device
    assert found.state == {"parameters": here, "optimizer": 2 * here + counters}
    assert found.gradients == here
    # XLA's account of the same: state, the run's step, this device's rows of tokens, and the numbers but for the three
    # that only experts read.
    batch, numbers = ROWS // 8 * (TIME + 1) * 4, 11 * 4
    assert found.xla["arguments"] == sum(found.state.values()) + 4 + batch + numbers
    assert found.xla["temporaries"] > found.activations


def in_blocks(found, kind, sliced=False):
    """Bytes of what happens once a block and pass."""
    return sum(c.bytes for c in found.collectives if (c.count, c.kind, c.sliced) == (DEPTH, kind, sliced))


@pytest.mark.parametrize(("dtype", "size"), [("bfloat16", 2), ("float32", 4)])
def test_fsdp_gathers_each_weight_twice_and_scatters_its_gradient_once(dtype, size):
    """Of the blocks: forward and backward, matrices in the compute dtype. Gains are whole, their gradients float32."""
    found = needs(fsdp=8, model__dtype=dtype)
    share = 7 / 8
    assert in_blocks(found, "all_gather") == share * 2 * MATRICES * size
    assert in_blocks(found, "all_reduce", sliced=True) == 2 * share * MATRICES * size
    assert in_blocks(found, "all_reduce") == 2 * share * GAINS * 4
    assert in_blocks(found, "reduce_scatter") == 0


def test_replicas_sum_each_gradient_once():
    found = needs(data=8)
    assert in_blocks(found, "all_gather") == 0
    assert in_blocks(found, "all_reduce") == 2 * 7 / 8 * (MATRICES * 2 + GAINS * 4)


def test_kept_activations_are_those_of_the_remat_policy():
    """With remat=block, of each block its input and nothing else that grows with the batch."""
    block = needs(data=8, execution__remat="block").activations
    everything = needs(data=8).activations
    inputs = DEPTH * ROWS // 8 * TIME * WIDTH * 2
    ends = ROWS // 8 * TIME * (VOCAB * 4 * 3 + WIDTH * 4 * 4)  # logits and the like in float32, the last norm
    assert inputs < block < inputs + ends
    assert everything > block + DEPTH * ROWS // 8 * TIME * (4 * WIDTH + 3 * HIDDEN) * 2
    halves = needs(data=8, execution__remat="block", training__num_microbatches=2)
    assert 2 * halves.activations == block
    assert halves.gradients == 2 * PARAMS * 4  # those of a microbatch and their sum


# ---- the 16b preset, which fits on no machine of ours -------------------------------------------------------


@pytest.mark.parametrize(("devices", "fsdp", "expert"), [(32, 8, 4), (8, 2, 4)])
def test_16b_per_device_by_hand(devices, fsdp, expert):
    """Experts are split over fsdp and expert, all else over fsdp alone."""
    D, F, L, V, H = 2048, 1408, 27, 102400, 11264
    config = resolve_without_data(load(f"{CONFIGS}/moe.py:16b", []), "accelerator")
    shape = mesh_shape(config.mesh, devices)
    assert shape == {"data": 1, "fsdp": fsdp, "expert": expert, "tensor": 1}
    check_divisible(config, shape, "a microbatch", config.training.batch_size // 32)
    mesh = AbstractMesh(tuple(shape.values()), tuple(shape), axis_types=(AxisType.Auto,) * 4)
    state = make_program(config, define(config.model, config.execution), mesh).abstract_state
    experts = (L - 1) * 64 * 3 * D * F
    attention, shared, dense, router = L * 4 * D * D, (L - 1) * 2 * 3 * D * F, 3 * D * H, (L - 1) * D * 64
    others, gains = attention + shared + dense + router + 2 * V * D, (2 * L + 1) * D
    here = 4 * (experts // (fsdp * expert) + others // fsdp + gains)
    assert sum(math.prod(x.sharding.shard_shape(x.shape)) * 4 for x in jax.tree.leaves(state.params)) == here
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert sum(math.prod(x.sharding.shard_shape(x.shape)) * 4 for x in moments) == 2 * here


# ---- the command -----------------------------------------------------------------------------------------------


def test_the_command(tmp_path):
    """Sixteen devices, where JAX finds none or few; an experts' model; nothing is written."""
    command = [sys.executable, "-m", "spannorm_jax.plan", "--devices=16", "--device_kind=TPU v5p"]
    command += [f"--config={CONFIGS}/moe.py:depth=1,width=32", "--workdir=run", "--config.mesh.expert=4"]
    command += ["--config.training.batch_size=16", "--config.data.dataset=no_such_dataset"]
    env = {**os.environ, "PYTHONPATH": str(CONFIGS.parent), "XDG_CACHE_HOME": str(tmp_path), "HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())
    for said in (
        "16 x TPU v5p, mesh {'lane': 1, 'data': 4, 'fsdp': 1, 'expert': 4, 'tensor': 1}",
        "shaped with attention blocked, grouped matmul padded, compute bfloat16",
        "at the peak of TPU v5\n",
        "share of 95 GB",
        "all-reduce, among 16",
        "of a condition, if it takes branch 0\n  all-to-all, among 4 ",
    ):
        assert said in done.stdout, done.stdout


def test_a_mesh_of_the_wrong_size_says_so_before_it_compiles(monkeypatch):
    monkeypatch.setattr(dry_run, "measure", lambda *_: pytest.fail("compiled"))
    config = load(f"{CONFIGS}/dense.py", [("mesh.fsdp", "3")])
    with pytest.raises(UserError, match=r"mesh\.fsdp=3.* 256 devices"):
        dry_run.dry_run(config, 256)


def test_a_place_in_the_program_reads_like_the_model():
    loop = "while/body/closed_call/checkpoint"
    assert dry_run._place(f"jit(train_step)/transpose(jvp())/{loop}/block/moe/psum") == "backward block/moe/psum"
    assert (
        dry_run._place(f"jit(train_step)/jvp()/{loop}/block/(ffn/dot:norm/mul)") == "forward block/ffn/dot and others"
    )
    remat = f"jit(train_step)/transpose(jvp())/{loop}/rematted_computation/loss/head/dot"
    assert dry_run._place(remat) == "remat loss/head/dot"
