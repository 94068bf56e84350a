"""Datasets that the data tests share: `python_source`, and a tiny TFDS dataset of our own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import prepare

import spannorm_jax
from spannorm_jax.command import run_command
from spannorm_jax.config import DataConfig
from spannorm_jax.errors import UserError


@pytest.fixture(scope="session")
def source_data(tmp_path_factory) -> DataConfig:
    """python_source, prepared and tokenised once by whoever asks first."""
    root = tmp_path_factory.mktemp("source")
    return DataConfig(data_dir=str(root / "tfds"), cache_dir=str(root / "cache"))


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory) -> str:
    root = tmp_path_factory.mktemp("tiny")
    prepare(root)
    return str(root)


@pytest.fixture
def tiny(tiny_dir, tmp_path) -> DataConfig:
    """The tiny dataset with a cache of the test's own."""
    names = {"dataset": "tiny_lines", "text_feature": "line", "eval_split": "test"}
    return DataConfig(**names, data_dir=tiny_dir, cache_dir=str(tmp_path / "cache"))


DIE = """
import os, signal
from spannorm_jax import durable
durable.publish = lambda folder, target: os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def start_python():
    """Starts `python -c code args...`, where `data` is the first argument, a config; `die`: before it publishes."""

    def start(code, data, *args, die=False):
        env = os.environ | {"PYTHONPATH": str(Path(spannorm_jax.__file__).parents[1])}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        begin = f"import sys; from spannorm_jax.config import DataConfig; data = {data}\n"
        begin += DIE if die else ""
        return subprocess.Popen([sys.executable, "-c", begin + code, *map(str, args)], env=env, **pipes)

    return start


@pytest.fixture
def refused():
    """The one line that a function is refused with."""

    def line_of(function, *args):
        with pytest.raises(UserError) as refusal:
            function(*args)
        line = str(refusal.value)
        assert "\n" not in line and len(line) < 1000
        return line

    return line_of


@pytest.fixture
def refuse(monkeypatch, capsys):
    """The one line that a command line is refused with."""

    def run(command, *argv):
        monkeypatch.setattr(sys, "argv", ["command", *map(str, argv)])
        with pytest.raises(SystemExit) as exit_:
            run_command(command.main)
        line = capsys.readouterr().err
        assert exit_.value.code == 2 and line.count("\n") == 1, line
        return line

    return run
