"""Reports: numbers against hand-computed ones, how a run ended, what is said when runs cannot be compared."""

import base64
import itertools
import re
import subprocess
import sys

import pytest
from processes import LIMIT_S
from run_folders import ENTROPY, STEPS, summary, write_eval, write_run

from spannorm_jax.errors import UserError
from spannorm_jax.report import figures
from spannorm_jax.report.__main__ import main
from spannorm_jax.report.folders import find_runs, read_run
from spannorm_jax.report.page import write_report
from spannorm_jax.report.rows import STALL_MARGIN, Outcome, outcome, over_seeds, summarise, train_loss
from spannorm_jax.report.tables import notices, text_table

PNG = b"\x89PNG\r\n\x1a\n"


def texts(root, kind):
    rows = [summarise(run) for run in find_runs(root)]
    return [text for k, text in notices(rows) if k == kind]


# ---- the numbers ------------------------------------------------------------------------------


def test_a_row_holds_the_numbers_computed_by_hand(tmp_path):
    row = summary(write_run(tmp_path / "run", bits=2.5))
    assert (row.placement, row.init, row.seed) == ("span", "scale", 0)
    assert row.train_loss == pytest.approx((3.2 + 3.1) / 2)  # steps 19 and 20: the last 10% of 20
    assert row.tokens_per_s == pytest.approx(107.0)  # median of 100, 101, ..., 114
    assert row.bits_per_byte == 2.5
    assert str(row.outcome) == "trained"


def test_train_loss_of_few_steps_is_that_of_the_last(tmp_path):
    assert train_loss(read_run(write_run(tmp_path / "run", losses=[5.0, 4.0, 3.0]))) == 3.0


def test_newest_evaluation_of_the_highest_step_counts_and_never_the_training_split(tmp_path):
    folder = write_run(tmp_path / "run")
    assert summary(folder).bits_per_byte is None
    write_eval(folder, 20, 0.5, split="train")
    assert summary(folder).bits_per_byte is None
    write_eval(folder, 20, 2.0)
    write_eval(folder, 20, 1.5)
    write_eval(folder, 10, 3.0)
    write_eval(folder, 20, 1.0, split="test")
    assert summary(folder).bits_per_byte == 1.5


def test_text_table_is_aligned_and_says_one_seed(tmp_path):
    write_run(tmp_path / "b", "span", "scale", bits=2.5)
    write_run(tmp_path / "a", "post", "plain", losses=[3.9] * STEPS)
    write_run(tmp_path / "c", "pre", "scale", losses=[5.0] * 7, done=False)
    table = text_table([summarise(run) for run in find_runs(tmp_path)]).splitlines()
    assert re.split(r"  +", table[0]) == [
        "placement",
        "init",
        "train loss",
        "held-out bits/byte",
        "tokens/s",
        "outcome",
    ]
    assert table[2].split() == ["pre", "scale", "5.000", "-", "100", "unfinished", "(step", "7", "of", "20)"]
    assert table[3].split() == ["post", "plain", "3.900", "-", "107", "stalled"]
    assert table[4].split() == ["span", "scale", "3.150", "2.500", "107", "trained"]
    assert {line.index(word) for line, word in zip(table[2:5], ("unf", "sta", "tra"), strict=True)} == {
        table[0].index("outcome")
    }
    assert "one seed (0)" in table[5]


# ---- how a run ended --------------------------------------------------------------------------


def test_stalled_is_less_than_the_margin_below_the_unigram_entropy(tmp_path):
    bound = (1 - STALL_MARGIN) * ENTROPY
    assert bound == pytest.approx(3.8)
    at = read_run(write_run(tmp_path / "at", losses=[bound] * STEPS))
    above = read_run(write_run(tmp_path / "above", losses=[bound + 1e-6] * STEPS))
    assert (outcome(at).kind, outcome(above).kind) == ("trained", "stalled")
    assert "5%" in outcome.__doc__ and "unigram" in outcome.__doc__


