"""Odd command lines: each is a run that can start, or is refused in one line."""

from experiments.campaigns import fuzz


def test_no_case_ends_otherwise(capsys):
    cases = fuzz.campaign(count=48, seed=1)
    assert [case for case in cases if case["outcome"] == "hole"] == []
    outcomes = {case["kind"]: set() for case in cases}
    for case in cases:
        outcomes[case["kind"]].add(case["outcome"])
    assert outcomes["legal"] == {"valid"}
    assert outcomes["misspelt key"] == {"refused"}
    assert len(outcomes) == len(fuzz.MUTATIONS)


def test_the_campaign_sees_a_hole_and_a_hang(monkeypatch):
    def fail(argv):
        raise ZeroDivisionError("division by zero")

    def hang(argv):
        while True:
            pass

    monkeypatch.setattr(fuzz, "start", fail)
    assert fuzz.attempt([])[0] == "hole"
    monkeypatch.setattr(fuzz, "start", hang)
    outcome, seen = fuzz.attempt([], limit_s=0.05)
    assert outcome == "hole" and "no answer" in seen
