"""Where a process finds its place among others: flags, environment, Slurm."""

import pytest

from spannorm_jax.command import Parser, add_flags, flags_of
from spannorm_jax.errors import UserError
from spannorm_jax.parallel.rank import ProcessFlags, Rank, find_rank

SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu[007-009,012]",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}
KUBERNETES = {
    "JAX_COORDINATOR_ADDRESS": "run-workers-0-0.run:12345",
    "JAX_NUM_PROCESSES": "8",
    "JOB_COMPLETION_INDEX": "5",
}


def port(env):
    return int(find_rank(ProcessFlags(), env).coordinator.rpartition(":")[2])


def test_alone_without_flags_and_cluster():
    assert find_rank(ProcessFlags(), {}) is None
    assert find_rank(ProcessFlags(), KUBERNETES | {"JAX_NUM_PROCESSES": "1", "JOB_COMPLETION_INDEX": "0"}) is None
    assert find_rank(ProcessFlags(), SLURM | {"SLURM_STEP_NUM_TASKS": "1"}) is None


def test_a_shell_within_an_allocation_is_alone():
    """salloc and sbatch set what describes the job, srun alone what describes a step."""
    job = {key: value for key, value in SLURM.items() if "STEP" not in key}
    assert find_rank(ProcessFlags(), job | {"SLURM_NTASKS": "4", "SLURM_NODELIST": "gpu[007-009,012]"}) is None


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu[007-009,012]", "gpu007"),
        ("gpu[007,009]", "gpu007"),
        ("gpu7,gpu8", "gpu7"),
        ("gpu7", "gpu7"),
        ("rack-a[01-02],b3", "rack-a01"),
    ],
)
def test_slurm_puts_process_0_on_the_first_host(nodes, first):
    place = find_rank(ProcessFlags(), SLURM | {"SLURM_STEP_NODELIST": nodes})
    assert place.coordinator.rpartition(":")[0] == first
    assert (place.num_processes, place.process_id, place.local_devices) == (4, 2, None)


def test_jobs_and_steps_on_a_host_have_ports_of_their_own():
    ports = [port(SLURM | {"SLURM_JOB_ID": job, "SLURM_STEP_ID": step}) for job in ("4711", "4712") for step in "01"]
    assert len(set(ports)) == 4 and all(1024 < p < 65536 for p in ports)


def test_tasks_that_share_a_host_take_an_accelerator_each():
    shared = SLURM | {"SLURM_STEP_NUM_NODES": "1", "SLURM_LOCALID": "2"}
    assert find_rank(ProcessFlags(), shared).local_devices == (2,)
    assert find_rank(ProcessFlags(), shared | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}).local_devices == (2,)
    assert (
        find_rank(ProcessFlags(), shared | {"CUDA_VISIBLE_DEVICES": "3"}).local_devices is None
    )  # --gpus-per-task shows it alone


def test_kubernetes_numbers_the_processes():
    assert find_rank(ProcessFlags(), KUBERNETES) == Rank("run-workers-0-0.run:12345", 8, 5)
    assert find_rank(ProcessFlags(), KUBERNETES | {"JAX_PROCESS_ID": "3"}).process_id == 3


def test_flags_come_first():
    flags = ProcessFlags("host:1234", 2, 1)
    assert find_rank(flags, SLURM) == find_rank(flags, KUBERNETES) == Rank("host:1234", 2, 1)


@pytest.mark.parametrize(
    ("flags", "env", "says"),
    [
        (ProcessFlags("host", 2, 0), {}, "--coordinator='host' is not HOST:PORT"),
        (ProcessFlags("host:99999", 2, 0), {}, "not HOST:PORT"),
        (ProcessFlags("host:1234", 2, 2), {}, "process 2 of 2 .*host:1234"),
        (ProcessFlags("host:1234", 2, -1), {}, "process -1 of 2"),
        (ProcessFlags(), {"JAX_COORDINATOR_ADDRESS": "host:1"}, "process without a number of an unknown number"),
        (ProcessFlags(), KUBERNETES | {"JAX_NUM_PROCESSES": "eight"}, "process 5 of eight"),
    ],
)
def test_a_place_that_cannot_be_is_one_line(flags, env, says):
    with pytest.raises(UserError, match=says):
        find_rank(flags, env)


def test_some_of_the_flags_are_none():
    parser = Parser()
    add_flags(parser)
    assert flags_of(parser.parse_args([])) == ProcessFlags()
    with pytest.raises(UserError, match="give all three"):
        flags_of(parser.parse_args(["--coordinator", "host:1", "--num_processes", "2"]))
    with pytest.raises(UserError, match="write 1 or more"):
        flags_of(parser.parse_args(["--heartbeat_s", "0"]))
