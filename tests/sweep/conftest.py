"""A config file with sweeps of runs that take a moment, and a user's home with caches of its own."""

import os

import pytest
from processes import user_env

from spannorm_jax.parallel.platform import start_jax

CONFIG = """
from spannorm_jax.config_file import default_config, parse_arg
from spannorm_jax.sweep.definition import chain, fixed, options, sweep_seed

def get_config(arg=None):
    arg = parse_arg(arg, placement="span")
    config = default_config()
    config.model.placement = arg.placement
    config.model.depth, config.model.width, config.model.num_heads, config.model.ffn_dim = 1, 16, 1, 16
    config.data.seq_len, config.training.steps = 16, 6
    config.eval.tokens, config.eval.batch_size, config.checkpoint.every_steps = 256, 8, 2
    return config

def sweep_lr(size):
    return options({"optim.lr": (1e-3, 2e-3, 3e-3)})

def sweep_mixed(size):
    return chain(
        fixed("", {"data.train_split": "nothing"}),
        fixed("", {"optim.lr": 2e8, "checkpoint.every_steps": 1}),
        fixed(),
    )

def sweep_depth(size):
    return options({"model.depth": (1, 2)})

def sweep_off(size):
    return options({"optim.lr": (1e-3, 2e8, 2e-3), "checkpoint.every_steps": (1,)})

def sweep_empty(size):
    return options({"seed": ()})

def sweep_twice(size):
    return options({"metrics.log_every": (1, 2)})

def sweep_broken(size):
    return options({"seed": 1 / 0})

def sweep_invalid(size):
    return options({"optim.lr": (1e-3, -1.0)})
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder that holds the caches of a module's runs."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def tiny(home):
    """The path of the config file."""
    (home / "tiny.py").write_text(CONFIG)
    return str(home / "tiny.py")


@pytest.fixture
def started(monkeypatch, home):
    """This process as a runner's worker: JAX is started, with the caches of that home."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(home / "tfds"))
    start_jax("auto")


@pytest.fixture(scope="module")
def env(home):
    """The environment of a process with one device and the caches of that home."""
    return user_env(home, home) | {"FIFO": str(home / "fifo")}


@pytest.fixture
def worker_that_waits(env):
    """A worker that writes its pid into FIFO and then opens FIFO.go waits there; a function returns the first's pid."""
    paths = [env["FIFO"], env["FIFO"] + ".go"]
    for path in paths:
        os.mkfifo(path)

    def wait():
        with open(paths[0], encoding="utf-8") as file:
            pid = int(file.read())
        os.unlink(paths[0])
        return pid

    yield wait
    for path in filter(os.path.exists, paths):
        os.unlink(path)
