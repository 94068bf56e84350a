"""The runner as a user starts it: killed, with workers that are killed, and two at once."""

import os
import shutil
import signal

import pytest
from processes import LIMIT_S, finish, launch, paused, values_of

from spannorm_jax.durable import exclusive
from spannorm_jax.sweep.expansion import expand
from spannorm_jax.sweep.records import NEW, STOPPED, STOPPED_EXIT, TRAINED, RunPlace

pytestmark = pytest.mark.process

# A run that logs its ninth step while there are two FIFOs tells who it is, and waits for a word or its end.
WANDB = """
import os

class Error(Exception):
    pass

class Run:
    def log(self, scalars, step):
        if step == 9 and os.path.exists(os.environ["FIFO"]):
            with open(os.environ["FIFO"], "w") as file:
                file.write(str(os.getpid()))
            open(os.environ["FIFO"] + ".go").close()

    def finish(self):
        pass

def init(**values):
    return Run()
"""
STEPS = 60
OVERRIDES = [("metrics.wandb_project", "norms"), ("training.steps", str(STEPS))]


@pytest.fixture(scope="module", autouse=True)
def wandb(home):
    (home / "wandb.py").write_text(WANDB)


@pytest.fixture
def sweep(env, tiny, tmp_path):
    """sweep(arguments) starts a runner of three runs."""

    def start(*arguments, names="lr", pause_at=None, under=()):
        where = ["--config", tiny, "--out", str(tmp_path), *(f"--config.{key}={text}" for key, text in OVERRIDES)]
        return launch(env, "sweep", names, *arguments, *where, pause_at=pause_at, under=under)

    return start


@pytest.fixture
def let_go(env):
    """A function that lets that worker go on: it returns when the worker has heard of it."""
    return lambda: open(env["FIFO"] + ".go", "w", encoding="utf-8").close()


@pytest.fixture
def places(tiny, tmp_path):
    return [RunPlace(tmp_path, run.name) for run in expand("lr", "cpu", tiny, OVERRIDES).runs]


def first_steps(place):
    """Of each start of a run, the step that it began with."""
    return values_of(place.workdir / "starts.jsonl", "first_step")


def assert_whole(places):
    for place in places:
        assert place.state() == TRAINED
        assert values_of(place.workdir / "metrics.jsonl", "step") == list(range(1, STEPS + 1))
        assert values_of(place.workdir / "eval.jsonl", "step") == [STEPS]


def test_a_runner_that_is_killed_goes_on_inside_a_run(sweep, places, worker_that_waits, let_go):
    runner = sweep("local")
    worker_that_waits()
    runner.kill()
    let_go()  # it hears that its runner has gone, saves and ends
    runner.communicate(timeout=LIMIT_S)
    with places[0].claim(wait=True):
        pass
    out, _ = finish(sweep("local", "--jobs", "1"))
    assert "3 runs: 3 done" in out
    assert_whole(places)
    again, at = first_steps(places[0])
    assert again == 1 and 9 < at < STEPS  # as soon as it heard of it
    assert [first_steps(place) for place in places[1:]] == [[1], [1]]


def test_a_runner_that_is_interrupted_saves_what_it_is_at(sweep, places, worker_that_waits, let_go):
    runner = sweep("local")
    worker_that_waits()
    runner.send_signal(signal.SIGINT)
    let_go()
    out, _ = finish(runner, code=130)
    assert "saved their step: [0]; a second signal kills them\nstopped; the same command goes on from here\n" in out
    finish(sweep("local"))
    assert_whole(places)
    assert len(first_steps(places[0])) <= 2


def test_a_runner_says_that_it_waits_and_that_a_second_signal_has_killed(sweep, places, worker_that_waits):
    runner = sweep("local")
    worker_that_waits()
    runner.send_signal(signal.SIGTERM)
    for line in runner.stdout:
        if "a second signal kills them" in line:
            break
    runner.send_signal(signal.SIGTERM)
    out, _ = finish(runner, code=130)
    assert out.startswith("killed: ") and out.endswith("the same command goes on from here\n")
    finish(sweep("local"))
    assert_whole(places)


