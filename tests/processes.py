"""What tests of whole processes share: a limit for those that hang, and a moment that waits until a test has acted."""

import os
import subprocess
import sys

LIMIT_S = 600  # for one process; only one that hangs takes so long, however busy the machine is

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
