"""The launch scripts, with stand-ins for srun, scontrol and gcloud that write down what they are asked for."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from processes import LIMIT_S

from spannorm_jax.config import Config, to_dict
from spannorm_jax.errors import UserError
from spannorm_jax.parallel.rank import ProcessFlags, Rank, find_rank
from spannorm_jax.sweep import __main__ as sweep_command
from spannorm_jax.sweep.expansion import expand
from spannorm_jax.sweep.records import RunPlace
from spannorm_jax.train import parse

LAUNCH = Path(__file__).parents[1] / "experiments" / "launch"
STAND_IN = """#!/bin/bash
printf '%s|' "$(basename "$0")" "$@" >>"$CALLS"
echo >>"$CALLS"
read -r code rest <"$CODES"
echo "$rest" >"$CODES"
exit "${code:-0}"
"""


@pytest.fixture
def run(tmp_path):
    """run(script, arguments, exit codes of the programs it calls) -> its exit code, the calls, its stderr."""
    for name in ("srun", "scontrol", "gcloud", "sbatch"):
        (tmp_path / name).write_text(STAND_IN)
        (tmp_path / name).chmod(0o755)

    def start(script, *arguments, codes=(), **env):
        (tmp_path / "codes").write_text(" ".join(map(str, codes)) + "\n")
        (tmp_path / "calls").write_text("")
        done = subprocess.run(
            ["bash", str(LAUNCH / script), *arguments],
            env={
                "PATH": f"{tmp_path}:{os.environ['PATH']}",
                "CALLS": str(tmp_path / "calls"),
                "CODES": str(tmp_path / "codes"),
                "SLURM_JOB_ID": "4711",
                **env,
            },
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
        )
        calls = [line.rstrip("|").split("|") for line in (tmp_path / "calls").read_text().splitlines()]
        return done.returncode, calls, done.stderr

    return start


TRAIN = [".venv/bin/python", "-m", "spannorm_jax.train"]
ARGUMENTS = ("--config", "configs/dense.py:tiny", "--workdir", "runs/a b")


@pytest.mark.parametrize("code", [0, 2, 3])
def test_a_slurm_job_that_is_done_refused_or_diverged_ends(run, code):
    returned, calls, _ = run("slurm.sh", *ARGUMENTS, codes=[code])
    assert returned == code
    assert calls == [["srun", *TRAIN, "--stop_code=75", *ARGUMENTS]]


@pytest.mark.parametrize("code", [75, 4, 5, 134, 137])
def test_a_slurm_job_that_was_stopped_or_crashed_goes_back_to_the_queue(run, code):
    returned, calls, _ = run("slurm.sh", *ARGUMENTS, codes=[code])
    assert returned == 0 and calls[1:] == [["scontrol", "requeue", "4711"]]
    returned, calls, err = run("slurm.sh", *ARGUMENTS, codes=[code], SLURM_RESTART_COUNT="20")
    assert returned == code and len(calls) == 1 and "not again" in err


def test_each_task_of_an_array_is_a_run_of_the_sweep(run):
    code, [call], _ = run("slurm.sh", "sweep", "demo", "--size", "gpu", "--of", "x y", SLURM_ARRAY_TASK_ID="7")
    assert code == 0 and call[1:4] == [*TRAIN[:2], "spannorm_jax.sweep"]
    args, overrides = sweep_command.parse(call[4:])
    assert (args.names, args.verb, args.index, args.size, args.of, overrides) == ("demo", "run", 7, "gpu", "x y", [])
    assert run("slurm.sh", "sweep", "demo", codes=[75], SLURM_ARRAY_TASK_ID="7")[0] == 0  # back to the queue
    assert run("slurm.sh", "sweep", "demo", codes=[2], SLURM_ARRAY_TASK_ID="7")[0] == 2


def test_what_is_missing_is_submitted_as_one_array(run, tmp_path, monkeypatch, capsys):
    """The script that sbatch is given does the runs with the arguments that it is given."""
    sweep = expand("demo", "cpu", overrides=[("training.steps", "12")])
    for i, name in ((1, "DONE"), (2, "DIVERGED")):
        folder = tmp_path / "out" / sweep.runs[i].name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(to_dict(Config())))
        (folder / name).write_text('{"step": 12}')
        (folder / "eval.jsonl").write_text('{"step": 12}\n')
    failed = RunPlace(tmp_path / "out", sweep.runs[4].name)
    with failed.claim():
        failed.fail("no reason")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("CODES", str(tmp_path / "codes"))
    (tmp_path / "codes").write_text("0\n")
    argv = ["demo", "slurm", "--out", str(tmp_path / "out"), "--at_most=3", "--sbatch=--nodes=2 -p big"]
    assert sweep_command.main([*argv, "--config.training.steps=12"]) == 0
    [call] = (tmp_path / "calls").read_text().splitlines()
    name, array, job, *rest = call.rstrip("|").split("|")
    assert (name, array, job) == ("sbatch", "--array=0,3,5-8%3", "--job-name=demo")
    assert rest[:4] == ["--nodes=2", "-p", "big", "experiments/launch/slurm.sh"]

    _, [call], _ = run("slurm.sh", *rest[4:], SLURM_ARRAY_TASK_ID="3")
    args, overrides = sweep_command.parse(call[4:])
    assert expand(args.names, args.size, args.config, overrides) == sweep and args.of == sweep.hash
    assert (args.index, args.out, args.retry) == (3, tmp_path / "out", False)

    (tmp_path / "codes").write_text("1\n")
    with pytest.raises(UserError, match="sbatch refuses"):
        sweep_command.main([*argv, "--retry"])
    (tmp_path / "sbatch").unlink()
    with pytest.raises(UserError, match="no sbatch here"):
        sweep_command.main(argv)


def test_the_tpu_loop_repeats_what_crashed_and_ends_with_what_did_not(run):
    code, calls, _ = run("tpu_vm.sh", "slice", "zone", *ARGUMENTS, codes=[137, 0, 5, 0, 0])
    commands = [call[-1] for call in calls]
    assert code == 0 and ["pkill" in command for command in commands] == [False, True, False, True, False]
    assert commands[0].endswith(
        r"spannorm_jax.train --config.platform=tpu --config configs/dense.py:tiny --workdir runs/a\ b"
    )
    assert all("--worker=all" in call for call in calls)
    for end in (2, 3):
        assert run("tpu_vm.sh", "slice", "zone", *ARGUMENTS, codes=[end])[0] == end
    assert run("tpu_vm.sh", "slice", "zone")[0] == 2


def test_the_jobset_starts_a_run_that_can_be():
    """What its pods get is a rank that the program finds, and arguments that it takes."""
    manifest = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    [workers] = manifest["spec"]["replicatedJobs"]
    job = workers["template"]["spec"]
    pod = job["template"]["spec"]
    [container] = pod["containers"]
    env = {e["name"]: e["value"] for e in container["env"]} | {"JOB_COMPLETION_INDEX": "3"}
    host = f"{manifest['metadata']['name']}-{workers['name']}-0-0.{manifest['metadata']['name']}"
    port = container["ports"][0]["containerPort"]
    assert find_rank(ProcessFlags(), env) == Rank(f"{host}:{port}", 4, 3)
    assert job["completionMode"] == "Indexed" and job["completions"] == job["parallelism"] == 4
    # A failure policy of exit codes needs pods that are not restarted in place; it names the container.
    assert pod["restartPolicy"] == "Never" and job["backoffLimit"] == 0
    [rule] = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [2, 3]}
    assert container["command"][1:] == ["-m", "spannorm_jax.train"]
    _, workdir, flags, _ = parse(container["args"])
    assert str(workdir).startswith(container["volumeMounts"][0]["mountPath"]) and flags.stop_code == 75
    assert container["volumeMounts"][0]["name"] == pod["volumes"][0]["name"]


def test_shellcheck_finds_nothing():
    program = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    if program is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([program, *LAUNCH.glob("*.sh")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_every_command_of_the_page_runs(tmp_path):
    """From a laptop to a pod: all of its commands but those that need the machine, in order, as they stand."""
    page = (LAUNCH / "README.md").read_text().partition("## The machine")[0]
    commands = "\n".join(line for line in page.splitlines() if line.startswith("    "))
    assert commands.count("python -m") == 7
    for folder in ("configs", "spannorm_jax"):
        (tmp_path / folder).symlink_to(LAUNCH.parents[1] / folder)
    env = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    env |= {"PATH": f"{Path(sys.executable).parent}:{env['PATH']}", "JAX_PLATFORMS": "cpu"}
    script = f"set -e\n{commands}"
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=10 * LIMIT_S
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert {p.parent.name for p in tmp_path.glob("runs/*/DONE")} == {"pod", "pod-dense", "pod-expert", "pod-two"}
    assert "of 2 processes" in done.stdout and "collectives of a step" in done.stdout
