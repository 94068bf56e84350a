"""Our programs by the TPU's own compiler, which needs no TPU: `make test-tpu`, in a venv that has libtpu.

What is asserted is what a user of a pod relies on: the programs compile, attention is the kernel's, a weight is
gathered in the compute dtype, the head once a step, an activation never; and SpanNorm costs what PreNorm costs.
"""

import importlib.util

import pytest
from planned import (
    CONFIGS,
    FSDP,
    VOCAB,
    WIDE,
    WIDTH,
    assert_gathers_weights_in_the_compute_dtype_and_no_activation,
    costs,
    open_target,
    train_cost,
)

from spannorm_jax.config_file import load
from spannorm_jax.model.placement import PLACEMENTS
from spannorm_jax.plan import target

pytestmark = [
    pytest.mark.tpu,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: make test-tpu"),
]


TOPOLOGY = "v5e:2x2"


def train(placement="span", slices=1, **overrides):
    return train_cost(TOPOLOGY, slices, placement, overrides)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_placement_trains(placement):
    cost = train(placement, **FSDP)
    assert "tpu_custom_call" in cost.text
    assert "splash_mha_fwd" in cost.text
    assert_gathers_weights_in_the_compute_dtype_and_no_activation(cost)


@pytest.mark.parametrize("chunks_mib", [0, 1])
def test_the_head_is_gathered_and_its_gradient_summed_once_a_step(chunks_mib):
    """Also where the loss has pieces: of 4 rows a device 1 MiB holds a sixteenth of the logits of 1,024 positions.

    No weight of a block brings as many bytes as the head.
    """
    vocab = 2 * VOCAB
    cost = train(**FSDP, **{"execution.max_logits_mib": chunks_mib, "data.seq_len": 1024, "model.vocab_size": vocab})
    large = [c for c in cost.collectives if c.bytes >= vocab * WIDTH]
    assert {c.count for c in large} == {1}
    assert [c.kind for c in large if "loss" in c.name].count("all_gather") == 1


def test_spannorm_costs_what_prenorm_costs():
    span, pre = train("span", **WIDE), train("pre", **WIDE)
    assert span.all_cycles == pytest.approx(pre.all_cycles, rel=0.05)
    assert span.memory == pytest.approx(pre.memory, rel=0.05)
    received = [sum(c.received for c in cost.collectives) for cost in (span, pre)]
    assert received[0] == pytest.approx(received[1], rel=0.01)


@pytest.mark.parametrize("grouped_matmul", ["ragged_dot", "padded"])
def test_experts_train(grouped_matmul):
    moe = {"model.moe.top_k": 2, "mesh.expert": 4, "mesh.data": 1, "model.moe.expert_dim": 128}
    cost = train(**moe, **{"execution.grouped_matmul": grouped_matmul})
    assert ("ragged-dot" in cost.text) == (grouped_matmul == "ragged_dot")
    assert {"all_to_all"} <= {c.kind for c in cost.collectives}


@pytest.mark.parametrize("program", ["evaluate", "signal", "sample", "lanes"])
def test_other_programs_compile(program):
    for cost in costs(TOPOLOGY, 1, program).values():
        assert min(cost.memory, cost.cycles) > 0
        assert not cost.unknown


@pytest.mark.parametrize(("slices", "overrides"), [(1, {"data.seq_len": 100}), (2, FSDP | {"mesh.data": 4})])
def test_positions_that_no_block_divides_and_two_slices_run_the_kernel(slices, overrides):
    assert "splash_mha_fwd" in train(slices=slices, **overrides).text


def test_what_does_not_fit_is_refused_with_what_would(capsys):
    """100 GB of logits, in one piece, on 16 GB."""
    large = {"model.vocab_size": 200192, "training.batch_size": 512, "data.seq_len": 1024}
    overrides = [(key, str(value)) for key, value in (large | {"execution.max_logits_mib": 10**6}).items()]
    config = load(f"{CONFIGS}/dense.py:tiny,depth=2,width=128", overrides)
    assert target.plan(config, None, open_target(TOPOLOGY, 1), "train", 1) == 0
    said = capsys.readouterr().out
    assert "does not fit" in said
    assert "num_microbatches" in said
