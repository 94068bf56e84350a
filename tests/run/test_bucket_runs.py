"""Whole runs in a bucket: killed, beside another, with errors of the service, and what reads them."""

import json
import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from processes import LIMIT_S

from spannorm_jax.run import bucket, lines
from spannorm_jax.run.folder import run_folder_path

pytestmark = pytest.mark.buckets

ROOT = Path(__file__).parents[2]
SMALL = {
    "training.steps": 12,
    "checkpoint.every_steps": 4,
    "metrics.log_every": 1,
    "eval.tokens": 2048,
    "model.depth": 2,
    "model.width": 32,
    "training.batch_size": 2,
    "data.seq_len": 32,
}
CONFIG = ["--config", "configs/dense.py:tiny", *(f"--config.{key}={value}" for key, value in SMALL.items())]


@pytest.fixture
def address(service):
    service.faults.clear()
    return f"{service.scheme}://bucket/{uuid.uuid4().hex}"


@pytest.fixture(scope="module")
def on_a_disk(tmp_path_factory):
    """The lines of the same run in a folder."""
    workdir = tmp_path_factory.mktemp("disk") / "run"
    assert run("train", *CONFIG, "--workdir", str(workdir)).returncode == 0
    return numbers(workdir)


def command(program, *arguments):
    return [sys.executable, "-m", f"spannorm_jax.{program}", *arguments]


def run(program, *arguments):
    return subprocess.run(command(program, *arguments), cwd=ROOT, text=True, capture_output=True, timeout=LIMIT_S)


def numbers(workdir):
    """The lines of metrics.jsonl without what depends on the machine."""
    read = [json.loads(line) for line in lines.read(workdir / "metrics.jsonl").splitlines()]
    return [{key: value for key, value in line.items() if not key.endswith("_s")} for line in read]


def killed_after(text, *arguments, stop=signal.SIGKILL):
    """Starts training, and sends a signal at the first line that begins so."""
    process = subprocess.Popen(command("train", *arguments), cwd=ROOT, text=True, stdout=-1, stderr=subprocess.STDOUT)
    said = []
    for line in process.stdout:
        said.append(line)
        if line.startswith(text):
            process.send_signal(stop)
            break
    rest, _ = process.communicate(timeout=LIMIT_S)
    return process.returncode, "".join(said) + rest


def test_a_run_that_is_killed_and_meets_errors_goes_on_bitwise(service, address, on_a_disk, tmp_path):
    workdir = run_folder_path(address)
    often = ["--config.metrics.console_every_s=0", "--workdir", address]
    for code in (429, 500, 503):
        service.fail(code, of=lambda method, path: method != "GET")
        service.fail(code, of=lambda method, path: method == "GET")
    code, said = killed_after("step 9/", *CONFIG, *often)
    assert code == -signal.SIGKILL, said
    assert not (workdir / "DONE").exists()
    for code in (503, 429):
        service.fail(code, times=2)
    ended = run("train", *CONFIG, *often)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "continuing after step 8" in ended.stdout or "continuing after step 4" in ended.stdout
    assert sum(fault.times for fault in service.faults) == 0
    assert numbers(workdir) == on_a_disk

    measured = run("evaluate", "--workdir", address, "--json")
    assert measured.returncode == 0, measured.stderr
    assert json.loads(measured.stdout)["step"] == 12
    assert [json.loads(line)["step"] for line in lines.read(workdir / "eval.jsonl").splitlines()] == [12]
    text = run("sample", "--workdir", address, "--prompt", "def ", "--max_tokens", "4")
    assert text.returncode == 0, text.stderr
    assert run("report", address).returncode == 0
    assert b"<html" in bucket.read(workdir / "report" / "report.html")
    exported = run("export", "--workdir", address, "--out", str(tmp_path / "hf"))
    assert exported.returncode == 0, exported.stderr
    assert "nats a token, " in (tmp_path / "hf" / "README.md").read_text()  # of eval.jsonl
    signal_of = run("analysis.signal", "--workdir", address, "--only", "forward", "--rows", "1", "--json")
    assert json.loads(signal_of.stdout)["step"] == 12
    again = run("train", *CONFIG, *often)
    assert (again.returncode, "is done already" in again.stdout) == (0, True)


