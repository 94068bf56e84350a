"""The table in configs/moe.py, against the configs and parameter counts by hand."""

import re
from pathlib import Path

import pytest

import spannorm_jax
from spannorm_jax.config_file import load, resolve_without_data
from spannorm_jax.model.definition import count_params, define

MOE = Path(spannorm_jax.__file__).parents[1] / "configs" / "moe.py"
ROW = r"(\d+) +(\d+) +(\d+) +(\d+) \((\d+)\) +(\d+) +(\d+)(?: \(bytes\))?(, tied)? +([\d,]+) +([\d,]+)"


def hand_count(m, experts):
    """Parameters, with so many routed experts in each block that has them."""
    D, F, moe = m.width, m.moe.expert_dim, m.moe
    with_experts = m.depth - moe.first_dense
    blocks = m.depth * (4 * D * D + 2 * D) + moe.first_dense * 3 * D * m.ffn_dim
    blocks += with_experts * ((experts + moe.num_shared) * 3 * D * F + D * moe.num_experts)
    return blocks + D + m.vocab_size * D * (1 if m.tied_head else 2)


@pytest.mark.parametrize("preset", ["tiny", "8x124m", "64x8-124m", "16b"])
def test_presets_have_the_size_that_their_table_says(preset):
    m = resolve_without_data(load(f"{MOE}:{preset}", []), "accelerator").model
    row = re.search(rf"^{preset} +{ROW}", MOE.read_text(), re.MULTILINE).groups()
    *shape, tied, total, active = row
    shape = [int(n) for n in shape]
    moe = m.moe
    assert shape == [m.depth, m.width, m.num_heads, moe.num_experts, moe.top_k, moe.expert_dim, m.vocab_size]
    assert bool(tied) == m.tied_head
    model = define(m)
    assert int(total.replace(",", "")) == count_params(model) == hand_count(m, moe.num_experts)
    assert int(active.replace(",", "")) == count_params(model, active=True) == hand_count(m, moe.top_k)
