"""What a sweep says: best learning rates, paired differences, sensitivity, optima, the profile; by hand."""

import itertools
import math
import shutil

import numpy as np
import polars as pl
import pytest
import scipy.stats
from run_folders import study_in, write_lr_sweep, write_run

from spannorm_jax.report import frames, stats
from spannorm_jax.report.comparisons import OWN, SHARED, differences, errors, overall, replicates
from spannorm_jax.report.curves import WINDOW, block_curves, gap_curves, loss_curves
from spannorm_jax.report.folders import find_runs
from spannorm_jax.report.rates import drifts, rates
from spannorm_jax.report.study import Size, choosing, study_of

SIZE = Size(3, 64)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    return study_in(write_lr_sweep(tmp_path_factory.mktemp("lr")))


def compared(study, kind=OWN):
    """Label -> the line of its difference."""
    lines = differences(study).filter(comparison=kind).iter_rows(named=True)
    return {study.methods[line["method"]].label: line for line in lines}


def rates_of(study, placement):
    (index,) = (i for i, m in enumerate(study.methods) if m.placement == placement)
    return rates(study).filter(method=index).row(0, named=True)


def test_the_compared_loss_is_held_out_where_all_that_finished_have_it(tmp_path, sweep):
    assert sweep.measure == "held-out"
    write_run(tmp_path / "a", seed=0, bits=2.0)
    write_run(tmp_path / "b", seed=1)
    study = study_in(tmp_path)
    assert study.measure == "training"
    assert study.runs["loss"].to_list() == pytest.approx([3.15, 3.15])


def test_a_run_that_diverged_or_ends_above_its_start_counts_with_its_loss_at_initialisation(tmp_path, sweep):
    assert sweep.runs.filter(placement="post", lr=0.1).select("loss", "capped").rows() == [(None, 5.0)] * 3
    write_run(tmp_path / "a", losses=[5.0] * 4, done=False)
    write_run(tmp_path / "b", losses=[5.0] + [7.0] * 19, bits=7.0, seed=1)
    study = study_in(tmp_path)
    assert study.runs.sort("seed")["capped"].to_list() == [None, 5.0]


def test_each_method_has_its_best_learning_rate_and_an_end_of_its_grid_is_told(sweep):
    assert [sweep.at_an_end((0, *SIZE), lr) for lr in (1e-3, 1e-2, 1e-1)] == [True, False, True]
    assert not study_of([row for row in sweep.rows if row.lr == 1e-2]).at_an_end((0, *SIZE), 1e-2)
    assert sweep.best == dict.fromkeys([(i, *SIZE) for i in range(3)], 1e-2)


def test_differences_are_by_seed_at_the_best_and_at_the_baselines_learning_rate(tmp_path):
    root = write_lr_sweep(tmp_path)
    for seed in range(3):  # SpanNorm is best at 0.1 by a hair, where its seeds end otherwise
        shutil.rmtree(root / f"span-3-0.1-{seed}")
    write_arms(root, {"span": [1.4, 1.3, 1.35]}, lrs=(1e-1,))
    study = study_in(root)
    assert study.baseline == {"placement": "pre", "init": "plain"}
    own, shared = (compared(study, kind)["span / plain"] for kind in (OWN, SHARED))
    # PreNorm at 0.01: 2.0 + 0.02 x seed.
    assert (own["lr"], own["baseline_lr"], own["pairs"]) == (0.1, 1e-2, 3)
    expected = stats.t_interval([1.4 - 2.0, 1.3 - 2.02, 1.35 - 2.04])
    assert (own["difference"], own["low"]) == (pytest.approx(expected.mean), pytest.approx(expected.low))
    assert (shared["lr"], shared["baseline_lr"]) == (1e-2, 1e-2)
    assert (shared["difference"], shared["low"], shared["high"]) == pytest.approx((-0.5, -0.5, -0.5))
    assert compared(study)["post / plain"]["difference"] == pytest.approx(0.5)


def test_a_seed_that_only_one_finished_is_in_no_difference_and_n_says_so(tmp_path):
    root = write_lr_sweep(tmp_path, lrs=(1e-2,), placements=("pre", "span"))
    shutil.rmtree(root / "span-3-0.01-1")
    (root / "span-3-0.01-2" / "DONE").unlink()
    (own,) = compared(study_in(root)).values()
    assert (own["n"], own["pairs"], own["low"]) == (1, 3, None)


