"""The fault campaign in short: kills, two trainers, damage and a full disk, in real processes."""

import pytest

from experiments.campaigns import fault_records, faults
from experiments.campaigns.fault_runs import STEPS, Campaign, cut, flip, refused

pytestmark = pytest.mark.process


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


@pytest.mark.parametrize("part", fault_records.PARTS)
def test_what_the_records_say_holds_against_names_and_files(campaign, part):
    part(campaign)
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


@pytest.mark.slow
def test_the_whole_campaign(tmp_path):
    cases = faults.campaign(tmp_path, num_kills=5, seed=1, show=print)
    assert [case for case in cases if not case["ok"]] == []
