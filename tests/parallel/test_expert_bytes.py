"""What experts send between eight devices, as XLA compiled it, against the formula of model/moe/experts.py."""

import jax
import pytest

from spannorm_jax.config import Config, MeshConfig, replace
from spannorm_jax.model.definition import define
from spannorm_jax.model.moe import experts
from spannorm_jax.parallel.mesh import make_mesh
from spannorm_jax.plan.collectives import collectives
from spannorm_jax.plan.hlo import Module
from spannorm_jax.resolution import resolve
from spannorm_jax.training.numbers import numbers_of
from spannorm_jax.training.step import make_program

ROWS, SEQ_LEN, WIDTH, DEPTH = 8, 16, 32, 3


def compiled(mode, layout, **changes):
    """The collectives of a train step in float32, and its config."""
    small = {
        "model__depth": DEPTH,
        "model__width": WIDTH,
        "model__num_heads": 8,
        "model__placement": "pre",
        "model__moe__num_experts": 8,
        "model__moe__expert_dim": 48,
        "execution__expert_parallel": mode,
        "data__seq_len": SEQ_LEN,
        "training__batch_size": ROWS,
    }
    config = replace(Config(), **small | changes)
    config = resolve(config, vocab_size=256, platform="cpu", fingerprint="")
    mesh = make_mesh(MeshConfig(**layout), jax.devices()[:8])
    with jax.set_mesh(mesh):
        program = make_program(config, define(config.model, config.execution), mesh)
        lowered = program.train.lower(program.abstract_state, program.abstract_batch, numbers_of(config))
        found = collectives(Module(lowered.compile().as_text()))
    return found, config


def moved_bytes(config, mode, shards, n):
    """The formula, for the tokens of one of so many shards of the batch and n devices that exchange."""
    tokens, top_k = ROWS * SEQ_LEN // shards, config.model.moe.top_k
    capacity = experts.capacity_rows(config.execution.capacity, tokens * top_k, n)
    return experts.moved_bytes(mode, top_k, capacity, tokens, n, WIDTH, 4)


def exchanged(found, kinds, group, branch=()):
    """Bytes a device receives by these kinds of collectives in groups of this size, within the experts."""
    return sum(
        c.total for c in found if c.kind in kinds and c.group == group and c.branch == branch and "moe" in c.name
    )


LAYOUTS = [
    ({"data": 1, "expert": 8}, "dots"),
    ({"data": 2, "expert": 4}, "none"),
    ({"data": 1, "expert": 4, "tensor": 2}, "dots"),
]


@pytest.mark.parametrize(("layout", "remat"), LAYOUTS, ids=str)
def test_all_to_all_moves_the_bytes_of_the_formula(layout, remat):
    """With remat=dots too: what was exchanged is kept. The ring in the other branch is not what runs."""
    found, config = compiled("all_to_all", layout, execution__remat=remat)
    n, shards = layout["expert"], layout["expert"] * layout["data"]
    want = moved_bytes(config, "all_to_all", shards, n)
    assert exchanged(found, {"all_to_all"}, n, branch=(0,)) == DEPTH * want
    assert not exchanged(found, {"all_gather", "reduce_scatter"}, n, branch=(0,))


@pytest.mark.parametrize(("layout", "remat"), LAYOUTS, ids=str)
def test_the_ring_moves_the_bytes_of_the_formula(layout, remat):
    found, config = compiled("ring", layout, execution__remat=remat)
    n, shards = layout["expert"], layout["expert"] * layout["data"]
    want = moved_bytes(config, "ring", shards, n)
    assert exchanged(found, {"all_gather", "reduce_scatter"}, n) == DEPTH * want
    assert not exchanged(found, {"all_to_all"}, n)


def test_auto_takes_what_moves_less():
    """Of 8 experts, 2 a token: 7 shards' tokens against 1.5 x 2 rows a token, so all_to_all from 4 shards on."""
    exchanges = [
        experts.exchange_for(2, experts.capacity_rows(1.5, 2 * 1024, shards), 1024, shards, 64, 4)
        for shards in (1, 2, 4, 8)
    ]
    assert exchanges == ["local", "ring", "all_to_all", "all_to_all"]


def test_routing_gathers_no_scores():
    """Each device ranks the experts of its own tokens."""
    found, _ = compiled("auto", {"data": 8})
    assert not [c for c in found if "router" in c.name and c.kind == "all_gather"]
