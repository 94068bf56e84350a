"""What a sweep says: best learning rates, paired differences, sensitivity, optima, the profile; by hand."""

import math
import shutil

import polars as pl
import pytest
from run_folders import rows_of, write_lr_sweep, write_run

from spannorm_jax.report import frames, stats
from spannorm_jax.report.curves import block_curves, loss_curves
from spannorm_jax.report.study import Place, best_lr, differences, optimum, overall, sensitivities, study

PLACE = Place(3, 64)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    return study(rows_of(write_lr_sweep(tmp_path_factory.mktemp("lr"))))


def method(about, placement):
    return next(m for m in about.methods if m.placement == placement)


def test_the_compared_loss_is_held_out_where_all_that_finished_have_it(tmp_path, sweep):
    assert sweep.measure == "held-out"
    write_run(tmp_path / "a", seed=0, bits=2.0)
    write_run(tmp_path / "b", seed=1)
    about = study(rows_of(tmp_path))
    assert about.measure == "training"
    assert [about.loss(row) for row in about.rows] == pytest.approx([3.15, 3.15])


def test_a_run_that_diverged_counts_with_its_loss_at_initialisation(sweep):
    rows = sweep.cells[method(sweep, "post"), PLACE, 0.1]
    assert [sweep.loss(row) for row in rows.values()] == [None] * 3
    assert [sweep.capped(row) for row in rows.values()] == [5.0] * 3


def test_an_unfinished_run_has_no_loss_and_one_above_its_start_is_capped(tmp_path):
    write_run(tmp_path / "a", losses=[5.0] * 4, done=False)
    write_run(tmp_path / "b", losses=[5.0] + [7.0] * 19, bits=7.0, seed=1)
    about = study(rows_of(tmp_path))
    assert [about.capped(row) for row in about.rows] == [None, 5.0]


def test_each_method_has_its_best_learning_rate(sweep):
    assert [best_lr(sweep, m, PLACE) for m in sweep.methods] == [1e-2] * 3


def test_differences_are_by_seed_at_the_best_and_at_the_baselines_learning_rate(tmp_path):
    root = write_lr_sweep(tmp_path)
    # SpanNorm is best at 0.1 by a hair, where its seeds end otherwise.
    for seed in range(3):
        shutil.rmtree(root / f"span-3-0.1-{seed}")
        end = [1.4, 1.3, 1.35][seed]
        losses = [5.0, *[end] * 19]
        write_run(root / f"span-3-0.1-{seed}", "span", "plain", losses=losses, bits=end, optim__lr=0.1, seed=seed)
    about = study(rows_of(root))
    assert about.baseline == {"placement": "pre", "init": "plain"}
    by_placement = {own.method.placement: (own, shared) for own, shared in differences(about)}
    own, shared = by_placement["span"]
    # PreNorm at 0.01: 2.0 + 0.02 x seed.
    assert (own.lr, own.partner_lr, own.pairs) == (0.1, 1e-2, 3)
    expected = stats.t_interval([1.4 - 2.0, 1.3 - 2.02, 1.35 - 2.04])
    assert own.interval.mean == pytest.approx(expected.mean) and own.interval.low == pytest.approx(expected.low)
    assert (shared.lr, shared.partner_lr) == (1e-2, 1e-2)
    assert (shared.interval.mean, shared.interval.low, shared.interval.high) == pytest.approx((-0.5, -0.5, -0.5))
    assert by_placement["post"][0].interval.mean == pytest.approx(0.5)


def test_a_seed_that_only_one_finished_is_in_no_difference_and_n_says_so(tmp_path):
    root = write_lr_sweep(tmp_path, lrs=(1e-2,), placements=("pre", "span"))
    shutil.rmtree(root / "span-3-0.01-1")
    (root / "span-3-0.01-2" / "DONE").unlink()
    ((own, _),) = differences(study(rows_of(root)))
    assert (own.interval.n, own.pairs) == (1, 3)


def test_a_baseline_of_one_key_compares_at_the_others_own(tmp_path):
    for i, (placement, init) in enumerate([("pre", "plain"), ("pre", "scale"), ("span", "plain"), ("span", "scale")]):
        write_run(tmp_path / str(i), placement, init, bits=2.0 - 0.1 * i)
    rows = rows_of(tmp_path)

    def pairs(baseline):
        return [(own.method.label, own.partner.label) for own, _ in differences(study(rows, baseline))]

    assert pairs(None) == [(m, "pre / plain") for m in ("pre / scale", "span / plain", "span / scale")]
    assert pairs({"placement": "pre"}) == [("span / plain", "pre / plain"), ("span / scale", "pre / scale")]
    assert pairs({"init": "scale"}) == [("pre / plain", "pre / scale"), ("span / plain", "span / scale")]