def test_a_baseline_of_one_key_compares_at_the_others_own(tmp_path):
    for i, (placement, init) in enumerate([("pre", "plain"), ("pre", "scale"), ("span", "plain"), ("span", "scale")]):
        write_run(tmp_path / str(i), placement, init, bits=2.0 - 0.1 * i)
    rows = find_runs(tmp_path)

    def pairs(baseline):
        study = study_of(rows, baseline)
        return [(label, study.methods[line["baseline"]].label) for label, line in compared(study).items()]

    assert pairs(None) == [(m, "pre / plain") for m in ("pre / scale-L1", "span / plain", "span / scale-L1")]
    assert pairs({"placement": "pre"}) == [("span / plain", "pre / plain"), ("span / scale-L1", "pre / scale-L1")]
    assert pairs({"init": "scale-L1"}) == [("pre / plain", "pre / scale-L1"), ("span / plain", "span / scale-L1")]


def test_another_config_key_may_be_the_baseline(tmp_path):
    for i, targets in enumerate([("ffn_out",), ("attn_out", "ffn_out")]):
        write_run(tmp_path / str(i), bits=2.0 - 0.1 * i, model__init_targets=targets)
    study = study_in(tmp_path, {"model.init_targets": "attn_out,ffn_out"})
    assert compared(study)["span / scale-L1, init_targets=ffn_out"]["difference"] == pytest.approx(0.1)


def test_sensitivity_is_wortsmans_over_the_shared_learning_rates(sweep):
    found = rates_of(sweep, "pre")
    # Pre: losses 2.1, 2.0, 2.1 and 0.01 x seed x (1, 2, 3); each seed's mean less its least.
    by_hand = [(2.1 + 0.01 * s + 2.0 + 0.02 * s + 2.1 + 0.03 * s) / 3 - (2.0 + 0.02 * s) for s in range(3)]
    assert (found["sensitivity"], found["seeds"]) == (pytest.approx(sum(by_hand) / 3), 3)
    # Post has its first loss, 5, for the learning rate at which it diverged.
    by_hand = [(2.6 + 0.01 * s + 2.5 + 0.02 * s + 5.0) / 3 - (2.5 + 0.02 * s) for s in range(3)]
    assert rates_of(sweep, "post")["sensitivity"] == pytest.approx(sum(by_hand) / 3)


def test_sensitivity_needs_three_shared_learning_rates(tmp_path):
    root = write_lr_sweep(tmp_path, placements=("pre", "span"), seeds=(0,))
    assert rates(study_in(root))["sensitivity"].null_count() == 0
    shutil.rmtree(root / "pre-3-0.1-0")
    assert rates(study_in(root))["sensitivity"].to_list() == [None, None]


def test_the_optimum_lies_between_and_not_at_an_end(sweep):
    found = rates_of(sweep, "pre")
    # Seed 0 is symmetric study 0.01; the others rise faster to the right, so their optimum is left of it.
    assert found["n"] == 3 and 1e-3 < found["at"] < 1e-2 and found["low"] < found["at"] < found["high"]
    assert rates_of(study_of([row for row in sweep.rows if row.seed == 0]), "pre")["at"] == pytest.approx(1e-2)
    # PostNorm diverges at 0.1, above its best rate: of where it is best only the two sides are known.
    cliff = rates_of(sweep, "post")
    assert [cliff[key] for key in ("kind", "at", "low", "high", "n")] == ["cliff", None, 1e-3, 1e-1, 3]
    assert rates_of(study_of([row for row in sweep.rows if row.lr > 1e-3]), "pre")["kind"] is None


def test_a_method_that_trains_nowhere_has_no_optimum(tmp_path):
    write_arms(tmp_path, {"post": [3.9, 3.95]}, lrs=(1e-3, 1e-2, 1e-1))
    study = study_in(tmp_path)
    assert {row.outcome for row in study.rows} == {"plateau"}
    assert rates_of(study, "post")["kind"] is None


def test_drifts_are_of_the_optima_and_say_only_their_cells_at_cliffs(tmp_path):
    study = study_in(write_lr_sweep(tmp_path, depths=(3, 6)))
    found = {d["method"]: d["factor"] for d in drifts(study)}
    assert found["pre / plain"].at == pytest.approx(1.0)  # the same losses at both depths
    post = found["post / plain"]
    assert (post.at, post.low, post.high) == (None, pytest.approx(1e-2), pytest.approx(1e2))


