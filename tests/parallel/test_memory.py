"""What a step's memory costs the kernel: glibc keeps what a step frees, in a process of its own."""

import json
import os
import subprocess
import sys

import pytest
from processes import LIMIT_S

pytestmark = pytest.mark.process

STEPS = 20
CHILD = f"""
import json, resource
import jax, numpy as np
from spannorm_jax.config_file import load, resolve_without_data
from spannorm_jax.model.definition import define
from spannorm_jax.parallel.mesh import make_mesh
from spannorm_jax.parallel.platform import start_jax
from spannorm_jax.training.numbers import numbers_of, on_devices
from spannorm_jax.training.step import make_program

config = resolve_without_data(load("configs/dense.py:tiny,depth=8", []), "cpu")
start_jax("cpu")
mesh = make_mesh(config.mesh)
with jax.set_mesh(mesh):
    program = make_program(config, define(config.model, config.execution), mesh)
    state, numbers = program.init(0), on_devices(numbers_of(config), mesh)
    rows = np.zeros((config.training.batch_size, config.data.seq_len + 1), np.int32)
    tokens = program.put({"tokens": rows})
    step = program.train.lower(state, tokens, numbers).compile()
    faults = []
    for _ in range({STEPS}):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        state, _ = jax.block_until_ready(step(state, tokens, numbers))
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(json.dumps(dict(temporaries=step.memory_analysis().temp_size_in_bytes, faults=faults)))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_a_step_finds_its_memory_where_the_last_one_left_it():
    """Without, every step faults its whole block in: as many faults as it has pages.

    A block may still be held when the next step asks for one, or a small request may have cut it:
    then another one is faulted in. Of 30 steps up to 3 did, never more than a few of the first.
    """
    env = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "GLIBC_TUNABLES")}
    done = subprocess.run([sys.executable, "-c", CHILD], env=env, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    pages = found["temporaries"] / os.sysconf("SC_PAGE_SIZE")
    assert pages > 10_000
    assert sum(faults > pages / 100 for faults in found["faults"]) <= STEPS / 2, found