def test_another_config_key_may_be_the_baseline(tmp_path):
    for i, targets in enumerate([("ffn_out",), ("attn_out", "ffn_out")]):
        write_run(tmp_path / str(i), bits=2.0 - 0.1 * i, model__init_targets=targets)
    about = study(rows_of(tmp_path), {"model.init_targets": "attn_out,ffn_out"})
    ((own, _),) = differences(about)
    assert own.method.label == "span / scale, init_targets=ffn_out" and own.interval.mean == pytest.approx(0.1)


def test_sensitivity_is_wortsmans_over_the_shared_learning_rates(sweep):
    found = {m.placement: interval for m, _, interval in sensitivities(sweep)}
    # Pre: losses 2.1, 2.0, 2.1 and 0.01 x seed x (1, 2, 3); each seed's mean less its least.
    by_hand = [(2.1 + 0.01 * s + 2.0 + 0.02 * s + 2.1 + 0.03 * s) / 3 - (2.0 + 0.02 * s) for s in range(3)]
    assert found["pre"].mean == pytest.approx(sum(by_hand) / 3) and found["pre"].n == 3
    # Post has its first loss, 5, for the learning rate at which it diverged.
    by_hand = [(2.6 + 0.01 * s + 2.5 + 0.02 * s + 5.0) / 3 - (2.5 + 0.02 * s) for s in range(3)]
    assert found["post"].mean == pytest.approx(sum(by_hand) / 3)


def test_sensitivity_needs_three_shared_learning_rates(tmp_path):
    root = write_lr_sweep(tmp_path, placements=("pre", "span"), seeds=(0,))
    assert len(sensitivities(study(rows_of(root)))) == 2
    shutil.rmtree(root / "pre-3-0.1-0")
    assert sensitivities(study(rows_of(root))) == []


def test_the_optimum_lies_between_and_not_at_an_end(sweep):
    found = optimum(sweep, method(sweep, "pre"), PLACE)
    # Seed 0 is symmetric about 0.01; the others rise faster to the right, so their optimum is left of it.
    assert found.n == 3 and 1e-3 < found.mean < 1e-2 and found.low < found.mean < found.high
    only = study([row for row in sweep.rows if row.seed == 0])
    assert optimum(only, method(only, "pre"), PLACE).mean == pytest.approx(1e-2)
    ends = study([row for row in sweep.rows if row.lr > 1e-3])
    assert optimum(ends, method(ends, "pre"), PLACE) is None


def test_over_all_settings_needs_enough_of_them(tmp_path, sweep):
    assert overall(sweep) == []  # three learning rates
    about = study(rows_of(write_lr_sweep(tmp_path, depths=(3, 6, 12), placements=("pre", "span"))))
    (found,) = overall(about)
    assert (found.settings, found.lower, found.interval.n) == (9, 9, 27)
    assert (found.interval.mean, found.interval.low, found.interval.high) == pytest.approx((-0.5, -0.5, -0.5))


# ---- tables of figures ------------------------------------------------------------------------


def test_the_outcome_map_has_no_hole(tmp_path):
    root = write_lr_sweep(tmp_path, placements=("pre", "post"), depths=(3, 6))
    for folder in root.glob("pre-6-0.001-*"):
        shutil.rmtree(folder)
    (root / "pre-3-0.01-0" / "DONE").unlink()
    table = frames.outcomes_table(study(rows_of(root)))
    assert table.height == 2 * 2 * 3
    cells = {
        (p, d, lr): (o, t) for p, d, lr, o, t in table.select("placement", "depth", "lr", "outcome", "text").rows()
    }
    assert cells["pre", 6, 1e-3] == ("unfinished", "–")
    assert cells["pre", 3, 1e-2] == ("unfinished", "U 1/3")
    assert cells["post", 3, 1e-1] == ("diverged", "D 3/3")
    assert cells["pre", 6, 1e-1] == ("trained", "T 3/3")


