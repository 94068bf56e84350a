"""What a fault campaign works with: an unbroken run to compare with, processes that may not hang, damage to files."""

import functools
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.record import read_records

ROOT = Path(__file__).parents[2]
STEPS = 40
TINY = (
    f"--config={ROOT}/configs/dense.py:depth=1,width=16",
    f"--config.training.steps={STEPS}",
    "--config.data.seq_len=32",
    "--config.training.batch_size=4",
    "--config.checkpoint.every_steps=2",
    "--config.metrics.console_every_s=0",
    "--config.metrics.block_grad_every=10",
    "--config.eval.tokens=2000",
)
LIMIT_S = 300  # for one process; none may hang
# A file system of a size in a name space of its own: $1 size, $2 where, $3 what keeps it, then a command. That is run,
# with its exit code in $2.code, and again with more room.
TMPFS = """
mount -t tmpfs -o size="$1" tmpfs "$2" || exit 99
point="$2" kept="$3"; shift 3
"$@"; echo $? > "$point.code"
mount -o remount,size=64m "$point"
"$@" && cp -r "$point" "$kept"
"""


class Campaign:
    """Folders, environment and records of one campaign; the caches are shared so that starts are cheap."""

    def __init__(self, folder: Path, seed: int, show: Callable[[str], Any]):
        self.folder, self.random, self.show = folder, random.Random(seed), show
        self.cases: list[dict[str, Any]] = []
        self.env = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "TFDS_DATA_DIR")}
        self.env |= {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
        self.env |= {"TFDS_DATA_DIR": str(folder / "tfds"), "PYTHONUNBUFFERED": "1"}
        self.env.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "xla"))
        self.env |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        self.unbroken = folder / "unbroken"
        code, out = self.train(self.unbroken)
        assert code == 0, out
        began, (code, out) = time.monotonic(), self.train(folder / "again")
        assert code == 0, out
        self.run_s = time.monotonic() - began  # with warm caches
        self.expected = metrics(self.unbroken)
        self.check("two unbroken runs", "bitwise the same metrics", metrics(folder / "again") == self.expected)

    def command(self, module: str, *argv: object) -> list[str]:
        return [sys.executable, "-m", f"spannorm_jax.{module}", *map(str, argv)]

    def start(self, command: list[str], largest_file: int | None = None, **more: Any) -> subprocess.Popen:
        """`largest_file`: bytes beyond which no file grows. Python ignores SIGXFSZ, so that a longer write fails."""
        if largest_file is not None:
            limits = (largest_file, largest_file)
            more["preexec_fn"] = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, limits)
        usual = {"env": self.env, "cwd": self.folder, "stderr": subprocess.STDOUT}
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, errors="replace", **usual | more)

    def run(self, command: list[str], **more: Any) -> tuple[int, str]:
        """(exit code, output); -99 for a process that had to be killed because it hung."""
        return ended(self.start(command, **more))

    def train(self, workdir: Path, *argv: str, **more: Any) -> tuple[int, str]:
        return self.run(self.command("train", *TINY, *argv, "--workdir", workdir), **more)

    def evaluate(self, workdir: Path, *argv: str) -> tuple[int, str]:
        return self.run(self.command("evaluate", "--workdir", workdir, "--json", *argv))

    def copy(self, name: str, *, done: bool = False) -> Path:
        """A copy of the unbroken run; without DONE it is one that was killed at the very end."""
        workdir = self.folder / name
        shutil.copytree(self.unbroken, workdir)
        if not done:
            (workdir / "DONE").unlink()
        return workdir

    def check(self, case: str, expected: str, ok: bool, seen: str = "") -> None:
        said = last_line(seen).replace(str(self.folder), "DIR")
        self.cases.append({"case": case, "expected": expected, "seen": said or ("so" if ok else "otherwise"), "ok": ok})
        self.show(f"{'ok  ' if ok else 'FAIL'} {case}: {said or expected}")

    def check_finishes(self, case: str, workdir: Path) -> None:
        code, out = self.train(workdir)
        ok = code == 0 and "Traceback" not in out and metrics(workdir) == self.expected
        self.check(case, "the same command goes on; metrics bitwise as unbroken", ok, out)


def ended(process: subprocess.Popen) -> tuple[int, str]:
    try:
        out, _ = process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        out, _ = process.communicate()
        return -99, out + f"\nhung: killed after {LIMIT_S} s"
    return process.returncode, out


def filling(c: Campaign, size: str, kept: Path, command: Callable[[Path], list[str]]) -> tuple[int, int, str] | None:
    """A command in a folder that fills up, and again once it has room: both exit codes, and what both have printed.

    What the second one leaves is copied to `kept`. None, which is said, where no file system can be mounted.
    """
    point = Path(f"{kept}.tmpfs")
    point.mkdir()
    own_space = ["unshare", *([] if os.getuid() == 0 else ["-r"]), "-m"]
    code, out = c.run([*own_space, "sh", "-c", TMPFS, "sh", size, str(point), str(kept), *command(point)])
    first = Path(f"{point}.code")
    if code == 99 or not first.exists():
        c.show("skipped: a full tmpfs, which cannot be mounted here")
        return None
    return int(first.read_text(encoding="utf-8")), code, out


def until(process: subprocess.Popen, text: str) -> str:
    """Reads output up to a line that starts with `text`."""
    read = ""
    for line in process.stdout:
        read += line
        if line.startswith(text):
            break
    return read


def metrics(workdir: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl without what depends on the machine and the moment."""
    lines = read_records(workdir / "metrics.jsonl")
    return [{key: value for key, value in line.items() if not key.endswith("_s")} for line in lines]


def last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return ([line for line in lines if line.startswith("error:")] or lines or [""])[-1][:300]


def refused(code: int, out: str, *words: object, noisy: bool = False) -> bool:
    """Exit code 2, one line of error that holds the words, and no traceback.

    noisy: allows tracebacks above the line. When a write fails, threads of Orbax's storage library may print one each.
    """
    errors = [line for line in out.splitlines() if line.startswith("error:")]
    return (
        code == 2 and (noisy or "Traceback" not in out) and len(errors) == 1 and all(str(w) in errors[0] for w in words)
    )


def flip(path: Path) -> None:
    """Changes one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)