def test_without_an_entropy_nothing_is_called_stalled_and_the_report_says_so(tmp_path):
    assert summary(write_run(tmp_path / "run", losses=[9.0] * STEPS, entropy=None)).outcome.kind == "trained"
    assert any("Unigram entropy not recorded" in text for text in texts(tmp_path, "note"))


def test_unfinished_until_done(tmp_path):
    folder = write_run(tmp_path / "run", losses=[4.0] * 7, done=False)
    assert str(summary(folder).outcome) == "unfinished (step 7 of 20)"
    (folder / "metrics.jsonl").unlink()
    (folder / "starts.jsonl").unlink()
    row = summary(folder)
    assert str(row.outcome) == "unfinished (step 0 of 20)"
    assert (row.train_loss, row.bits_per_byte, row.tokens_per_s) == (None, None, None)


def test_diverged_names_the_step_and_has_no_train_loss(tmp_path):
    folder = write_run(tmp_path / "file", losses=[4.0] * 7, done=False)
    (folder / "DIVERGED").write_text('{"step": 8, "where": "the loss", "loss": NaN}')
    row = summary(folder)
    assert (str(row.outcome), row.train_loss) == ("diverged (step 8)", None)
    # A loss that is not finite is enough.
    folder = write_run(tmp_path / "line", losses=[4.0, 4.0, float("inf")], done=False)
    assert outcome(read_run(folder)) == Outcome("diverged", 3, STEPS)


# ---- folders ----------------------------------------------------------------------------------


def test_half_a_last_line_is_ignored(tmp_path):
    folder = write_run(tmp_path / "run", bits=2.0)
    whole = read_run(folder)
    for name in ("metrics.jsonl", "eval.jsonl", "starts.jsonl"):
        with open(folder / name, "ab") as file:
            file.write('{"step": 21, "loss": "é'.encode()[:-1])
    assert read_run(folder) == whole


def test_a_whole_last_line_without_newline_counts(tmp_path):
    folder = write_run(tmp_path / "run")
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(text.rstrip("\n"))
    assert read_run(folder).last_step == STEPS


def test_find_runs_reads_every_depth_but_not_below_a_run(tmp_path):
    write_run(tmp_path / "b")
    write_run(tmp_path / "a" / "deep" / "run")
    (tmp_path / "b" / "checkpoints" / "20").mkdir(parents=True)
    (tmp_path / "b" / "checkpoints" / "20" / "config.json").write_text("{}")
    assert [run.folder for run in find_runs(tmp_path)] == [tmp_path / "a" / "deep" / "run", tmp_path / "b"]
    assert [run.folder for run in find_runs(tmp_path / "b")] == [tmp_path / "b"]


# ---- seeds and differences --------------------------------------------------------------------


def test_seeds_become_mean_and_sample_deviation(tmp_path):
    for seed, (loss, bits) in enumerate([(1.0, 2.0), (2.0, 2.0), (4.5, 2.3)]):
        write_run(tmp_path / str(seed), losses=[loss] * STEPS, bits=bits, seed=seed)
    rows = [summarise(run) for run in find_runs(tmp_path)]
    (group,) = over_seeds(rows)
    spread = group.over_seeds(lambda row: row.train_loss)
    assert (spread.mean, spread.n) == (2.5, 3)
    assert spread.deviation == pytest.approx(((1.5**2 + 0.5**2 + 2.0**2) / 2) ** 0.5)
    table = text_table(rows)
    assert "2.500 ± 1.803" in table and "2.100 ± 0.173" in table and "3 seeds (0, 1, 2)" in table
    assert group.ending == "2 trained, 1 stalled"  # a mean is over all that finished


def test_means_leave_out_seeds_that_did_not_finish_and_say_so(tmp_path):
    write_run(tmp_path / "0", losses=[1.0] * STEPS, seed=0)
    write_run(tmp_path / "1", losses=[2.0] * STEPS, seed=1)
    write_run(tmp_path / "2", losses=[9.0] * 4, seed=2, done=False)
    (write_run(tmp_path / "3", losses=[9.0] * 4, seed=3, done=False) / "DIVERGED").write_text('{"step": 5}')
    (line,) = text_table([summarise(run) for run in find_runs(tmp_path)]).splitlines()[2:3]
    assert re.split(r"  +", line)[2:4] == ["2 of 4", "1.500 ± 0.707"]
    assert line.endswith("2 trained, 1 unfinished (step 4), 1 diverged (step 5)")


