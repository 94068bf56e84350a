"""What tests of whole processes share: a limit for those that hang, and a moment that waits until a test has acted."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LIMIT_S = 600  # for one process; only one that hangs takes so long, however busy the machine is


def xla_flags(devices: int) -> str:
    """So many fake devices in one process, without XLA's scheduler that runs independent collectives side by side.

    With it eight devices on two cores wait for one another for ever in some programs: 4 of 5 runs of
    the loss in pieces of a prime length did, and none of 10 without. On a busy machine their threads
    also take long to meet, where XLA allows 40 s.
    """
    limit = f"--xla_cpu_collective_call_terminate_timeout_seconds={2 * LIMIT_S}"
    in_order = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
    return f"--xla_force_host_platform_device_count={devices} {limit} {in_order}"


# Threads of XLA's pool, by the variable that it reads. A collective that waits holds one, and a device may wait in
# several at once: with as many threads as devices, some devices had none left to meet them with. With 64 a test still
# waited for ever, once, under load; the cause is not known, and 5,850 steps did not show it again.
THREADS = {"NPROC": "256"}

PAUSING = """
import io, os, runpy, signal, sys
text, module = sys.argv[1:3]
del sys.argv[1:3]

class Pausing(io.TextIOWrapper):
    begun = ""

    def write(self, said):
        count = super().write(said)
        *lines, self.begun = (self.begun + said).split("\\n")
        if any(line.startswith(text) for line in lines):
            self.flush()
            os.kill(os.getpid(), signal.SIGSTOP)
        return count

sys.stdout = Pausing(sys.stdout.buffer, encoding="utf-8", line_buffering=True)
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


def pausing(text: str, module: str) -> list[str]:
    """The beginning of a command line: like `python -m module`, but it stops itself once it has printed such a line.

    Whoever reads the line and then sends a signal may do so when the run has ended, on a busy machine.
    """
    return [sys.executable, "-c", PAUSING, text, module]


def paused(process: subprocess.Popen[str]) -> None:
    """Returns when the process has stopped itself; SIGCONT makes it go on."""
    state = os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    assert state is not None
    if state.si_code != os.CLD_STOPPED:
        raise AssertionError(f"it ended before that: {process.communicate()}")


def user_env(home: Path, *modules: str | Path) -> dict[str, str]:
    """The environment of a user with CPUs and caches of their own, who has `modules` on the path."""
    others = ("JAX_", "SLURM_", "XLA_", "PYTHONUTF8", "PYTHONIOENCODING")
    env = {key: value for key, value in os.environ.items() if not key.startswith(others)}
    if modules:
        env["PYTHONPATH"] = os.pathsep.join([*map(str, modules), env.get("PYTHONPATH", "")])
    return env | {"XDG_CACHE_HOME": f"{home}/cache", "TFDS_DATA_DIR": f"{home}/tfds", "JAX_PLATFORMS": "cpu"}


def launch(
    env: dict[str, str],
    module: str,
    *argv: object,
    devices: int = 1,
    pause_at: str | None = None,
    under: Sequence[str] = (),
    cwd: Path | None = None,
) -> subprocess.Popen[str]:
    """A command of the package in a process of its own; `pause_at`: see `pausing`; `under`: what starts it."""
    name = f"spannorm_jax.{module}"
    begin = pausing(pause_at, name) if pause_at else [sys.executable, "-m", name]
    env = {**env, **(THREADS if devices > 1 else {}), "XLA_FLAGS": xla_flags(devices)}
    command = [*under, *begin, *map(str, argv)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd)


def finish(process: subprocess.Popen[str], code: int = 0) -> tuple[str, str]:
    """(stdout, stderr) of a process that must end with `code`."""
    out, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == code, out + err
    return out, err


def lines_of(path: Path) -> list[dict[str, Any]]:
    """What a file of JSON lines holds."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def metrics(workdir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what depends on the machine and the moment."""
    lines = lines_of(workdir / "metrics.jsonl")
    return [{key: value for key, value in line.items() if not key.endswith("_s")} for line in lines]


def values_of(path: Path, key: str) -> list[Any]:
    """Of each line of a file of JSON lines its value of `key`."""
    return [line[key] for line in lines_of(path)]
