"""Two processes of four devices each, as a user or a scheduler starts them: the same training, and every way to end."""

import json
import re
import shutil
import signal
import socket
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from processes import LIMIT_S, THREADS, launch, metrics, paused, user_env

import spannorm_jax

pytestmark = pytest.mark.process

STEPS = 12
TINY = (
    "--config=configs/moe.py:depth=2,width=32,placement=span,init=scale",
    "--config.model.num_heads=4",
    "--config.model.moe.every=2",
    f"--config.training.steps={STEPS}",
    "--config.data.seq_len=16",
    "--config.checkpoint.every_steps=3",
    "--config.metrics.tensorboard=false",
    "--config.metrics.console_every_s=0",
    "--config.eval.tokens=2000",
)
# One expert a device, so that tokens cross processes; room for 14 of a device's 32 assignments in each buffer.
EXPERTS = ("--config.mesh.expert=8", "--config.execution.expert_parallel=all_to_all", "--config.execution.capacity=3.5")
# Where it is only about how processes end: a dense model that never does.
ENDLESS = (
    *TINY,
    "--config.model.moe.num_experts=0",
    "--config.training.steps=1000000",
    "--config.metrics.log_every=1000",
)
ROOT = Path(spannorm_jax.__file__).parents[1]


@pytest.fixture(scope="module")
def env(tmp_path_factory):
    return user_env(tmp_path_factory.mktemp("home"))


def start(env, module, *argv, devices=4, cwd=ROOT, pause_at=None):
    return launch(env | THREADS, module, *argv, devices=devices, cwd=cwd, pause_at=pause_at)


def free_port():
    with socket.socket() as s:
        s.bind(("", 0))
        return s.getsockname()[1]


def start_two(env, module, *argv, second=None, devices=4, pause_at=None):
    """Two processes with the same arguments; `second`: (more arguments, other keywords) of process 1.

    `pause_at`: the beginning of the line at which process 0 stops itself.
    """
    # On a busy machine a process may be silent for long: no test waits for the heartbeat.
    flags = ("--coordinator", f"localhost:{free_port()}", "--num_processes", 2, "--heartbeat_s", LIMIT_S)
    others, keywords = second or ((), {})
    return (
        start(env, module, *argv, *flags, "--process_id", 0, devices=devices, pause_at=pause_at),
        start(env, module, *argv, *others, *flags, "--process_id", 1, **{"devices": devices} | keywords),
    )


def finish(processes, codes):
    """(stdout, stderr) of each, without what gloo says of its connections, from several threads at once."""

    def ours(text):
        return "".join(line for line in text.splitlines(True) if not re.search(r"Gloo|Rank|peer|^[\s:\d]*$", line))

    try:
        out = [tuple(ours(text) for text in process.communicate(timeout=LIMIT_S)) for process in processes]
    finally:
        for process in processes:
            process.kill()  # if it hangs
    assert tuple(p.returncode for p in processes) == codes, out
    return out


def run_two(env, module, *argv, codes=(0, 0), **second):
    return finish(start_two(env, module, *argv, **second), codes)


def until(process, text):
    """Reads the process's output up to a line that holds `text`."""
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"it ended before {text!r}: {process.stderr.read()}")


def trajectory(workdir):
    return np.array([(line["loss"], line["grad_norm"]) for line in metrics(workdir)])


@pytest.fixture(scope="module")
def one(env, tmp_path_factory):
    """The run of one process with one device."""
    workdir = tmp_path_factory.mktemp("one") / "run"
    finish([start(env, "train", *TINY, "--workdir", workdir, devices=1)], (0,))
    return workdir


@pytest.fixture(scope="module")
def two(env, one, tmp_path_factory):  # after `one`, which makes the token store
    workdir = tmp_path_factory.mktemp("two") / "run"
    (out, _), (silent, err) = run_two(env, "train", *TINY, *EXPERTS, "--workdir", workdir)
    assert "of 2 processes" in out and "done" in out and silent == "" and err == ""
    return workdir


# Gloo adds in another order than one process does: largest difference seen 3e-7 over 12 steps.
same_trajectory = partial(np.testing.assert_allclose, rtol=5e-6)


