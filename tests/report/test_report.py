"""Rows and tables: numbers against hand-computed ones, how a run ended, what is said when runs cannot be compared."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from processes import LIMIT_S
from run_folders import ENTROPY, STEPS, reached, study_in, write_eval, write_lr_sweep, write_run

from spannorm_jax.errors import UserError
from spannorm_jax.report.__main__ import keys_of, main
from spannorm_jax.report.folders import read_run
from spannorm_jax.report.runs import LEARNT, RunFolder, ending
from spannorm_jax.report.tables import notices, text_table
from spannorm_jax.sweep.expansion import expand
from spannorm_jax.sweep.reports import write_report


def texts(root, kind):
    return [text for k, text in notices(study_in(root)) if k == kind]


def table_of(root):
    return text_table(study_in(root))


def test_a_row_holds_the_numbers_computed_by_hand(tmp_path):
    row = read_run(write_run(tmp_path / "run", bits=2.5))
    assert (row.placement, row.init, row.seed) == ("span", "scale-L1", 0)
    assert (row.depth, row.width, row.lr) == (3, 64, 3e-3)
    assert row.reached == {
        "tokens": STEPS * 8 * 128,
        "flops": pytest.approx(STEPS * 8 * 128 * 7.4e3),
        "train_loss": pytest.approx((3.2 + 3.1) / 2),  # steps 19 and 20: the last 10% of 20
        **{"bits_per_byte": 2.5, "held_out_loss": 2.5, "over_fourgram": None, "loss_at_init": 5.0, "accuracy": None},
        "over_linear": None,
        "tokens_per_s": pytest.approx(107.0),  # median of 100, 101, ..., 114
        **{"clipped_share": 0.25, "grad_norm_p999": 2.0, "spikes": None},  # spikes need 101 steps
    }
    assert row.ended == "trained"


def test_the_held_out_loss_that_training_measured_stands_in_for_an_evaluation(tmp_path):
    folder = write_run(tmp_path / "run")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for i, expected in ((9, None), (-1, 3.5)):  # of step 10, and of the last
        lines[i]["held_out_loss"] = 3.5
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert reached(folder)["held_out_loss"] == expected
    write_eval(folder, 20, 3.0)
    assert reached(folder)["held_out_loss"] == 3.0


def test_the_train_loss_of_few_steps_is_that_of_the_last_and_spikes_are_the_runs(tmp_path):
    assert reached(write_run(tmp_path / "few", losses=[5.0, 4.0, 3.0]))["train_loss"] == 3.0
    losses = [2.0] * 120 + [2.2] + [2.0] * 29
    assert reached(write_run(tmp_path / "run", losses=losses, training__steps=150))["spikes"] == 1


def test_scores_of_tasks_are_on_the_page_and_no_held_out_numbers(tmp_path):
    folder = write_run(tmp_path / "runs" / "run", bits=2.5)
    score = {"task": "mine", "metric": "acc", "value": 0.5, "stderr": 0.0125, "chance": 0.25, "n": 1600}
    older, damaged = score | {"value": 0.125}, [score | {"metric": "f1", "value": None, "chance": None}, 7]
    with open(folder / "eval.jsonl", "a", encoding="utf-8") as file:
        for step, tasks in ((20, [score, *damaged]), (10, [older]), (20, "none")):
            file.write(json.dumps({"step": step, "loss": 9.0, "split": "validation", "tasks": tasks}) + "\n")
    assert reached(folder)["held_out_loss"] == 2.5 and len(read_run(folder).evals) == 1
    assert main([str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    told = (tmp_path / "out" / "tables.md").read_text(encoding="utf-8")
    assert "| span / scale-L1, seed 0 | mine | acc | 20 | 0.5000 ± 0.0125 | 0.2500 | 1600 |" in told
    assert "| mine | f1 | 20 | – | – | 1600 |" in told and "0.125 " not in told
    assert "<h2>Tasks</h2>" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_newest_evaluation_of_the_highest_step_counts_and_never_the_training_split(tmp_path):
    folder = write_run(tmp_path / "run")
    for step, bits, split, expected in (
        *((20, 0.5, "train", None), (20, 2.0, "validation", 2.0), (20, 1.5, "validation", 1.5)),
        *((10, 3.0, "validation", 1.5), (20, 1.0, "test", 1.5)),
    ):
        write_eval(folder, step, bits, split=split)
        assert reached(folder)["bits_per_byte"] == expected


def test_an_evaluation_by_the_way_is_no_result_of_a_run_that_is_done(tmp_path):
    """Nor is a mean taken over it and others."""
    early = write_run(tmp_path / "early", done=False)
    write_eval(early, 10, 9.0)
    assert reached(early)["bits_per_byte"] == 9.0
    (early / "DONE").write_text('{"step": 20}')
    assert (reached(early)["held_out_loss"], reached(early)["bits_per_byte"]) == (None, None)
    write_run(tmp_path / "other", seed=1, bits=2.0)
    assert study_in(tmp_path).settings["held_out_loss_n"].to_list() == [1]


def test_text_table_is_aligned_and_says_one_seed(tmp_path):
    write_run(tmp_path / "b", "span", "scale", bits=2.5)
    write_run(tmp_path / "a", "post", "plain", losses=[3.9] * STEPS)
    write_run(tmp_path / "c", "pre", "scale", losses=[5.0] * 7, done=False)
    table = table_of(tmp_path).splitlines()
    header = ["placement", "init", "train loss", "held-out bits/byte", "tokens/s", "outcome"]
    assert re.split(r"  +", table[0]) == header
    assert table[2].split() == ["pre", "scale-L1", "5.000", "–", "100", "unfinished", "(step", "7", "of", "20)"]
    assert table[3].split() == ["post", "plain", "3.900", "–", "107", "plateau"]
    assert table[4].split() == ["span", "scale-L1", "3.150", "2.500", "107", "trained"]
    assert {line.index(word) for line, word in zip(table[2:5], ("unf", "plat", "tra"), strict=True)} == {
        table[0].index("outcome")
    }
    assert "one seed (0)" in table[5]


BOUND = (1 - LEARNT) * ENTROPY
FALL = [*np.linspace(5.0, 3.0, 80), *[3.0] * 40]  # 1.0 below the entropy
NOISE = (ENTROPY + np.random.default_rng(0).normal(0, 0.2, 200)).tolist()


@pytest.mark.parametrize(
    ("losses", "kind"),
    [
        ([BOUND] * 200, "trained"),
        ([BOUND + 1e-6] * 200, "plateau"),
        ([*FALL, *[3.9] * 80], "collapsed"),  # above the margin of 0.2 again
        ([*FALL, *[3.6] * 80], "collapsed"),  # below the margin, with less than half of what it had learnt
        ([*FALL, *[3.4] * 80], "trained"),
        (NOISE, "plateau"),  # means of 20 steps spread by 0.045: the least of 180 lies about 0.12 below the entropy
    ],
)
def test_a_run_that_is_done_trained_or_lost_what_it_had_learnt_or_never_learnt(tmp_path, losses, kind):
    assert pytest.approx(3.8) == BOUND and "5%" in RunFolder.outcome.__doc__ and "unigram" in RunFolder.outcome.__doc__
    run = read_run(write_run(tmp_path / "run", losses=losses, training__steps=200))
    assert run.outcome == kind


def test_without_an_entropy_nothing_is_called_a_plateau_and_the_report_says_so(tmp_path):
    assert read_run(write_run(tmp_path / "run", losses=[9.0] * STEPS, entropy=None)).outcome == "trained"
    assert any("Unigram entropy not recorded" in text for text in texts(tmp_path, "note"))


def test_unfinished_until_done_and_diverged_names_the_step(tmp_path):
    folder = write_run(tmp_path / "run", losses=[4.0] * 7, done=False)
    assert read_run(folder).ended == "unfinished (step 7 of 20)"
    (folder / "DIVERGED").write_text('{"step": 8, "where": "the loss", "loss": NaN}')
    assert (read_run(folder).ended, reached(folder)["train_loss"]) == ("diverged (step 8)", None)
    for name in ("metrics.jsonl", "starts.jsonl", "DIVERGED"):
        (folder / name).unlink()
    row = read_run(folder)
    assert row.ended == "unfinished (step 0 of 20)"
    assert (row.reached["train_loss"], row.reached["bits_per_byte"], row.reached["tokens_per_s"]) == (None, None, None)
    # A loss that is not finite is enough.
    folder = write_run(tmp_path / "line", losses=[4.0, 4.0, float("inf")], done=False)
    assert read_run(folder).ended == "diverged (step 3)"


def test_half_a_last_line_is_ignored(tmp_path):
    folder = write_run(tmp_path / "run", bits=2.0)
    whole = reached(folder)
    for name in ("metrics.jsonl", "eval.jsonl", "starts.jsonl"):
        with open(folder / name, "ab") as file:
            file.write('{"step": 21, "loss": "é'.encode()[:-1])
    run = read_run(folder)
    assert reached(folder) == whole and run.last_step == STEPS
    assert (len(run.evals), len(run.starts), len(run.cut), run.damage) == (1, 1, 3, ())
    (note,) = texts(tmp_path, "note")
    assert note.startswith("Half a last line") and str(folder / "metrics.jsonl") in note
    folder = write_run(tmp_path / "whole")  # without a newline
    (folder / "metrics.jsonl").write_text((folder / "metrics.jsonl").read_text().rstrip("\n"))
    assert read_run(folder).last_step == STEPS


def test_seeds_become_mean_and_sample_deviation(tmp_path):
    for seed, (loss, bits) in enumerate([(1.0, 2.0), (2.0, 2.0), (4.5, 2.3)]):
        write_run(tmp_path / str(seed), losses=[loss] * STEPS, bits=bits, seed=seed)
    study = study_in(tmp_path)
    [setting] = study.settings.to_dicts()
    assert (setting["train_loss"], setting["train_loss_n"]) == (2.5, 3)
    assert setting["train_loss_sd"] == pytest.approx(((1.5**2 + 0.5**2 + 2.0**2) / 2) ** 0.5)
    table = text_table(study)
    assert "2.500 ± 1.803" in table and "2.100 ± 0.173" in table and "3 seeds (0, 1, 2)" in table
    assert ending(study.rows) == "2 trained, 1 plateau"  # a mean is over all that finished


def test_means_leave_out_seeds_that_did_not_finish_or_have_no_number_and_say_so(tmp_path):
    for seed, bits in enumerate([2.0, None, 2.2]):
        write_run(tmp_path / str(seed), losses=[1.0 + seed] * STEPS, seed=seed, bits=bits)
    write_run(tmp_path / "3", losses=[9.0] * 4, seed=3, bits=9.0, done=False)
    (write_run(tmp_path / "4", losses=[9.0] * 4, seed=4, done=False) / "DIVERGED").write_text('{"step": 5}')
    line = table_of(tmp_path).splitlines()[2]
    assert re.split(r"  +", line)[2:5] == ["3 of 5", "2.000 ± 1.000", "2.100 ± 0.141 (2 of 3)"]
    assert line.endswith("3 trained, 1 unfinished (step 4), 1 diverged (step 5)")
    (tmp_path / "2" / "eval.jsonl").unlink()
    assert "2.000 (1 of 3)" in table_of(tmp_path)


def test_differing_data_and_config_are_said_and_never_averaged(tmp_path):
    write_run(tmp_path / "a", seed=0)
    write_run(tmp_path / "b", seed=1, fingerprint="beef")
    write_run(tmp_path / "c", seed=2, optim__lr=0.5)
    assert study_in(tmp_path).settings["runs"].to_list() == [1, 1, 1]
    data, uneven = texts(tmp_path, "warning")
    assert "same data" in data and "do not compare" in data and "f00d (2 runs)" in data and "beef (1 run)" in data
    assert uneven.startswith("Not every method was run at the same depths, widths and learning rates")
    assert "optim.lr=0.5" in table_of(tmp_path)


def test_axes_of_a_sweep_are_no_warning_unless_methods_were_run_at_different_ones(tmp_path):
    write_lr_sweep(tmp_path, depths=(3, 6), seeds=(0,))
    assert texts(tmp_path, "warning") == []
    shutil.rmtree(tmp_path / "span-6-0.001-0")
    (uneven,) = texts(tmp_path, "warning")
    assert "span / plain lacks 1 of 6" in uneven


def test_what_follows_from_an_axis_is_a_note_and_splits_no_method(tmp_path):
    for i, (width, ffn) in enumerate([(64, 176), (64, 176), (128, 352)]):
        write_run(tmp_path / str(i), seed=i % 2, model__width=width, model__ffn_dim=ffn)
    also = study_in(tmp_path).settings.select("also", "runs").rows()
    assert also == [("model.width=64", 2), ("model.width=128", 1)] and texts(tmp_path, "warning") == []
    assert texts(tmp_path, "note")[0].startswith("Runs differ in model.ffn_dim: 176 (2 runs), 352 (1 run).")


def test_what_follows_from_an_earlier_key_is_a_note_and_experts_are_a_word(tmp_path):
    write_run(tmp_path / "dense", bits=2.0, model__moe__expert_dim=176)
    write_run(tmp_path / "experts", bits=1.9, model__moe__num_experts=8, model__moe__expert_dim=88)
    table = table_of(tmp_path)
    assert [line.split()[2:4] for line in table.splitlines()[2:4]] == [["dense", "3.150"], ["8", "experts"]]
    assert "expert_dim" not in table
    assert texts(tmp_path, "warning") == ["Runs differ in model.moe.num_experts: 0 (1 run), 8 (1 run)."]
    (note,) = (text for text in texts(tmp_path, "note") if "expert_dim" in text)
    assert note.endswith("It is the same wherever these are: model.moe.num_experts.")
    write_run(tmp_path / "wide", bits=1.8, model__moe__num_experts=8, model__moe__expert_dim=176)  # it says more now
    assert study_in(tmp_path).settings["other"].to_list() == [
        *("dense, expert_dim=176", "8 experts, expert_dim=176", "8 experts, expert_dim=88")
    ]


def test_what_is_compared_is_no_difference_and_runtime_differences_are_notes_and_do_not_split_seeds(tmp_path):
    for i, (placement, init) in enumerate([("pre", "plain"), ("span", "scale"), ("post", "gpt2")]):
        write_run(tmp_path / "compared" / str(i), placement, init)
    assert notices(study_in(tmp_path / "compared")) == []
    shutil.rmtree(tmp_path / "compared")
    write_run(tmp_path / "a", seed=0)
    write_run(tmp_path / "b", seed=1, mesh__fsdp=2, device="gpu")
    assert texts(tmp_path, "warning") == []
    notes = " ".join(texts(tmp_path, "note"))
    assert "mesh.fsdp" in notes and "gpu" in notes
    assert study_in(tmp_path).settings.height == 1


def test_the_same_run_twice_and_an_old_evaluation_are_said(tmp_path):
    write_run(tmp_path / "a")
    write_eval(write_run(tmp_path / "b"), 10, 2.0)
    assert any("several folders" in text for text in texts(tmp_path, "warning"))
    assert any(
        "No evaluation of the last step, so no held-out numbers: span / scale-L1, seed 0 (10 of 20)" in text
        for text in texts(tmp_path, "note")
    )
    # One by hand, of other tokens or on other data, is no result either.
    run = write_run(tmp_path / "d", bits=2.0, seed=4)
    for made in ({"asked_tokens": 3}, {"fingerprint": "beef"}):
        write_eval(run, STEPS, 7.0, **made)
    assert reached(run)["held_out_loss"] == 2.0
    write_eval(write_run(tmp_path / "c", losses=[4.0] * 15, done=False), 10, 2.0)  # still running: the newest there is
    assert any("not of the run's last: span / scale-L1, seed 0 (10 of 15)" in text for text in texts(tmp_path, "note"))


def test_command_prints_the_table_and_the_path(tmp_path, capsys):
    write_run(tmp_path / "run")
    assert main([str(tmp_path), "--title", "T"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("placement") and lines[-1] == str(tmp_path / "report" / "report.html")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--baseline", "pre"], "is not of the form placement=pre,init=plain"),
        (["--baseline", "placement="], "is not of the form"),
        (["--baseline", "placment=pre"], "placment, which tells no runs apart; did you mean 'placement'?"),
        (["--baseline", "placement=post"], "placement=post: no run has it; valid ones are span"),
        (["--confirm", "placement=pre"], "--confirm placement=pre: no run has it; valid ones are span"),
        (["{root}"], "several folders have no one place for their report; say --out FOLDER"),
        (["{root}/missing", "--out", "{root}/out"], "missing is not a folder"),
        (["--out", "{root}/run/DONE"], "DONE cannot be written"),
    ],
)
def test_bad_arguments_are_one_line(tmp_path, arguments, says):
    write_run(tmp_path / "run", "span")
    write_run(tmp_path / "other", "span", "plain")
    with pytest.raises(UserError) as caught:
        main([str(tmp_path), *(argument.format(root=tmp_path) for argument in arguments)])
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "report").exists()


def test_a_baseline_is_config_keys_and_a_value_may_hold_commas():
    pairs = {"model.init_targets": "attn_out,ffn_out", "init": "scale-L1"}
    assert keys_of("model.init_targets=attn_out,ffn_out,init=scale-L1", "--confirm") == pairs


def test_the_command_exits_with_2_and_one_line_and_imports_no_accelerator_library(tmp_path):
    code = (
        "import sys; from spannorm_jax.report.__main__ import main; from spannorm_jax.command import run_command\n"
        "assert not {'altair', 'polars', 'scipy', 'numpy', 'jinja2', 'vl_convert', 'jax'} & set(sys.modules)\n"
        "import spannorm_jax.report.page\n"
        "assert not {'jax', 'flax'} & set(sys.modules)\n"
        f"sys.argv[1:] = [{str(tmp_path / 'missing')!r}]; run_command(main)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and "missing" in done.stderr


def test_a_sweeps_report_tells_the_comparison_that_the_sweep_names_from_the_others(tmp_path):
    """`fresh_seeds` is run for SpanNorm less PreNorm; PostNorm less PreNorm is a look at the same runs."""
    sweep = expand("fresh_seeds", "cpu")
    ends = {"pre": 2.0, "post": 2.2, "span": 1.9}
    runs = [run for run in sweep.runs if run.config.model.variance_exponent == 1 and run.config.optim.lr == 3e-3]

    def write(placements):
        for run in runs:
            placement, seed = run.config.model.placement, run.config.seed
            if placement in placements:
                end = ends[placement] + 0.01 * seed * (1 + (placement == "post"))
                write_run(tmp_path / run.name, placement, losses=[5.0, *[end] * 19], bits=end, seed=seed)
        assert write_report(sweep, tmp_path, table_only=False) == 0
        return (tmp_path / "reports" / "fresh_seeds-cpu" / "tables.md").read_text(encoding="utf-8")

    assert "confirmatory" not in write({"post", "span"})  # the baseline is not there yet
    rows = [line.split(" | ") for line in write({"pre"}).splitlines() if "pre / scale-L1 |" in line]
    assert [row[:3] for row in rows] == [
        ["| post / scale-L1", "pre / scale-L1", "exploratory"],
        ["| span / scale-L1", "pre / scale-L1", "confirmatory"],
    ]
