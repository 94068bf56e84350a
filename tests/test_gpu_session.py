"""The session of one GPU, rehearsed with models that take a moment: its data, its deadline, and that it goes on."""

import functools
import json
import shutil
import threading
from pathlib import Path
from typing import ClassVar

import pytest

from experiments import gpu_session
from experiments.gpu_measures import MEASURES, Measure
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
ROOT = Path(__file__).parents[1]
TINY = ["--config.platform=cpu", "--config.eval.batch_size=8"]


@pytest.fixture
def work(tmp_path, monkeypatch, own_caches):
    """The work folder of a checkout whose sweeps have the names of the plan's first parts, and caches of its own."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "dense.py").write_text(SWEEPS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(gpu_session, "JOBS", 1)
    monkeypatch.setattr(gpu_session, "MEASURES", ())
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


@pytest.mark.process
def test_a_session_records_each_measure_before_the_next_and_not_again(work, monkeypatch, capfd):
    """One fails and the next follows; a benchmark that is stopped leaves no record, and only these are tried again."""
    quick = ("--rounds=1", "--steps=1")
    option = "--option=execution.attention=blocked,xla"
    step = ("--placements=span", "--only_steps", *quick)
    measures = [
        Measure("step", "throughput", "configs/dense.py", 2, step, 600),
        Measure("unknown", "throughput", "configs/dense.py", 2, ("--rounds=none",), 600),
        Measure("stopped", "throughput", "configs/dense.py", 2, step, 0.1),
        Measure("attention", "variants", "configs/dense.py", 2, (option, *quick), 600),
    ]
    monkeypatch.setattr(gpu_session, "MEASURES", measures)
    monkeypatch.setattr(gpu_session, "PLAN", gpu_session.PLAN[:1])
    monkeypatch.setattr(gpu_session, "local", lambda *args: 0)
    assert gpu_session.main(["--prepare", f"--work={work}", *TINY]) == 0
    assert session(work) == 1
    assert {path.name for path in Path("records").glob("gpu-*")} == {"gpu-step.json", "gpu-attention.json"}
    texts = [Path(f"records/gpu-{name}.json").read_text(encoding="utf-8") for name in ("step", "attention")]
    step, attention = map(json.loads, texts)
    assert step["placements"].keys() == {"pre", "span"}
    assert step["placements"]["span"]["compile_s"] > 0
    assert attention["variants"].keys() == {"blocked", "xla"}
    said = capfd.readouterr().out
    assert "unknown: failed with code 2" in said
    assert "stopped: stopped" in said
    monkeypatch.setattr(gpu_session, "MEASURES", [measures[0], measures[3]])
    assert session(work) == 0
    assert "at most" not in capfd.readouterr().out


def test_what_a_measure_compiles_is_what_its_command_does():
    """A measure's options are those of its benchmark, and each program is one that a plan can be asked for."""
    for one in MEASURES:
        titles = [title for title, *_ in one.programs([("data.dataset", "python_source")])]
        kinds = {kind for _, kind, *_ in one.programs([])}
        assert len(titles) == len({*titles}) > 1
        assert kinds <= {"train", "lanes"}


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--minutes=15", "--out=records"], "data.tar.xz; make it: .*--prepare"),
        (["--minutes=1", "--out=records"], "--minutes, above 1"),
        (["--minutes=inf", "--out=records"], "below 10,000"),
        (["--minutes=15"], "takes --out"),
        (["--compile=h100"], "--compile takes --out"),
    ],
)
def test_a_session_that_cannot_be_is_one_line(work, argv, says):
    with pytest.raises(UserError, match=says):
        gpu_session.main([*argv, f"--work={work}"])