def write_arms(root, losses, lrs=(1e-2,), first=0, **changes):
    """A run for each arm and seed: `losses` has an arm's by name; a rate further from the first costs 0.1 more."""
    for (placement, ends), (i, lr) in itertools.product(losses.items(), enumerate(lrs)):
        for seed, end in enumerate(ends, first):
            run = [5.0, *[end + 0.1 * i] * 19]
            settings = {"optim__lr": lr, "seed": seed} | changes
            write_run(root / f"{placement}-{lr}-{seed}", placement, "plain", losses=run, bits=run[-1], **settings)
    return root


ENDS = {"pre": [2.00, 2.10, 2.05], "span": [1.90, 1.98, 1.99], "peri": [2.02, 2.09, 2.10]}


def test_the_error_is_pooled_over_the_arms_that_trained_and_ps_are_holms(tmp_path):
    """Against two-way analysis by hand; PostNorm, of which a seed is on a plateau, is neither in it nor judged."""
    study = study_in(write_arms(tmp_path, ENDS | {"post": [2.5, 2.4, 3.95]}))
    table = np.array(list(ENDS.values()))
    left = table - table.mean(axis=1, keepdims=True) - table.mean(axis=0) + table.mean()
    error = math.sqrt((left**2).sum() / 4)
    assert [(e.df, e.deviation) for _, _, e in errors(study)] == [(4, pytest.approx(error))]
    pre, span, peri, post = (compared(study).get(f"{name} / plain") for name in ("pre", "span", "peri", "post"))
    assert pre is None
    half = scipy.stats.t.ppf(0.975, 4) * error * math.sqrt(2 / 3)
    mean = (table[1] - table[0]).mean()
    assert (span["pooled_low"], span["pooled_high"]) == pytest.approx((mean - half, mean + half))
    own = scipy.stats.ttest_rel(table[1], table[0]).confidence_interval(0.95)
    assert (span["low"], span["high"]) == pytest.approx((own.low, own.high))
    raw = [2 * scipy.stats.t.sf(abs(d["difference"]) / error / math.sqrt(2 / 3), 4) for d in (span, peri)]
    assert (span["p"], peri["p"]) == (pytest.approx(2 * raw[0]), pytest.approx(max(2 * raw[0], raw[1])))
    assert (post["pooled_low"], post["p"], post["n"]) == (None, None, 3)


def test_comparisons_that_were_named_are_judged_apart(tmp_path):
    rows = find_runs(write_arms(tmp_path, ENDS))
    both, alone = compared(study_of(rows)), compared(study_of(rows, confirmed={"placement": "span"}))
    assert alone["span / plain"]["p"] == pytest.approx(both["span / plain"]["p"] / 2)
    assert {label: line["named"] for label, line in alone.items()} == {"span / plain": True, "peri / plain": False}
    assert not any(line["named"] for line in both.values())


def test_rates_are_chosen_on_some_seeds_and_reported_on_others_where_there_are_enough(tmp_path):
    """SpanNorm's seeds 0 to 2 are best at the first rate; its others are best at the second, and are reported."""
    write_arms(tmp_path, {"pre": [2.0] * 6, "span": [1.5] * 3 + [1.9] * 3}, lrs=(1e-2, 1e-1))
    for seed in range(3, 6):
        shutil.rmtree(tmp_path / f"span-0.1-{seed}")
    write_arms(tmp_path, {"span": [1.0] * 3}, lrs=(1e-1,), first=3)
    study = study_in(tmp_path)
    assert (sorted(choosing(study.runs)), sorted(study.reported)) == ([0, 1, 2], [3, 4, 5])
    (own,) = compared(study).values()
    assert (own["lr"], own["n"], own["pairs"], own["difference"]) == (1e-2, 3, 3, pytest.approx(1.9 - 2.0))
    few = study_of([row for row in study.rows if row.seed < 5])
    assert choosing(few.runs) == few.reported == frozenset(range(5))


