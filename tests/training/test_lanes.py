"""Lanes of one program against single runs: each number, the seed, and what a lane leaves in its folder."""

import contextlib
import json
import signal

import chex
import jax
import numpy as np
import pytest
from small_model import batch, configure, program_of
from test_numbers import CASES, SHAPES

from spannorm_jax.config import Config, replace
from spannorm_jax.errors import DIVERGED_EXIT, UserError
from spannorm_jax.inference.evaluation import evaluate
from spannorm_jax.model.definition import define
from spannorm_jax.parallel.platform import start_jax
from spannorm_jax.parallel.rank import ProcessFlags
from spannorm_jax.run import checkpoint
from spannorm_jax.run.folder import read_config
from spannorm_jax.training import lanes, loop
from spannorm_jax.training.flags import Flags
from spannorm_jax.training.lanes import LaneProgram, stacked_numbers, train_lanes
from spannorm_jax.training.numbers import numbers_of
from spannorm_jax.training.program_key import check_lanes

# ---- the step ---------------------------------------------------------------------------------------

STEPS = 20


def scalars(metrics):
    """Of one step: the loss, and the loads of the experts, which say where tokens went."""
    loss = np.asarray(metrics["scalars"]["loss"])
    return loss, np.asarray(metrics["per_moe_block"].get("expert_load_max", np.zeros((*loss.shape, 0))))


def stacked(batches):
    return jax.tree.map(lambda *xs: np.stack(xs), *batches)


def trained_together(configs):
    """(losses (STEPS, K), loads (STEPS, K, L)) of so many lanes, each with its own numbers, weights and batches."""
    program = program_of(configs[0])
    made = LaneProgram(configs[0], define(configs[0].model, configs[0].execution), program, len(configs))
    state, numbers, seen = made.stack(*(program.init(c.seed) for c in configs)), stacked_numbers(configs), []
    for step in range(STEPS):
        batches = stacked([batch(1000 * c.seed + step) for c in configs])
        state, metrics = made.train(state, batches, numbers)
        seen.append(scalars(metrics))
    assert made.train._cache_size() == 1
    return [np.stack(values) for values in zip(*seen, strict=True)]


def trained_alone(program, config):
    """The same of one of them."""
    state, seen = program.init(config.seed), []
    for step in range(STEPS):
        state, metrics = program.train(state, batch(1000 * config.seed + step), numbers_of(config))
        seen.append(scalars(metrics))
    return [np.stack(values) for values in zip(*seen, strict=True)]


@pytest.mark.parametrize("shape", ["dense", "aux_loss", "bias"])
def test_lanes_are_single_runs_whatever_number_or_seed_they_differ_in(shape):
    """Losses of 20 steps within 1e-5, one lane for each number (CASES has all) and one for another seed.

    Seen: 2.4e-7 on one CPU. With experts they are equal so far as long as tokens go to the same experts: where two of
    them score alike, rounding decides, here as on another mesh. From there on a loss moves by what one token's
    expert is to the mean over a batch.
    """
    usual = configure(**SHAPES[shape])
    others = [{key: value} for name, key, value in CASES if name == shape]
    configs = [replace(usual, **change) for change in ({}, {"seed": 1}, *others)]
    losses, loads = trained_together(configs)
    program = program_of(usual)
    for i, config in enumerate(configs):
        want, want_loads = trained_alone(program, config)
        same_experts = np.logical_and.accumulate((loads[:, i] == want_loads).all(axis=-1))
        assert same_experts[0]  # of equal weights
        error = np.abs(losses[:, i] / want - 1)
        assert error[same_experts].max() < 1e-5, (config.seed, numbers_of(config))
        assert error.max() < 0.02
    apart = np.ptp(losses, axis=1)
    assert apart[0] > 0 and apart[-1] > 1e-3  # each lane has its own


def test_each_number_is_a_lane_of_that_test():
    moved = set()
    for shape, key, value in CASES:
        usual, other = (numbers_of(configure(**SHAPES[shape] | change)).values for change in ({}, {key: value}))
        moved |= {name for name in usual if usual[name] != other[name] and shape != "cosine"}
    assert moved == set(usual)


def test_a_lane_of_nan_harms_no_other():
    """Bitwise: a lane's numbers are the same whatever its neighbour holds."""
    config = configure(training__z_loss=0.1)
    program = program_of(config)
    made = LaneProgram(config, define(config.model, config.execution), program, 2)

    def third(spoilt):
        numbers = stacked_numbers([config, config])
        state = made.stack(*(program.init(seed) for seed in (0, 1)))
        for step in range(3):
            if spoilt:
                numbers.lr[1] = np.nan
            state, metrics = made.train(state, stacked([batch(step), batch(step)]), numbers)
        return jax.device_get((made.take(state, 0), made.take(state, 1).params, metrics["scalars"]["loss"]))

    (good, _, losses), (usual, _, usual_losses) = third(True), third(False)
    assert np.isnan(losses[1]) and losses[0] == usual_losses[0]
    chex.assert_trees_all_equal(good, usual)