@pytest.mark.parametrize("limit", [0, 20_000])
def test_a_runner_that_has_no_room_says_so_and_goes_on_when_there_is(sweep, places, tmp_path, limit):
    """At its first file, and at a checkpoint: one line each for the runner and for a task of an array."""
    finish(sweep("run", "0"))  # which leaves the caches full
    shutil.rmtree(places[0].workdir)
    shutil.rmtree(places[0].notes)
    for arguments in (["local"], ["run", "0"]):
        _, err = finish(sweep(*arguments, under=["prlimit", f"--fsize={limit}"]), code=2)
        [line] = [line for line in err.splitlines() if line.startswith("error:")]
        assert str(tmp_path) in line and "a file has reached the size limit" in line and "goes on" in line
        assert limit or "Traceback" not in err  # threads of Orbax may print one when a save fails
    assert [place.state() for place in places] == [STOPPED if limit else NEW, NEW, NEW]
    finish(sweep("local"))
    assert_whole(places)


def test_a_worker_that_is_killed_fails_its_run_alone(sweep, places, worker_that_waits):
    runner = sweep("local")
    os.kill(worker_that_waits(), signal.SIGKILL)
    out, _ = finish(runner, code=1)
    assert f"[0] {places[0].name}: failed: the process at work on it ended by SIGKILL" in out
    assert "3 runs: 2 done, 1 failed" in out
    assert_whole(places[1:])

    out, _ = finish(sweep("local"), code=1)  # nobody asked for another try
    assert "started" not in out and len(first_steps(places[0])) == 1
    _, err = finish(sweep("run", "0"), code=2)
    assert err.count("\n") == 1 and "SIGKILL" in err and "--retry" in err
    finish(sweep("local", "--retry"))
    assert_whole(places)
    assert first_steps(places[0]) in ([1, 7], [1, 9])  # the save of step 8 may not have been complete


def test_two_runners_share_a_sweep_and_one_takes_over_from_the_other(sweep, places, worker_that_waits, let_go):
    killed = sweep("local")
    worker = worker_that_waits()
    other = sweep("local", pause_at=f"[0] {places[0].name}: started  (waits")
    paused(other)  # it has nothing else left
    assert_whole(places[1:])
    _, err = finish(sweep("run", "0"), code=STOPPED_EXIT)
    assert f"run {places[0].name} is in use by process {worker} " in err and err.count("\n") == 1
    killed.kill()
    killed.wait(timeout=LIMIT_S)
    let_go()
    killed.communicate(timeout=LIMIT_S)  # its worker has its standard error
    other.send_signal(signal.SIGCONT)
    out, _ = finish(other)
    assert f"[0] {places[0].name}: at work in another runner" in out and "3 runs: 3 done" in out
    assert_whole(places)
    assert [len(first_steps(place)) for place in places] == [2, 1, 1]


def test_a_run_that_a_trainer_is_at_is_left_to_the_end_and_not_waited_for(sweep, places):
    places[0].workdir.mkdir()
    with exclusive(places[0].workdir / "LOCK", "the run"):
        out, _ = finish(sweep("local"), code=1)
    assert f"is in use by process {os.getpid()}" in out and out.endswith("3 runs: 2 done, 1 new\n")
    finish(sweep("local"))
    assert_whole(places)


def test_another_process_finds_the_programs_of_a_sweep_in_the_cache(sweep, places, home):
    """Workers compile each for themselves what no other had compiled before they looked: here one at a time."""
    out, _ = finish(sweep("run", "0"))
    assert out.endswith(f"run 0 ({places[0].name}): done\n")
    compiled = sorted(path.name for path in (home / "cache" / "spannorm_jax" / "xla").rglob("*-cache"))
    assert any("train_step" in name for name in compiled)
    finish(sweep("local"))
    assert_whole(places)
    assert sorted(path.name for path in (home / "cache" / "spannorm_jax" / "xla").rglob("*-cache")) == compiled


def test_what_cannot_run_on_the_devices_is_refused_before_anything_is_written(sweep, tmp_path):
    _, err = finish(sweep("local", "--config.mesh.fsdp=3"), code=2)
    assert err.count("\n") == 1 and "run 0" in err and "mesh.fsdp=3" in err and "1 devices" in err
    assert not list(tmp_path.iterdir())