def test_a_second_trainer_and_another_config_are_refused_in_one_line(address):
    first = subprocess.Popen(
        command("train", *CONFIG, "--config.training.steps=100000", "--workdir", address),
        cwd=ROOT, text=True, stdout=-1, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        for line in first.stdout:
            if line.startswith("step 1/"):
                break
        for more, words in (
            ("--config.training.steps=100000", f"--workdir {address} is in use by process {first.pid}"),
            ("--config.training.steps=7", "holds a run with training.steps=100000, not 7"),
        ):
            second = run("train", *CONFIG, more, "--workdir", address)
            assert second.returncode == 2
            assert words in second.stderr
            assert "Traceback" not in second.stderr
    finally:
        first.send_signal(signal.SIGTERM)
        said, _ = first.communicate(timeout=LIMIT_S)
    assert first.returncode == 0, said
    assert "the same command goes on" in said


def test_a_damaged_checkpoint_is_moved_aside_and_an_older_one_is_taken(address):
    workdir = run_folder_path(address)
    assert run("train", *CONFIG, "--config.training.steps=8", "--workdir", address).returncode == 0
    before = numbers(workdir)
    names = [name for name in bucket.checksums(workdir / "checkpoints" / "8") if name.startswith("params/d/")]
    bucket.write(workdir / "checkpoints" / "8" / names[0], b"something else")
    found = run("evaluate", "--workdir", address, "--json")
    assert json.loads(found.stdout)["step"] == 4
    assert "is damaged" in found.stderr
    ended = run("train", *CONFIG, "--config.training.steps=8", "--workdir", address)
    assert ended.returncode == 0, ended.stderr
    assert "is damaged" in ended.stdout
    assert "continuing after step 4" in ended.stdout
    assert bucket.read(workdir / "damaged" / "8" / names[0]) == b"something else"
    assert numbers(workdir) == before


def test_a_run_that_was_copied_from_a_disk_goes_on(address, tmp_path, on_a_disk):
    local = tmp_path / "run"
    code, said = killed_after("step 9/", *CONFIG, "--config.metrics.console_every_s=0", "--workdir", str(local))
    assert code == -signal.SIGKILL, said
    for folder, _, names in os.walk(local):
        for name in names:
            path = Path(folder) / name
            bucket.write(run_folder_path(address) / path.relative_to(local).as_posix(), path.read_bytes())
    ended = run("train", *CONFIG, "--workdir", address)
    assert ended.returncode == 0, ended.stderr
    assert "continuing after step" in ended.stdout
    assert numbers(run_folder_path(address)) == on_a_disk


def test_a_run_that_is_copied_to_a_disk_goes_on(address, tmp_path, on_a_disk):
    code, said = killed_after("step 9/", *CONFIG, "--config.metrics.console_every_s=0", "--workdir", address)
    assert code == -signal.SIGKILL, said
    there = run_folder_path(address)
    for name in bucket.checksums(there):
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_bytes(bucket.read(there / name))
    ended = run("train", *CONFIG, "--workdir", str(tmp_path / "run"))
    assert ended.returncode == 0, ended.stderr
    assert "continuing after step" in ended.stdout
    assert numbers(tmp_path / "run") == on_a_disk


def test_a_sweep_in_a_bucket_is_run_once_by_two_runners_and_reported(address):
    def sweep(verb, start=run):
        return start("sweep", "seed", verb, *CONFIG[:1], "configs/dense.py", *CONFIG[2:], "--out", address)

    runners = [sweep("local", lambda *words: subprocess.Popen(command(*words), cwd=ROOT, stdout=-3)) for _ in range(2)]
    assert [runner.wait(timeout=LIMIT_S) for runner in runners] == [0, 0]
    assert "3 done" in sweep("status").stdout
    out = run_folder_path(address)
    names = [name for name in bucket.entries(out) if name not in (".sweep", "reports")]
    assert [len(lines.read(out / name / "starts.jsonl").splitlines()) for name in names] == [1, 1, 1]
    assert [len(lines.read(out / name / "eval.jsonl").splitlines()) for name in names] == [1, 1, 1]
    assert b"step 12/12" in bucket.read(out / ".sweep" / names[0] / "log.txt")
    reported = sweep("report")
    assert reported.returncode == 0, reported.stderr
    assert f"{address}/reports/seed-cpu/report.html" in reported.stdout
