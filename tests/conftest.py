"""JAX as the tests see it: on the CPU, eight fake devices, and programs kept from one run of the tests to the next.

Mesh tests use all eight devices, the others `jax.devices()[:1]`. The environment is put back once JAX has read it, so
that a program which a test starts sees what a user's would.
"""

import os
from pathlib import Path

from processes import THREADS, user_env, xla_flags

FLAG = xla_flags(devices=8)

_usual = {name: os.environ.get(name) for name in ("XLA_FLAGS", *THREADS)}
os.environ["XLA_FLAGS"] = f"{_usual['XLA_FLAGS'] or ''} {FLAG}".strip()
os.environ |= THREADS
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import pytest  # noqa: E402

from spannorm_jax.command import run_command  # noqa: E402

assert jax.device_count() == 8, "JAX was started before tests/conftest.py could ask for eight devices"

for _name, _value in _usual.items():
    if _value is None:
        del os.environ[_name]
    else:
        os.environ[_name] = _value

if not jax.config.jax_compilation_cache_dir:
    _cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "spannorm_jax" / "xla-tests"
    jax.config.update("jax_compilation_cache_dir", str(_cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)

# Neither the tests' models nor their batches are large enough to pay for optimised code: a third of the compile time.
jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="module")
def env(tmp_path_factory):
    """A user with one CPU device and caches of their own, shared by the processes of a module."""
    return user_env(tmp_path_factory.mktemp("home"), Path(__file__).parents[1])


@pytest.fixture
def own_caches(monkeypatch, tmp_path):
    """This process as that of a user with caches of their own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))


@pytest.fixture
def refuse(monkeypatch, capsys):
    """Runs a command line and returns the one line it was refused with."""

    def run(command, *argv):
        monkeypatch.setattr("sys.argv", ["command", *map(str, argv)])
        with pytest.raises(SystemExit) as exit_:
            run_command(command.main)
        printed = capsys.readouterr()
        assert exit_.value.code == 2 and printed.err.count("\n") == 1, printed.err
        assert "Traceback" not in printed.err + printed.out
        return printed.err

    return run