def test_two_processes_train_as_one(one, two):
    assert [line["step"] for line in metrics(two)] == list(range(1, STEPS + 1))
    same_trajectory(trajectory(two), trajectory(one))
    overflow = [sum(line["expert_overflow"]) for line in metrics(two)]
    assert min(overflow) == 0 < max(overflow)  # both by all_to_all and by the ring that it falls back to
    start = json.loads((two / "starts.jsonl").read_text())
    assert (start["num_processes"], start["num_devices"]) == (2, 8)


def test_the_ring_of_two_processes_trains_as_one(env, one, tmp_path):
    run_two(env, "train", *TINY, *EXPERTS, "--config.execution.expert_parallel=ring", "--workdir", tmp_path / "run")
    same_trajectory(trajectory(tmp_path / "run"), trajectory(one))


def test_checkpoints_pass_between_one_process_and_two(env, one, two, tmp_path):
    """Each evaluates the other's, and continues it: two processes leave the same manifest-checked files."""

    def evaluated(processes):
        out = finish(processes, (0,) * len(processes))
        assert all(text == "" for text, _ in out[1:])
        return json.loads(out[0][0])

    by_two = evaluated(start_two(env, "evaluate", "--workdir", one, "--json"))
    by_one = evaluated([start(env, "evaluate", "--workdir", two, "--json", devices=1)])
    assert len((one / "eval.jsonl").read_text().splitlines()) == 1  # process 0 alone appends
    assert by_two["loss"] == pytest.approx(by_one["loss"], rel=2e-6) and by_two["tokens"] == by_one["tokens"]

    workdir = tmp_path / "run"
    shutil.copytree(two, workdir)
    shutil.rmtree(workdir / "checkpoints" / str(STEPS))
    (workdir / "DONE").unlink()
    (out, _) = finish([start(env, "train", *TINY, "--workdir", workdir, devices=1)], (0,))[0]
    assert f"continuing after step {STEPS - 3}" in out
    same_trajectory(trajectory(workdir), trajectory(one))


@pytest.mark.parametrize(("number", "to"), [(signal.SIGTERM, 1), (signal.SIGINT, 0)])
def test_a_signal_to_one_stops_both_at_the_same_step(env, two, tmp_path, number, to):
    workdir = tmp_path / "run"
    processes = start_two(env, "train", *ENDLESS, "--workdir", workdir, devices=1)
    until(processes[0], "step 3/")
    processes[to].send_signal(number)
    (out, _), (_, err) = finish(processes, (0, 0))
    step = int(re.search(r"saved at step (\d+)", out)[1])
    assert (workdir / "checkpoints" / str(step) / "manifest.json").exists()
    assert not re.search("error|Traceback", err)
    assert not (workdir / "DONE").exists()


def test_both_go_on_where_they_stopped(env, one, tmp_path):
    workdir = tmp_path / "run"
    processes = start_two(env, "train", *TINY, *EXPERTS, "--workdir", workdir, pause_at="step 7/")
    paused(processes[0])  # the save of step 6 has waited for that of step 3
    for process in processes[::-1]:
        process.kill()
        process.wait()
    finish(processes, (-9, -9))
    (out, _), _ = run_two(env, "train", *TINY, *EXPERTS, "--workdir", workdir)
    assert re.search("continuing after step [36]", out)
    same_trajectory(trajectory(workdir), trajectory(one))