def test_equal_runs_under_two_names_are_found(tmp_path):
    write_arms(tmp_path / "one", {"pre": [2.0, 2.1], "span": [1.9, 2.1]})
    write_arms(tmp_path / "two", {"pre": [2.0, 2.2]}, model__parametrisation="mup")
    found = replicates(study_in(tmp_path))
    assert [(one.label, other.label, count) for (one, other), count in found.items()] == [
        ("pre / plain, parametrisation=mup", "pre / plain, parametrisation=standard", 1),
        ("pre / plain, parametrisation=standard", "span / plain, parametrisation=standard", 1),
    ]


def test_over_all_settings_needs_enough_of_them(tmp_path, sweep):
    assert overall(sweep) == []  # three learning rates
    study = study_in(write_lr_sweep(tmp_path, depths=(3, 6, 12), placements=("pre", "span")))
    ((_, _, interval, settings, lower),) = overall(study)
    assert (settings, lower, interval.n) == (9, 9, 27)
    assert (interval.mean, interval.low, interval.high) == pytest.approx((-0.5, -0.5, -0.5))


def test_the_outcome_map_has_no_hole(tmp_path):
    root = write_lr_sweep(tmp_path, placements=("pre", "post"), depths=(3, 6))
    for folder in root.glob("pre-6-0.001-*"):
        shutil.rmtree(folder)
    (root / "pre-3-0.01-0" / "DONE").unlink()
    table = frames.named(study := study_in(root), frames.endings(study))
    assert table.height == 2 * 2 * 3
    endings = {line[:3]: line[3:] for line in table.select("placement", "depth", "lr", "outcome", "text").iter_rows()}
    assert endings["pre", 6, 1e-3] == ("unfinished", "–") and endings["pre", 3, 1e-2] == ("unfinished", "1U 2T")
    assert endings["post", 3, 1e-1] == ("diverged", "3D") and endings["pre", 6, 1e-1] == ("trained", "3T")


def test_the_forest_has_both_comparisons_of_each_method_and_place(tmp_path, sweep):
    table = frames.named(sweep, frames.forest(sweep))
    assert table.select("method", "comparison").rows() == [
        (f"{p} / plain", kind) for p in ("post", "span") for kind in (OWN, SHARED)
    ]
    assert table["difference"].to_list() == pytest.approx([0.5, 0.5, -0.5, -0.5])
    assert set(table["panel"]) == {""} and set(table["seeds"]) == {3}
    places = study_in(write_lr_sweep(tmp_path, lrs=(1e-2,), depths=(3, 6)))
    pairs = frames.forest(places).select("panel", "comparison").unique(maintain_order=True)
    assert pairs.rows() == [("3 blocks", OWN), ("6 blocks", OWN)]


def test_the_profile_is_of_all_runs(sweep):
    table = frames.named(sweep, frames.profiles(sweep))
    ends = table.group_by("placement").agg(pl.col("share").last(), pl.col("runs").first())
    assert sorted(ends.rows()) == [("post", pytest.approx(6 / 9), 9), ("pre", 1.0, 9), ("span", 1.0, 9)]
    at = table.filter((pl.col("placement") == "pre") & (pl.col("loss") <= 2.03))["share"].max()
    assert at == pytest.approx(2 / 9)  # 2.0 and 2.02 at the learning rate in the middle


def test_settings_are_over_seeds_and_say_what_diverged(sweep):
    table = sweep.settings
    pre = table.filter((pl.col("placement") == "pre") & (pl.col("lr") == 1e-2)).row(0, named=True)
    assert (pre["loss"], pre["low"], pre["high"], pre["n"]) == (pytest.approx(2.02), 2.0, pytest.approx(2.04), 3)
    assert pre["best_lr"] and pre["diverged"] == 0
    post = table.filter((pl.col("placement") == "post") & (pl.col("lr") == 1e-1)).row(0, named=True)
    assert (post["loss"], post["diverged"]) == (5.0, 3)