def test_differing_data_and_config_are_said_and_never_averaged(tmp_path):
    write_run(tmp_path / "a", seed=0)
    write_run(tmp_path / "b", seed=1, fingerprint="beef")
    write_run(tmp_path / "c", seed=2, optim__lr=0.5)
    rows = [summarise(run) for run in find_runs(tmp_path)]
    assert [len(group.rows) for group in over_seeds(rows)] == [1, 1, 1]
    data, lr = texts(tmp_path, "warning")
    assert "same data" in data and "f00d (2 runs)" in data and "beef (1 run)" in data
    assert "optim.lr" in lr and "0.5 (1 run)" in lr
    html = write_report(tmp_path, tmp_path / "out").read_text()
    assert html.index("did not see the same data") < html.index("<table>")
    assert "optim.lr=0.5" in text_table(rows)


def test_what_is_compared_is_no_difference(tmp_path):
    for i, (placement, init) in enumerate([("pre", "plain"), ("span", "scale"), ("post", "gpt2")]):
        write_run(tmp_path / str(i), placement, init, data__cache_dir="")
    assert notices([summarise(run) for run in find_runs(tmp_path)]) == []


def test_runtime_differences_are_notes_and_do_not_split_seeds(tmp_path):
    write_run(tmp_path / "a", seed=0)
    write_run(tmp_path / "b", seed=1, mesh__fsdp=2, device="gpu")
    assert texts(tmp_path, "warning") == []
    notes = " ".join(texts(tmp_path, "note"))
    assert "mesh.fsdp" in notes and "gpu" in notes
    assert len(over_seeds([summarise(run) for run in find_runs(tmp_path)])) == 1


def test_the_same_run_twice_and_an_old_evaluation_are_said(tmp_path):
    write_run(tmp_path / "a")
    write_eval(write_run(tmp_path / "b"), 10, 2.0)
    assert any("several folders" in text for text in texts(tmp_path, "warning"))
    assert any("those of step 10" in text for text in texts(tmp_path, "note"))


# ---- the page ---------------------------------------------------------------------------------


def test_the_page_needs_nothing_beside_it(tmp_path):
    write_run(tmp_path / "a", "post", "plain", losses=[3.9] * STEPS, bits=5.0)
    write_run(tmp_path / "b", "span", "scale", bits=2.5)
    page = write_report(tmp_path, tmp_path / "out", "A <title>")
    html = page.read_text()
    assert page == tmp_path / "out" / "report.html"
    for word in ("http:", "https:", "file:", "<script", "<link", "@import", "url(", str(tmp_path)):
        assert word not in html
    sources = re.findall(r'src="data:image/png;base64,([^"]*)"', html)
    images = [base64.b64decode(source, validate=True) for source in sources]
    assert html.count("src=") == len(images) == 2 and all(i.startswith(PNG) for i in images)
    assert images[0] == (tmp_path / "out" / "loss.png").read_bytes()
    assert images[1] == (tmp_path / "out" / "block_grad_norm.png").read_bytes()
    assert "A &lt;title&gt;" in html and "<title>A <title>" not in html
    for said in ("one seed (0)", "f00d", "0123abc", "jax 0.10.2", "1,234", "python -m spannorm_jax.train"):
        assert said in html
    for column in ("placement", "init", "train loss", "held-out bits/byte", "tokens/s", "outcome"):
        assert f"<dt>{column}</dt>" in html
    assert "at least 5% below the unigram entropy" in html.replace("\n", " ")


def test_the_same_folders_give_the_same_bytes(tmp_path):
    write_run(tmp_path / "runs" / "a")
    first = write_report(tmp_path / "runs", tmp_path / "1").read_bytes()
    assert write_report(tmp_path / "runs", tmp_path / "2").read_bytes() == first