def test_the_forest_has_both_comparisons_of_each_method_and_place(tmp_path, sweep):
    table = frames.differences_table(sweep)
    assert table.select("method", "comparison").rows() == [
        (f"{p} / plain", kind) for p in ("post", "span") for kind in (frames.OWN, frames.SHARED)
    ]
    assert table["difference"].to_list() == pytest.approx([0.5, 0.5, -0.5, -0.5])
    assert set(table["panel"]) == {""} and set(table["seeds"]) == {3}
    places = study(rows_of(write_lr_sweep(tmp_path, lrs=(1e-2,), depths=(3, 6))))
    table = frames.differences_table(places)
    assert table.select("panel", "comparison").unique(maintain_order=True).rows() == [
        ("3 blocks", frames.OWN),
        ("6 blocks", frames.OWN),
    ]


def test_the_profile_is_of_all_runs(sweep):
    table = frames.profile_table(sweep)
    ends = table.group_by("placement").agg(pl.col("share").last(), pl.col("runs").first())
    assert sorted(ends.rows()) == [("post", pytest.approx(6 / 9), 9), ("pre", 1.0, 9), ("span", 1.0, 9)]
    at = table.filter((pl.col("placement") == "pre") & (pl.col("loss") <= 2.03))["share"].max()
    assert at == pytest.approx(2 / 9)  # 2.0 and 2.02 at the learning rate in the middle


def test_settings_are_over_seeds_and_say_what_diverged(sweep):
    table = frames.settings_table(frames.runs_table(sweep))
    pre = table.filter((pl.col("placement") == "pre") & (pl.col("lr") == 1e-2)).row(0, named=True)
    assert (pre["loss"], pre["low"], pre["high"], pre["n"]) == (pytest.approx(2.02), 2.0, pytest.approx(2.04), 3)
    assert pre["best_lr"] and pre["diverged"] == 0
    post = table.filter((pl.col("placement") == "post") & (pl.col("lr") == 1e-1)).row(0, named=True)
    assert (post["loss"], post["diverged"]) == (5.0, 3)


def test_curves_are_the_mean_with_least_and_greatest_of_the_seeds_that_count(tmp_path):
    for seed, loss in enumerate([1.0, 2.0, 4.0]):
        write_run(tmp_path / str(seed), losses=[loss] * 20, seed=seed)
    (write_run(tmp_path / "3", losses=[3.0, 9.0], seed=3, done=False) / "DIVERGED").write_text('{"step": 3}')
    table = loss_curves(study(rows_of(tmp_path)))
    mean = table.filter(~pl.col("alone")).select("loss", "low", "high", "runs").unique().rows()
    assert mean == [(pytest.approx(7 / 3), 1.0, 4.0, "mean of 3 seeds")]
    alone = table.filter("alone").select("step", "loss", "crossed").rows()
    assert alone == [(1, 3.0, False), (2, 9.0, True)]
    assert table["tokens"][0] == 8 * 128 and table["flops"][0] == pytest.approx(8 * 128 * 7.4e3)


def test_curves_of_many_steps_keep_their_ends(tmp_path):
    steps = 5000
    losses = [1.0 + 4.0 * math.exp(-s / 500) for s in range(steps)]
    write_run(tmp_path / "run", losses=losses, training__steps=steps)
    table = loss_curves(study(rows_of(tmp_path)))
    assert table.height <= 300 and (table["step"].min(), table["step"].max()) == (1, steps)


def test_late_curves_are_the_last_third_of_runs_that_reach_it(tmp_path):
    write_run(tmp_path / "run", losses=[3.0 + (-1) ** step for step in range(60)], training__steps=60)
    write_run(tmp_path / "short", "pre", losses=[3.0] * 30, done=False, training__steps=60)
    late = loss_curves(study(rows_of(tmp_path)), late=True)
    assert late["step"].to_list() == list(range(41, 61)) and late["placement"].unique().to_list() == ["span"]
    losses = late["loss"].to_list()
    assert max(abs(loss - 3.0) for loss in losses) <= 0.25  # over 7 steps, and 4 at the end: 1 / 7 and less


def test_block_norms_are_geometric_means(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path / str(seed), losses=[3.0] * (4 + 12 * seed), seed=seed)
    table = block_curves(study(rows_of(tmp_path)))
    last = table.filter((pl.col("when") == "at the last record") & (pl.col("block") == 0)).row(0, named=True)
    assert (last["low"], last["high"]) == (pytest.approx(0.4), pytest.approx(1.6))  # 0.1 x step
    assert last["norm"] == pytest.approx(math.sqrt(0.4 * 1.6))
