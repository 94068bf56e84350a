"""The fault campaign in short: kills, two trainers, damage and a full disk, in real processes."""

import json

import pytest

from experiments.campaigns import faults
from experiments.campaigns.fault_runs import STEPS, Campaign, cut, flip, refused


@pytest.fixture(scope="module")
def campaign(tmp_path_factory):
    made = Campaign(tmp_path_factory.mktemp("faults"), seed=0, show=print)
    yield made
    assert [case for case in made.cases if not case["ok"]] == []
    assert len(made.cases) > 1


def test_kills(campaign):
    faults.kills(campaign, 3)
    assert all(case["ok"] for case in campaign.cases), campaign.cases


def test_two_trainers(campaign):
    faults.two_trainers(campaign)
    assert all(case["ok"] for case in campaign.cases), campaign.cases


@pytest.mark.parametrize("damage", [flip, cut])
def test_a_damaged_checkpoint_is_named_and_passed_over(campaign, damage):
    workdir = campaign.copy(f"test {damage.__name__}")
    victim = max((workdir / "checkpoints" / str(STEPS)).rglob("d/*"), key=lambda p: p.stat().st_size)
    damage(victim)
    code, out = campaign.evaluate(workdir, f"--step={STEPS}")
    assert refused(code, out, victim), out
    code, out = campaign.train(workdir)
    assert code == 0 and str(victim) in out and f"continuing after step {STEPS - 2}" in out
    assert faults.metrics(workdir) == campaign.expected
    assert [p.name for p in (workdir / "damaged").iterdir()] == [str(STEPS)]


def test_a_damaged_token_store_is_named(campaign):
    store = next((campaign.folder / "cache").rglob("train/tokens.bin")).parent
    kept = (store / "tokens.bin").read_bytes()
    flip(store / "tokens.bin")
    try:
        code, out = campaign.train(campaign.folder / "never")
    finally:
        (store / "tokens.bin").write_bytes(kept)
    assert refused(code, out, store / "tokens.bin"), out


def test_half_a_line_is_dropped_and_a_broken_one_is_named(tmp_path):
    from spannorm_jax.durable import append_line
    from spannorm_jax.errors import UserError
    from spannorm_jax.run.folder import keep_lines_until

    path = tmp_path / "metrics.jsonl"
    for step in (1, 2, 3):
        append_line(path, {"step": step})
    path.write_text(path.read_text() + '{"step": 4, "lo')
    append_line(path, {"step": 4})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]
    keep_lines_until(path, 2)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]
    for broken in ('{"step": 1}\n{"st\n{"step": 3}\n', '{"step": 1}\n{"step": 1}\n', '{"step": 1}\n[]\n'):
        path.write_text(broken)
        with pytest.raises(UserError, match=r"metrics\.jsonl line 2 is damaged"):
            keep_lines_until(path, 9)
        assert path.read_text() == broken


@pytest.mark.slow
def test_the_whole_campaign(tmp_path):
    cases = faults.campaign(tmp_path, num_kills=5, seed=1, show=print)
    assert [case for case in cases if not case["ok"]] == []
