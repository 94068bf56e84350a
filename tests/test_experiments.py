"""The benchmarks' numbers, on models that take a moment."""

import json

import pytest

from experiments.benchmarks import moe_throughput
from spannorm_jax.errors import UserError


def test_experts_are_measured_against_a_dense_model_of_the_same_active_flops(tmp_path, capsys, own_caches):
    path = tmp_path / "speed.json"
    config = ("--config=configs/throughput.py", "--config.model.depth=1", "--config.model.width=32")
    small = ("--config.data.seq_len=16", "--config.model.ffn_dim=64", "--config.model.num_heads=2")
    times = ("--rounds=2", "--steps=1", f"--json={path}")
    both = "--grouped_matmul=padded,ragged_dot"
    assert moe_throughput.main([*config, *small, *times, "--experts=4", "--top_k=2", both]) == 0
    record = json.loads(path.read_text())
    dense, *others = record["models"].values()
    dense_flops = dense["model_flops_per_s"] * dense["step_s"]
    assert list(record["models"]) == ["dense", "4 experts, padded", "4 experts, ragged_dot"]
    for got in others:
        assert got["active_params"] == dense["num_params"] + 32 * 4  # the router's
        # Twice the feed-forward in all, of it half active.
        assert got["num_params"] == got["active_params"] + 2 * 32 * 64
        flops = got["model_flops_per_s"] * got["step_s"] / dense_flops
        assert flops == pytest.approx(1 + 6 * 32 * 4 * record["tokens_per_step"] / dense_flops, rel=1e-9)
        ratios = [d / m for d, m in zip(dense["step_times_s"], got["step_times_s"], strict=True)]
        assert flops * min(ratios) <= got["rate_over_dense"] <= flops * max(ratios)
    assert record["command"].startswith("python -m experiments.benchmarks.moe_throughput --config=configs/throughput")
    assert "ragged_dot" in capsys.readouterr().out


def test_experts_that_cannot_be_measured_are_refused(own_caches):
    for arguments, says in ((["--experts=four"], "'four'"), (["--top_k=7"], "--top_k=7")):
        with pytest.raises(UserError, match=says):
            moe_throughput.main(["--config=configs/throughput.py", *arguments])
