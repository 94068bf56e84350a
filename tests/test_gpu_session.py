"""The session of one GPU, rehearsed with models that take a moment: its data, its deadline, and that it goes on."""

import functools
import shutil
import threading
from pathlib import Path
from typing import ClassVar

import pytest

from experiments import gpu_session
from experiments.sweep_records import archives, runs_in
from spannorm_jax.errors import UserError
from spannorm_jax.sweep.display import Display
from spannorm_jax.sweep.expansion import expand
from spannorm_jax.sweep.runner import check_groups

SWEEPS = """
from spannorm_jax.config_file import default_config
from spannorm_jax.sweep.definition import options, product, seeds

def get_config(arg=None):
    config = default_config()
    config.model.depth, config.model.width, config.model.num_heads, config.model.ffn_dim = 1, 16, 1, 16
    config.data.seq_len, config.training.steps = 16, 4
    config.data.train_split, config.data.eval_split, config.eval.tokens = "train[:2%]", "validation[:20%]", 256
    return config

def sweep_rung_m(size):
    return product(seeds(2), options({"optim.lr": (1e-3, 2e-3)}))

def sweep_rate_stress(size):
    return product(seeds(2), options({"optim.lr": (3e-3, 6e-3)}))
"""
TINY = ["--config.platform=cpu", "--config.eval.batch_size=8"]


@pytest.fixture
def work(tmp_path, monkeypatch):
    """The work folder of a checkout whose sweeps have the names of the plan's first parts, and caches of its own."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "dense.py").write_text(SWEEPS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
    monkeypatch.setattr(gpu_session, "JOBS", 1)
    monkeypatch.setattr(gpu_session, "PLAN", gpu_session.PLAN[:4])
    return tmp_path / "work"


def session(work):
    return gpu_session.main(["--minutes=60", "--out=records", f"--work={work}", *TINY])


def ended():
    """Runs in the archives of records/, by sweep."""
    return {name: sum(len(runs_in(path)) for path in paths) for name, paths in archives(Path("records")).items()}


def test_a_part_is_lanes_of_few_programs_and_all_parts_read_the_same_data():
    carried = (("data.cache_dir", "tokens"), ("data.full_name", "python_source/sys_path_01234567/1.0.0"))
    overrides = (*gpu_session.QUICK, *carried)
    parts = [(part, part.of(expand(part.sweep, "cpu", overrides=overrides))) for part in gpu_session.PLAN]
    assert len({(run.config.data, run.config.eval.tokens) for _, sweep in parts for run in sweep.runs}) == 1
    names = [run.name for _, sweep in parts for run in sweep.runs]
    whole = [run.name for name in {part.sweep for part, _ in parts} for run in expand(name, "cpu").runs]
    assert sorted(names) == sorted(whole)  # each once, by the name that its sweep gives it
    for part, sweep in parts:
        check_groups(sweep, part.lanes)


class Alarm:
    """A timer that rings when the test says so."""

    set_ones: ClassVar[list] = []

    def __init__(self, seconds, function, arguments):
        self.ring = functools.partial(function, *arguments)

    def start(self):
        self.set_ones.append(self)

    def cancel(self):
        self.set_ones.clear()


@pytest.mark.process
def test_a_session_ends_at_its_deadline_with_records_and_goes_on(work, monkeypatch, capfd):
    """The data come from another machine: where the session is, none can be made."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(work.parent / "tfds"))
    assert gpu_session.main(["--prepare", f"--work={work}", *TINY]) == 0
    assert f"carry along {work / 'data.tar.xz'}" in capfd.readouterr().out
    shutil.rmtree(work / "tokens")
    (work.parent / "none").write_text("")
    monkeypatch.setenv("TFDS_DATA_DIR", str(work.parent / "none"))
    monkeypatch.setattr(threading, "Timer", Alarm)
    started = Display.started

    def in_the_third_part(display, run, *more):
        started(display, run, *more)
        if run.config.seed == 1 and Alarm.set_ones:
            Alarm.set_ones.pop(0).ring()

    with monkeypatch.context() as deadline:
        deadline.setattr(Display, "started", in_the_third_part)
        assert session(work) == 0
    assert ended() == {"rung_m": 2, "rate_stress": 2}
    assert "stopped; the same command goes on" in capfd.readouterr().out
    assert session(work) == 0
    assert ended() == {"rung_m": 4, "rate_stress": 4}


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--minutes=15", "--out=records"], "data.tar.xz; make it: .*--prepare"),
        (["--minutes=1", "--out=records"], "--minutes, above 1"),
        (["--minutes=inf", "--out=records"], "below 10,000"),
        (["--minutes=15"], "takes --out"),
    ],
)
def test_a_session_that_cannot_be_is_one_line(work, argv, says):
    with pytest.raises(UserError, match=says):
        gpu_session.main([*argv, f"--work={work}"])
