"""Runs of a sweep as lanes: which go together, what becomes of each, and a runner that is killed."""

import json
import os
import signal

import pytest
from processes import finish, launch, values_of

from spannorm_jax.errors import UserError
from spannorm_jax.resolution import num_steps
from spannorm_jax.sweep import __main__ as command
from spannorm_jax.sweep.expansion import expand
from spannorm_jax.sweep.records import FAILED, GONE_OFF, RUNNING, TRAINED, RunPlace
from spannorm_jax.sweep.runner import check_fits, in_groups
from spannorm_jax.sweep.work import work_in_lanes
from spannorm_jax.training.program_key import program_key

# ---- groups -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lanes", "sizes"), [(2, {2}), (8, {7, 8}), (100, {30})])
def test_groups_hold_each_run_once_and_one_program_each(lanes, sizes):
    """Of three placements 30 runs each: two initialisations, five rates and three seeds."""
    runs = expand("lr", "cpu").runs
    groups = in_groups(runs, lanes)
    assert sorted(run.index for group in groups for run in group) == [run.index for run in runs]
    for group in groups:
        assert len(group) <= lanes and len({program_key(run.config) for run in group}) == 1
        assert len({run.config.model.placement for run in group}) == 1
    assert {len(group) for group in groups} == sizes


def test_runs_of_like_lengths_meet(tiny):
    runs = [*expand("lr", "cpu", tiny).runs, *expand("lr", "cpu", tiny, [("training.steps", "9")]).runs]
    lengths = [[num_steps(run.config) for run in group] for group in in_groups(runs[::-1], 3)]
    assert lengths == [[6, 6, 6], [9, 9, 9]]


def test_lanes_share_the_devices_that_replicas_leave(tiny):
    """A batch of 8 rows does not go over 16 devices, but over the 8 that each of two lanes has."""
    runs = expand("lr", "cpu", tiny).runs
    check_fits([runs[:2]], 16, "cpu")
    with pytest.raises(UserError, match="batch_size"):
        check_fits([runs[:1]], 16, "cpu")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["depth", "local", "--lanes", "2"], ["--lanes 2", "no two runs of sweep depth (cpu) share a program"]),
        (["lr", "local", "--lanes", "3", "--config.mesh.expert=2"], ["mesh.expert=2", "one by one"]),
        (["lr", "local", "--lanes", "3", "--config.metrics.wandb_project=x"], ["wandb_project='x'"]),
        (["lr", "local", "--lanes", "0"], ["--lanes 0", "above 0"]),
        (["lr", "list", "--lanes", "2"], ["--lanes goes with local"]),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(argv, says, tiny, tmp_path):
    with pytest.raises(UserError) as refused:
        command.main([*argv, "--config", tiny, "--out", str(tmp_path)])
    assert all(word in str(refused.value) for word in says) and "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


# ---- what becomes of each -----------------------------------------------------------------------------


def evaluated_at(place):
    return values_of(place.workdir / "eval.jsonl", "step")


def test_each_lane_has_its_own_end_and_what_others_work_on_is_left_out(tiny, tmp_path, started):
    sweep = expand("off", "cpu", tiny)
    places = [RunPlace(tmp_path, run.name) for run in sweep.runs]
    with places[2].claim():
        good, off, other = work_in_lanes(sweep.runs, tmp_path, retry=False)
    assert (good, off) == ((TRAINED, ""), (GONE_OFF, "")) and other[0] == RUNNING
    assert [place.state() for place in places] == [TRAINED, GONE_OFF, "new"]
    at = json.loads((places[1].workdir / "DIVERGED").read_text())["last_good_checkpoint"]
    assert at and [evaluated_at(place) for place in places[:2]] == [[6], [at]]
    # Again: what has ended is left as it is, and the one that is left is trained alone.
    assert work_in_lanes(sweep.runs, tmp_path, retry=False) == [good, off, (TRAINED, "")]
    assert [evaluated_at(place) for place in places] == [[6], [at], [6]]
    assert [values_of(place.workdir / "starts.jsonl", "lanes") for place in places] == [[2], [2], [1]]


def test_what_cannot_be_a_lane_fails_alone(tiny, tmp_path, started, capsys):
    sweep = expand("lr", "cpu", tiny)
    places = [RunPlace(tmp_path, run.name) for run in sweep.runs]
    places[1].workdir.mkdir()
    (places[1].workdir / "something").touch()
    ends = work_in_lanes(sweep.runs, tmp_path, retry=False)
    assert [state for state, _ in ends] == [TRAINED, FAILED, TRAINED] and "is not a run" in ends[1][1]
    assert "these 3 runs cannot be trained as lanes, and are trained alone" in capsys.readouterr().out


# ---- the runner ---------------------------------------------------------------------------------------

# A run that is about to save its fourth step says who it is, and waits for a word or its end.
PAUSED = """
import os
from spannorm_jax.training.record import Record
_save = Record.save

def _saved(record, step, state):
    if step == 4 and os.path.exists(os.environ["FIFO"]):
        with open(os.environ["FIFO"], "w") as file:
            file.write(str(os.getpid()))
        open(os.environ["FIFO"] + ".go").close()
    _save(record, step, state)

Record.save = _saved
"""


@pytest.mark.process
@pytest.mark.parametrize("killed", ["both", "worker"])
def test_a_group_that_is_killed_goes_on(tiny, env, tmp_path, worker_that_waits, killed):
    """With its runner, by the same command. Alone, in the same runner: nobody knows which lane was at fault."""
    paused = tmp_path / "paused.py"
    with open(tiny, encoding="utf-8") as file:
        paused.write_text(PAUSED + file.read())
    where = ("--lanes", 3, "--config", paused, "--out", tmp_path / "out")
    runner = launch(env, "sweep", "lr", "local", *where)
    worker = worker_that_waits()
    if killed == "both":
        runner.kill()
    os.kill(worker, signal.SIGKILL)
    if killed == "both":
        runner.wait()
        runner = launch(env, "sweep", "lr", "local", *where)
    out, _ = finish(runner)
    assert "3 runs: 3 done" in out and out.count("(one of 3 lanes)") == 3
    assert out.count("each is taken up again alone") == (killed == "worker")
    places = [RunPlace(tmp_path / "out", run.name) for run in expand("lr", "cpu", str(paused)).runs]
    logs = [place.log.read_text() for place in places]
    assert "3 lanes of one program" in logs[0]
    assert all(f"trained as a lane; what is printed stands in {places[0].log}" in log for log in logs[1:])
    assert all("nats/token" in log for log in logs)  # each is evaluated by itself
    for place in places:
        assert place.state() == TRAINED and evaluated_at(place) == [6]
        assert values_of(place.workdir / "metrics.jsonl", "step") == [1, 2, 3, 4, 5, 6]
        starts = place.workdir / "starts.jsonl"
        assert values_of(starts, "first_step") in ([1, 3], [1, 1])  # the save of step 2 may not be complete
        assert values_of(starts, "lanes") == ([3, 3] if killed == "both" else [3, 1])