def test_several_seeds_with_diverged_and_unfinished_ones_render(tmp_path):
    write_run(tmp_path / "0", losses=[4.0 - 0.01 * s for s in range(STEPS)], seed=0)
    write_run(tmp_path / "1", losses=[4.1 - 0.01 * s for s in range(STEPS)], seed=1)
    write_run(tmp_path / "2", losses=[4.0, 5.0, float("nan")], seed=2, done=False)
    write_run(tmp_path / "3", "other", "new", losses=[4.0], done=False)
    html = write_report(tmp_path, tmp_path / "out").read_text()
    assert "band is one sample standard deviation" in html and html.count("src=") == 2


def test_a_run_that_logged_nothing_still_has_a_page(tmp_path):
    folder = write_run(tmp_path / "run", losses=[], done=False)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "loss.png").write_bytes(b"an older report's")
    html = write_report(folder, tmp_path / "out").read_text()
    assert "unfinished (step 0 of 20)" in html and "src=" not in html
    assert not (tmp_path / "out" / "loss.png").exists()


def test_smoothing_keeps_lines_straight_and_ends_in_place():
    line = figures.smooth(figures.np.arange(300.0))
    assert line[:297] == pytest.approx(figures.np.arange(297.0))
    noisy = figures.smooth(figures.np.array([1.0, -1.0] * 150))
    assert abs(noisy[10:-10]).max() < 0.2


def test_legend_entries_never_overlap_and_stay_near():
    assert figures.spread_out([0.5, 0.1, 0.9], 0.1, 0, 1) == pytest.approx([0.5, 0.1, 0.9])
    assert figures.spread_out([0.5, 0.5, 0.9], 0.1, 0, 1) == pytest.approx([0.45, 0.55, 0.9])
    crowded = sorted(figures.spread_out([0.98, 0.99, 1.0, 0.0], 0.2, 0, 1))
    assert crowded[-1] <= 1 and all(b - a >= 0.2 - 1e-9 for a, b in itertools.pairwise(crowded))


def test_a_placement_keeps_its_colour_whatever_else_is_drawn():
    assert figures.colours(["span"])["span"] == figures.colours(["a", "pre", "span", "z"])["span"]
    assert len(set(figures.colours(["a", "pre", "post", "span", "z"]).values())) == 5


# ---- the command line -------------------------------------------------------------------------


def test_command_prints_the_table_and_the_path(tmp_path, capsys):
    write_run(tmp_path / "run")
    assert main([str(tmp_path), "--title", "T"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("placement") and lines[-1] == str(tmp_path / "report" / "report.html")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda run: (run / "config.json").unlink(), "no run below"),
        (lambda run: (run / "config.json").write_text("{not"), "config.json is not JSON"),
        (lambda run: (run / "config.json").write_text("[]"), "not a JSON object"),
        (lambda run: (run / "config.json").write_text("{}"), "model.placement"),
        (lambda run: (run / "metrics.jsonl").write_text('{"step": 1\n{"step": 2}\n'), "metrics.jsonl line 1"),
        (lambda run: (run / "metrics.jsonl").write_text('{"loss": 1}\n'), "'step'"),
    ],
)
def test_bad_folders_are_named_in_one_line(tmp_path, spoil, says):
    spoil(write_run(tmp_path / "run"))
    with pytest.raises(UserError, match=re.escape(says)) as caught:
        main([str(tmp_path)])
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
    assert not (tmp_path / "report").exists()


def test_an_out_that_is_a_file_is_named(tmp_path):
    write_run(tmp_path / "run")
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match="taken"):
        main([str(tmp_path), "--out", str(tmp_path / "taken")])


def test_the_command_exits_with_2_and_one_line_and_imports_no_accelerator_library(tmp_path):
    code = (
        "import sys; from spannorm_jax.report.__main__ import main; from spannorm_jax.command import run_command\n"
        "assert not {'matplotlib', 'jax', 'flax'} & set(sys.modules)\n"
        f"sys.argv[1:] = [{str(tmp_path / 'missing')!r}]; run_command(main)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and "missing" in done.stderr
