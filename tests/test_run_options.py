"""One run, as a user starts it, with the options that add records: tokens, wsd, a profiler trace, wandb."""

import json

import numpy as np
import pytest
from processes import finish, launch, lines_of, user_env

pytestmark = pytest.mark.process

WANDB = """
import json, os

class Error(Exception):
    pass

def _note(kind, **values):
    with open(os.environ["FAKE_WANDB"], "a") as file:
        file.write(json.dumps({"kind": kind, **values}) + "\\n")

class Run:
    def log(self, scalars, step):
        _note("log", scalars=scalars, step=step)

    def finish(self):
        _note("finish")

def init(project, id, name, dir, config, resume):
    if "FAKE_WANDB_REFUSES" in os.environ:
        raise Error("api_key not configured")
    _note("init", project=project, id=id, name=name, dir=dir, steps=config["training"]["steps"], resume=resume)
    return Run()
"""
OPTIONS = (
    "--config=configs/dense.py:depth=1,width=16,placement=span,init=scale",
    "--config.data.seq_len=16",
    "--config.training.steps=0",
    "--config.training.tokens=1200",  # of 8 x 16 an update: 9.4 updates, so 10
    "--config.checkpoint.every_steps=0",
    "--config.optim.schedule=wsd",
    "--config.optim.decay_fraction=0.5",
    "--config.metrics.wandb_project=norms",
    "--profile_steps=3:4",
)


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    (home / "wandb.py").write_text(WANDB)
    env = user_env(home, home) | {"FAKE_WANDB": str(home / "seen.jsonl")}

    def run(workdir, *options, code=0, **more_env):
        out, err = finish(launch(env | more_env, "train", *OPTIONS, "--workdir", workdir, *options), code)
        path = home / "seen.jsonl"
        seen = lines_of(path) if path.exists() else []
        path.unlink(missing_ok=True)
        return out, err, seen

    return run


@pytest.fixture(scope="module")
def finished(train, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "run"
    return workdir, *train(workdir)


def test_tokens_decide_the_steps_and_the_schedule_follows(finished):
    lines, config = lines_of(finished[0] / "metrics.jsonl"), json.loads((finished[0] / "config.json").read_text())
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert config["training"]["steps"] == 10 and config["training"]["tokens"] == 1200
    peak, final = config["optim"]["lr"], 0.1
    decay = [peak * (1 - (1 - final) * k / 5) for k in range(1, 6)]
    np.testing.assert_allclose([line["lr"] for line in lines], [peak] * 5 + decay, rtol=1e-6)


def test_the_trace_lies_in_the_folder(finished):
    workdir, out, _, _ = finished
    assert f"steps 3 to 4 are traced into {workdir / 'profile'}" in out
    traces = list((workdir / "profile").rglob("*.xplane.pb"))
    assert len(traces) == 1 and traces[0].stat().st_size > 10_000
    assert (b"dot_general" in traces[0].read_bytes()) or (b"train" in traces[0].read_bytes())


def test_wandb_sees_the_scalars_of_metrics_jsonl(finished):
    workdir, _, _, seen = finished
    [init, *logs, finish] = seen
    assert init["project"] == "norms" and init["name"] == "run" and init["dir"] == str(workdir)
    assert init["steps"] == 10 and finish == {"kind": "finish"}
    for log, line in zip(logs, lines_of(workdir / "metrics.jsonl"), strict=True):
        values = {**line, **line["machine_s"]}
        scalars = {key: x for key, x in values.items() if isinstance(x, int | float)}
        largest = {f"largest/{key}": max(x) for key, x in values.items() if isinstance(x, list)}
        assert log == {"kind": "log", "scalars": scalars | largest, "step": line["step"]}
    assert "largest/update_ratio" in logs[0]["scalars"]


def test_continued_it_is_the_same_wandb_run_and_traces_nothing_twice(train, finished):
    """Killed after its last save, a run is only declared done; --profile_steps of steps that are past stop nothing."""
    workdir, _, _, before = finished
    lines = (workdir / "metrics.jsonl").read_bytes()
    (workdir / "DONE").unlink()
    out, _, seen = train(workdir)
    assert "no trace" in out and len(list((workdir / "profile").rglob("*.xplane.pb"))) == 1
    assert (workdir / "DONE").exists() and (workdir / "metrics.jsonl").read_bytes() == lines
    assert [s["kind"] for s in seen] == ["init", "finish"]
    assert seen[0] == before[0] and seen[0]["resume"] == "allow"


def test_wandb_that_refuses_is_one_line(train, tmp_path):
    _, err, _ = train(tmp_path / "run", code=2, FAKE_WANDB_REFUSES="1")
    assert err.count("\n") == 1 and "api_key not configured" in err and "WANDB_MODE=offline" in err