def test_curves_are_the_mean_with_least_and_greatest_of_the_seeds_that_count(tmp_path):
    for seed, loss in enumerate([1.0, 2.0, 4.0]):
        write_run(tmp_path / str(seed), losses=[loss] * 20, seed=seed)
    (write_run(tmp_path / "3", losses=[3.0, 9.0], seed=3, done=False) / "DIVERGED").write_text('{"step": 3}')
    table = loss_curves(study_in(tmp_path))
    mean = table.filter(~pl.col("alone")).select("loss", "low", "high", "runs").unique().rows()
    assert mean == [(pytest.approx(7 / 3), 1.0, 4.0, "mean of 3 seeds")]
    alone = table.filter("alone").select("step", "loss", "crossed").rows()
    assert alone == [(1, 3.0, False), (2, 9.0, True)]
    assert table["tokens"][0] == 8 * 128 and table["flops"][0] == pytest.approx(8 * 128 * 7.4e3)


def test_curves_of_many_steps_keep_their_ends(tmp_path):
    steps = 5000
    losses = [1.0 + 4.0 * math.exp(-s / 500) for s in range(steps)]
    write_run(tmp_path / "run", losses=losses, training__steps=steps)
    table = loss_curves(study_in(tmp_path))
    assert table.height <= 300 and (table["step"].min(), table["step"].max()) == (1, steps)


def test_late_curves_are_the_last_third_of_runs_that_reach_it(tmp_path):
    write_run(tmp_path / "run", losses=[3.0 + (-1) ** step for step in range(60)], training__steps=60)
    write_run(tmp_path / "short", "pre", losses=[3.0] * 30, done=False, training__steps=60)
    late = loss_curves(study_in(tmp_path), late=True)
    assert late["step"].to_list() == list(range(41, 61)) and set(late["method"]) == {1}
    losses = late["loss"].to_list()
    assert max(abs(loss - 3.0) for loss in losses) <= 0.25  # over 7 steps, and 4 at the end: 1 / 7 and less


def test_block_norms_are_geometric_means(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path / str(seed), losses=[3.0] * (4 + 12 * seed), seed=seed)
    table = block_curves(study_in(tmp_path))
    last = table.filter((pl.col("when") == "at the last record") & (pl.col("block") == 0)).row(0, named=True)
    assert (last["low"], last["high"]) == (pytest.approx(0.4), pytest.approx(1.6))  # 0.1 x step
    assert last["norm"] == pytest.approx(math.sqrt(0.4 * 1.6))


def test_the_gap_along_a_run_is_the_windows_mean_of_paired_losses_at_own_rates(tmp_path):
    """512 steps whose noise is the batches': 0.3 ahead up to step 256, 0.1 behind from there; seed 1 stops at 300."""
    steps = np.arange(1, 513)
    for seed in (0, 1):
        noise = np.random.default_rng(seed).normal(size=512)
        ahead = np.where(steps <= 256, -0.3, 0.1)
        for placement, lr, gap in (("pre", 0.01, 0.0), ("span", 0.01, 1.0), ("span", 0.003, ahead)):
            losses = (3 + noise + gap + 0.01 * seed * (placement == "span")).tolist()
            stops = seed == 1 and lr == 0.003
            run = {"losses": losses[: 300 if stops else 512], "done": not stops, "seed": seed}
            write_run(tmp_path / f"{placement}{lr}{seed}", placement, **run, optim__lr=lr, training__steps=512)
    study = study_in(tmp_path, {"placement": "pre"})
    table = gap_curves(study)
    assert (
        [study.methods[i].placement for i in set(table["method"])] == ["span"]
        and set(table["lr"]) == {0.003}
        and set(table["baseline_lr"]) == {0.01}
    )
    assert table["step"].to_list() == pytest.approx([512 / WINDOW ** (k + 0.5) for k in range(11, -1, -1)])
    assert table["seeds"].to_list() == [2] * 10 + [1] * 2
    assert table["gap"].to_list() == pytest.approx([-0.295] * 10 + [0.1] * 2)
    assert table["low"].to_list() == pytest.approx([-0.3] * 10 + [0.1] * 2)
    assert table["tokens"][-1] == pytest.approx(table["step"][-1] * study.rows[0].tokens_per_step)


def test_readings_are_compared_each_with_its_own_where_the_first_placement_has_all(tmp_path):
    for placement, exponent in (("pre", 1.0), ("span", 0.0)):
        write_run(tmp_path / f"{placement}{exponent}", placement, model__variance_exponent=exponent)
    assert study_in(tmp_path).baseline == {"placement": "pre", "init": "scale-L1"}
    write_run(tmp_path / "other", "pre", model__variance_exponent=0.0)
    assert study_in(tmp_path).baseline == {"placement": "pre"}
