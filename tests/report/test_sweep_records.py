"""The page of results that is made of the records of sweeps."""

import math

import numpy as np
import pytest
import scipy.stats
from run_folders import write_run

from experiments import results_page
from spannorm_jax.errors import UserError


def test_the_page_has_each_losss_mean_spread_and_failures(tmp_path, monkeypatch):
    for seed, bits in enumerate([2.0, 2.2, 2.1]):
        write_run(tmp_path / f"runs/lr/a{seed}", "pre", "plain", bits=bits, seed=seed)
        losses = [5.0] * 20 if seed == 2 else None  # no better than the frequencies of bytes
        write_run(tmp_path / f"runs/lr/b{seed}", "span", "scale", losses=losses, bits=bits - 0.5, seed=seed)
    template = tmp_path / "template.md"
    template.write_text(
        '{{ sweeps.lr.table("placement", "init") }}\n\n'
        '{{ sweeps.lr.difference(("span", "scale-L1"), ("pre", "plain")) }}'
    )
    monkeypatch.setattr(results_page, "TEMPLATE", template)
    page = results_page.write_page(tmp_path / "runs", tmp_path / "results.md", tmp_path)
    assert page.read_text().splitlines() == [
        "| placement | plain | ScaleInit-L1 |",
        "| --- | --- | --- |",
        "| PreNorm | 2.100 ± 0.100 | not run |",
        "| SpanNorm | not run | 1.600 ± 0.100 (1 of 3 plateau) |",
        "",
        "−0.500 [−0.500, −0.500], n 3, own spread",
    ]


def results(tmp_path, name, runs):
    for i, (placement, init, changes) in enumerate(runs):
        write_run(tmp_path / name / f"run{i}", placement, init, **changes)
    return results_page.Results(name, results_page.read(tmp_path / name), tmp_path, "")


def test_recipes_are_compared_at_their_own_best_rate(tmp_path):
    """SpanNorm is best at 1e-2, PreNorm at the highest rate, and with Muon at the lowest."""
    bits = {
        ("span", "adamw"): {1e-3: 2.4, 1e-2: 2.0, 1e-1: 2.6},
        ("pre", "adamw"): {1e-3: 2.5, 1e-2: 2.3, 1e-1: 2.2},
        ("pre", "muon"): {1e-3: 2.6, 1e-2: 2.7, 1e-1: 2.8},
    }
    runs = [
        (placement, "plain", {"bits": b + 0.01 * seed, "optim__lr": lr, "optim__name": optimizer, "seed": seed})
        for (placement, optimizer), by_lr in bits.items()
        for lr, b in by_lr.items()
        for seed in range(2)
    ]
    found = results(tmp_path, "rivals", runs)
    table = found.by_rate(0.01, "SpanNorm, plain", depth=found.study.rows[0].depth).splitlines()
    ends = " (an end of the grid)"
    assert table[2:] == [
        "| SpanNorm, plain | 2.005 ± 0.007 | 0.01 |  | 2.005 ± 0.007 |",
        f"| PreNorm, plain | 2.205 ± 0.007 | 0.1{ends} | +0.200 [+0.200, +0.200], n 2 | 2.305 ± 0.007 |",
        f"| PreNorm, plain, Muon | 2.605 ± 0.007 | 0.001{ends} | +0.600 [+0.600, +0.600], n 2 | 2.705 ± 0.007 |",
    ]
    pre = {"placement": "pre", "optim.name": "adamw"}
    grid = found.grid("recipe", {"pre": pre, "post": {"placement": "post"}}, {"all": {}}, own_best=True)
    assert grid.splitlines()[2:] == ["| pre | 2.205 ± 0.007 at 0.1 |", "| post | not run |"]
    assert found.between({"lr": 0.1}, {"lr": 0.001}, **pre) == "−0.300 [−0.300, −0.300], n 2"
    assert found.ahead(pre | {"lr": 0.1}, pre | {"lr": 0.001}) and not found.alike(
        pre | {"lr": 0.1}, pre | {"lr": 0.001}
    )


