"""What memory costs the kernel: glibc keeps what a step frees, in every process that takes steps."""

import json
import os
import subprocess
import sys

import pytest
from processes import LIMIT_S

STEPS = """
import ctypes, json, os, resource, sys, threading
from spannorm_jax.parallel.platform import start_jax
from spannorm_jax.sweep import worker

libc = ctypes.CDLL(None)
libc.malloc.argtypes, libc.malloc.restype, libc.free.argtypes = [ctypes.c_size_t], ctypes.c_void_p, [ctypes.c_void_p]
faults = []

def steps():
    for _ in range(4):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        block = libc.malloc(2**27)
        ctypes.memset(block, 1, 2**27)
        libc.free(block)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

def hello(platform):
    for thread in [threading.Thread(target=steps) for _ in range(3)]:
        thread.start()
        thread.join()
    os.write(2, json.dumps(faults).encode())
    os._exit(0)

if sys.argv[1] == "trainer":
    start_jax("cpu")
    hello("cpu")
worker._hello = hello
worker.main([json.dumps({"cores": [], "platform": "cpu", "out": "."})])
"""


@pytest.mark.process
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
@pytest.mark.parametrize("who", ["trainer", "worker"])
def test_a_step_finds_its_memory_where_the_last_one_left_it(who):
    """Whatever thread asks for it: 2^27 bytes are 32,768 pages, and were faulted in at each step."""
    env = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "GLIBC_TUNABLES")}
    argv = [sys.executable, "-c", STEPS, who]
    done = subprocess.run(argv, stdin=subprocess.PIPE, capture_output=True, text=True, env=env, timeout=LIMIT_S)
    faults = json.loads(done.stderr)
    assert len(faults) == 12 and sum(faults[1:]) < 2**15, faults