@pytest.mark.parametrize("dead", [0, 1])
def test_a_dead_process_ends_the_other(env, two, tmp_path, dead):
    processes = start_two(env, "train", *ENDLESS, "--workdir", tmp_path / "run", devices=1)
    until(processes[0], "step 3/")
    processes[dead].kill()
    survivor = processes[1 - dead]
    _, err = survivor.communicate(timeout=LIMIT_S // 2)  # a connection that breaks tells it, not the heartbeat
    # Whichever notices first: our step, or JAX's connection to process 0, which aborts in C++.
    assert survivor.returncode in (5, -signal.SIGABRT)
    assert "lost another process" in err or "another task died" in err


def test_the_watchdog_ends_a_process_that_waits_for_one_that_is_stopped(env, two, tmp_path):
    # What the watchdog would have to wait for on a busy machine, compiling, is done before it is there.
    processes = start_two(env, "train", *ENDLESS, "--workdir", tmp_path / "compiles", devices=1)
    until(processes[0], "step 3/")
    for process in processes:
        process.kill()
        process.communicate()
    overrides = (*ENDLESS, "--config.training.watchdog_minutes=1")
    processes = start_two(env, "train", *overrides, "--workdir", tmp_path / "run", devices=1)
    until(processes[0], "step 3/")
    processes[1].send_signal(signal.SIGSTOP)
    try:
        _, err = processes[0].communicate(timeout=LIMIT_S // 2)  # before the heartbeat ends it
    finally:
        processes[1].kill()
        processes[1].communicate()
    assert processes[0].returncode == 4
    assert "training.watchdog_minutes: nothing since step" in err and "1 minutes ago" in err
    assert "most recent call first" in err and "loop.py" in err  # the stacks


@pytest.mark.parametrize(
    ("others", "says"),
    [
        (("--config.optim.lr=0.5",), "process 1 has optim.lr=0.5, process 0 has 0.003"),
        (("--config.data.eval_split=test",), "process 1 stopped: .*data.eval_split"),
    ],
)
def test_processes_that_disagree_end_in_one_line_each(env, two, tmp_path, others, says):
    workdir = tmp_path / "run"
    out = run_two(env, "train", *TINY, "--workdir", workdir, second=(others, {}), codes=(2, 2))
    for _, err in out:
        assert err.count("\n") == 1 and err.startswith("error: ")
    assert re.search(says, out[0][1]), out
    assert not workdir.exists()


@pytest.mark.parametrize("devices", [(4, 2), (1, 3)])
@pytest.mark.parametrize("module", ["train", "evaluate"])
def test_processes_with_unlike_numbers_of_devices_end_in_one_line_each(env, one, tmp_path, module, devices):
    workdir = tmp_path / "run"
    if module == "evaluate":
        shutil.copytree(one, workdir)
    before = sorted(workdir.rglob("*"))
    argv = (*TINY, "--workdir", workdir) if module == "train" else ("--workdir", workdir)
    out = run_two(env, module, *argv, devices=devices[0], second=((), {"devices": devices[1]}), codes=(2, 2))
    line = f"error: process 1 has {devices[1]} devices, process 0 has {devices[0]}; give every process as many"
    for printed, err in out:
        assert printed == "" and err.startswith(line) and err.count("\n") == 1
    assert sorted(workdir.rglob("*")) == before


def test_processes_with_other_code_are_told(env, two, tmp_path):
    shutil.copytree(ROOT / "spannorm_jax", tmp_path / "spannorm_jax")
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    with open(tmp_path / "spannorm_jax" / "model" / "moe.py", "a", encoding="utf-8") as file:
        file.write("# another line\n")
    out = run_two(env, "train", *TINY, "--workdir", tmp_path / "run", second=((), {"cwd": tmp_path}), codes=(2, 2))
    assert all(re.search(r"process 1 has code='\w+', process 0 has '\w+'; .*same code", err) for _, err in out)


def test_a_folder_in_use_ends_both(env, two, tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "something").touch()
    (_, first), (_, second) = run_two(env, "train", *TINY, "--workdir", workdir, codes=(2, 2))
    assert "is not a run" in first and second.startswith("error: process 0 stopped: ") and "is not a run" in second


@pytest.mark.parametrize(
    ("process", "says"), [(0, "not all of them came to {} within 1 s"), (1, "address {} after 1 s")], ids=str
)
def test_a_process_that_the_others_do_not_meet_ends_in_one_line(env, process, says):
    address = f"localhost:{free_port()}"
    flags = ("--coordinator", address, "--num_processes", 2, "--process_id", process, "--start_timeout_s", 1)
    (_, err) = finish([start(env, "train", *TINY, "--workdir", "never", *flags)], (2,))[0]
    assert err.count("\n") == 1 and says.format(address) in err