# ---- the runs, in their folders -----------------------------------------------------------------------

TINY = replace(
    Config(),
    model__depth=1,
    model__width=16,
    model__num_heads=1,
    model__ffn_dim=16,
    data__seq_len=16,
    training__steps=6,
    eval__tokens=256,
    eval__batch_size=8,
    eval__every_steps=4,
    checkpoint__every_steps=1,
    metrics__block_grad_every=2,
)
RUNS = {
    "usual": TINY,
    "short": replace(TINY, training__steps=4),
    "other": replace(TINY, seed=1, model__init="plain", optim__lr=1e-3),
    "off": replace(TINY, optim__lr=1e30),
}
LAST = replace(TINY, training__steps=2)


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory):
    """Caches of the module's runs."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setenv("TFDS_DATA_DIR", str(folder / "tfds"))
        start_jax("auto")
        yield folder


def alone(folder, name):
    return loop.train(RUNS[name], folder / name, Flags([], stop_code=75), ProcessFlags())


def together(folder, *names):
    return train_lanes([(RUNS[name], folder / name, Flags([], stop_code=75)) for name in names])


@pytest.fixture(scope="module")
def single(home):
    """The folder of the runs, each trained alone."""
    assert [alone(home / "single", name) for name in RUNS] == [0, 0, 0, DIVERGED_EXIT]
    return home / "single"


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def names_of_files(folder):
    return sorted(p.name for p in folder.iterdir() if p.name != "LOCK")


def assert_is_as_if_alone(run, other):
    """The folder of a run is that of the same run alone, to 1e-5 in all numbers (seen: 2.5e-7)."""
    assert names_of_files(run) == names_of_files(other)
    assert (run / "config.json").read_bytes() == (other / "config.json").read_bytes()
    assert names_of_files(run / "checkpoints") == names_of_files(other / "checkpoints")
    got, want = lines(run / "metrics.jsonl"), lines(other / "metrics.jsonl")
    assert [list(line) for line in got] == [list(line) for line in want]
    for a, b in zip(got, want, strict=True):
        for key in (key for key in b if not key.endswith("_s")):
            values = (np.array(line[key], np.float64) for line in (a, b))  # null, of what is not finite, is NaN
            np.testing.assert_allclose(*values, rtol=1e-5, err_msg=f"{key} {b}")
    for mark in ("DONE", "DIVERGED"):
        if (other / mark).exists():
            assert json.loads((run / mark).read_text()) == json.loads((other / mark).read_text())
    newest = max(int(path.name) for path in (run / "checkpoints").iterdir())  # of one that diverged not the good one
    results = [evaluate(read_config(folder), folder, newest, ProcessFlags(), None) for folder in (run, other)]
    assert results[0]["step"] == results[1]["step"]
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], rel=1e-5, nan_ok=True)


def test_a_lane_leaves_what_a_single_run_leaves(single, tmp_path, capfd):
    """Of another length, seed and initialisation, and one that diverges; on eight devices, which lanes share."""
    assert together(tmp_path, *RUNS) == [0, 0, 0, DIVERGED_EXIT]
    said = capfd.readouterr().out
    assert said.count("compiled in ") == 1 and said.count("done: ") == 3 and said.count("stopped: ") == 1
    for name in RUNS:
        assert_is_as_if_alone(tmp_path / name, single / name)
    [start], [usual] = lines(tmp_path / "usual" / "starts.jsonl"), lines(single / "usual" / "starts.jsonl")
    assert list(start) == list(usual)
    assert (start["lanes"], start["mesh"]["lane"], start["mesh"]["data"]) == (4, 4, 2)
    assert (usual["lanes"], usual["mesh"]["lane"], usual["mesh"]["data"]) == (1, 1, 8)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.jsonl")}
    assert together(tmp_path, "usual", "short") == [0, 0]  # done already
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.jsonl")} == before


def stopping(patch, module, at):
    """Has a loop believe that a signal comes at its n-th step or turn."""

    class Stop:
        calls = 0

        def at(self, _):
            self.calls += 1
            return signal.SIGTERM.name if self.calls == at else ""

    patch.setattr(module, "stop_signals", lambda: contextlib.nullcontext(Stop()))


def test_lanes_go_on_from_where_each_is_also_alone_and_back(single, tmp_path, monkeypatch):
    """Three lanes (two devices' groups, so that one seat is spare) are stopped at step 3. One goes on alone to step 5,
    then all in lanes, from steps 6, 4 and 4; the short one has one step left."""
    with monkeypatch.context() as patch:
        stopping(patch, lanes, at=3)
        assert together(tmp_path, "usual", "short", "other") == [75, 75, 75]
        stopping(patch, loop, at=2)
        assert alone(tmp_path, "usual") == 75
    for name, steps in (("usual", ["4", "5"]), ("short", ["2", "3"]), ("other", ["2", "3"])):
        assert names_of_files(tmp_path / name / "checkpoints")[-2:] == steps
        assert not (tmp_path / name / "DONE").exists()
    assert together(tmp_path, "usual", "short", "other") == [0, 0, 0]
    for name, firsts in (("usual", [1, 4, 6]), ("short", [1, 4]), ("other", [1, 4])):
        assert [line["first_step"] for line in lines(tmp_path / name / "starts.jsonl")] == firsts
        got, want = lines(tmp_path / name / "metrics.jsonl"), lines(single / name / "metrics.jsonl")
        assert [line["step"] for line in got] == [line["step"] for line in want]
        np.testing.assert_allclose([line["loss"] for line in got], [line["loss"] for line in want], rtol=1e-5)


def test_a_lane_killed_after_its_last_save_is_only_declared_done(single, tmp_path):
    assert alone(tmp_path, "short") == 0
    (tmp_path / "short" / "DONE").unlink()
    before = (tmp_path / "short" / "metrics.jsonl").read_bytes()
    assert together(tmp_path, "short", "usual") == [0, 0]
    assert (tmp_path / "short" / "DONE").exists() and (tmp_path / "short" / "metrics.jsonl").read_bytes() == before
    assert_is_as_if_alone(tmp_path / "usual", single / "usual")


def removing(patch, module, folder, at):
    """Removes a run's folder at a loop's n-th step or turn, before its save."""

    class Stop:
        calls = 0

        def at(self, _):
            self.calls += 1
            if self.calls == at:
                folder.rename(f"{folder} removed")  # at once; rmtree would race with the save before
            return ""

    patch.setattr(module, "stop_signals", lambda: contextlib.nullcontext(Stop()))


@pytest.mark.parametrize("at", [2, 6])
def test_a_run_whose_folder_is_removed_stops_and_makes_none_and_the_same_command_begins_anew(
    single, tmp_path, monkeypatch, at
):
    with monkeypatch.context() as patch:
        removing(patch, loop, tmp_path / "usual", at)
        with pytest.raises(UserError, match="was removed or replaced while the run was at work"):
            alone(tmp_path, "usual")
    assert not (tmp_path / "usual").exists()
    assert alone(tmp_path, "usual") == 0
    assert lines(tmp_path / "usual" / "starts.jsonl")[0]["first_step"] == 1


def test_a_lane_whose_folder_is_removed_ends_and_the_others_go_on(single, tmp_path, monkeypatch, capfd):
    with monkeypatch.context() as patch:
        removing(patch, lanes, tmp_path / "usual", 2)
        assert together(tmp_path, "usual", "other") == [2, 0]
    assert capfd.readouterr().err.count("usual was removed or replaced") == 1 and not (tmp_path / "usual").exists()
    assert_is_as_if_alone(tmp_path / "other", single / "other")
    assert together(tmp_path, "usual", "other") == [0, 0]
    assert_is_as_if_alone(tmp_path / "usual", single / "usual")


def test_a_run_is_done_only_once_its_last_checkpoint_is_read(single, tmp_path, monkeypatch):
    def flips(folder):
        usual(folder)
        if folder.name.startswith("2"):
            next(path for path in sorted(folder.rglob("d/*")) if path.is_file()).write_bytes(b"changed")

    usual = checkpoint.write_manifest
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_manifest", flips)
        with pytest.raises(UserError, match=r"is damaged.*; repeat the command"):
            loop.train(LAST, tmp_path / "last", Flags([]), ProcessFlags())
    assert not (tmp_path / "last" / "DONE").exists()
    assert (
        loop.train(LAST, tmp_path / "last", Flags([]), ProcessFlags()) == 0
        and (tmp_path / "last" / "damaged" / "2").exists()
    )


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model__depth": 2}, ["a (model.depth=1)", "b (model.depth=2)", "one by one"]),
        ({"training__batch_size": 16}, ["training.batch_size=16"]),
        ({"data__train_split": "validation"}, ["data.train_split='validation'"]),
    ],
)
def test_runs_of_two_programs_are_refused_before_anything_is_written(changes, says, tmp_path):
    with pytest.raises(UserError) as refused:
        train_lanes([(TINY, tmp_path / "a", Flags([])), (replace(TINY, **changes), tmp_path / "b", Flags([]))])
    assert all(word in str(refused.value) for word in says) and "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"mesh__expert": 2}, "mesh.expert=2"), ({"metrics__wandb_project": "x"}, "wandb_project='x'")],
)
def test_what_does_not_go_with_lanes_is_refused(changes, says):
    config = replace(TINY, **changes)
    with pytest.raises(UserError, match=says):
        check_lanes({"a": config, "b": replace(config, seed=1)})