def test_differences_of_the_page_have_the_error_of_all_arms_that_trained(tmp_path):
    """Against two-way analysis by hand; a HybridNorm with a seed on a plateau, and other rates, take no part."""
    ends = {"pre": [2.00, 2.10, 2.05], "span": [1.90, 1.98, 1.99], "peri": [2.02, 2.09, 2.10]}
    runs = [(name, "plain", {"bits": b, "seed": i}) for name, each in ends.items() for i, b in enumerate(each)]
    runs += [("hybrid", "plain", {"bits": 3.0 * i, "seed": i, "losses": [5.0] * 20}) for i in range(3)]
    runs += [("pre", "plain", {"bits": 4.0 * i, "seed": i, "optim__lr": 0.1}) for i in range(3)]
    found = results(tmp_path, "both", runs)
    table = np.array(list(ends.values()))
    left = table - table.mean(axis=1, keepdims=True) - table.mean(axis=0) + table.mean()
    half = scipy.stats.t.ppf(0.975, 4) * math.sqrt((left**2).sum() / 4 * 2 / 3)
    interval, pooled = found.judged({"placement": "span"}, {"placement": "pre"}, lr=0.003)
    mean = (table[1] - table[0]).mean()
    assert pooled and (interval.low, interval.high) == pytest.approx((mean - half, mean + half))
    assert found.between({"placement": "hybrid"}, {"placement": "pre"}, lr=0.003).endswith("n 3, own spread")
    assert found.failing == [("hybrid", "plain")] and found.fails(placement="hybrid")
    assert found.trains(placement="span") and not found.trains(placement="olmo2") and not found.fails(placement="olmo2")


def test_a_page_whose_sentence_does_not_hold_is_refused(tmp_path, monkeypatch):
    write_run(tmp_path / "runs/lr/a", "post", "gpt2", bits=2.0)
    template, page = tmp_path / "template.md", tmp_path / "results.md"
    template.write_text('{{ claim(sweeps.lr.fails(placement="post"), "PostNorm trains with no seed") }}PostNorm fails.')
    monkeypatch.setattr(results_page, "TEMPLATE", template)
    with pytest.raises(UserError, match="says what its records do not: PostNorm trains with no seed; mend the words"):
        results_page.write_page(tmp_path / "runs", page, tmp_path)
    assert not page.exists()
    write_run(tmp_path / "runs/lr/b", "pre", "gpt2", bits=2.0)
    template.write_text('{{ claim(sweeps.lr.trains(placement="post"), "") }}PostNorm trains.')
    assert results_page.write_page(tmp_path / "runs", page, tmp_path).read_text() == "PostNorm trains.\n"


def test_what_the_device_chose_makes_no_other_method_and_a_seed_without_evaluation_is_said(tmp_path):
    seeds = enumerate([("float32", 2.0), ("bfloat16", 2.2), ("float32", None)])
    runs = [("pre", "plain", {"bits": bits, "model__dtype": dtype, "seed": i}) for i, (dtype, bits) in seeds]
    found = results(tmp_path, "both", runs)
    assert found.study.settings["runs"].to_list() == [3] and found.loss() == "2.100 ± 0.141 (1 of 3 not evaluated)"


def test_runs_of_two_machines_are_compared_by_name(tmp_path):
    here = results(tmp_path, "here", [("pre", "plain", {"bits": bits}) for bits in (2.0, 2.1, 2.2)])
    plateau = {"losses": [5.0] * 20, "bits": 5.0}
    again = results(tmp_path, "again", [("pre", "plain", {"bits": 2.0}), ("pre", "plain", {"bits": 2.3}),
                                        ("pre", "plain", plateau), ("post", "plain", {"bits": 2.0})])  # fmt: skip
    text = "2 of 3 end alike, and the 2 that trained in both differ by +0.100 ± 0.141 nats"
    assert again.again(here) == text


def test_a_figure_of_the_page_is_drawn_beside_it_in_the_view_that_is_asked_for(tmp_path):
    runs = [("pre", "plain", {"bits": 2.0, "seed": i, "optim__lr": lr}) for i in range(2) for lr in (1e-3, 1e-2)]
    found = results(tmp_path, "both", runs)
    pictures = []
    for view in ("", "near the best"):
        assert found.figure("loss_by_lr", "By rate", view) == "![By rate](/both-loss_by_lr.png)"
        pictures.append((tmp_path / "both-loss_by_lr.png").read_bytes())
    assert pictures[0] != pictures[1] and pictures[0].startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="both has no figure loss_by_depth: Loss against depth: needs two depths"):
        found.figure("loss_by_depth", "")
    assert found.report("learning_rates").splitlines()[2].startswith("| pre / plain | 0.001 (end) |")
