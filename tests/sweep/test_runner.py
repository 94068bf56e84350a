"""How the runner divides a machine, and what does not go with it."""

import pytest

from spannorm_jax.errors import UserError
from spannorm_jax.sweep.expansion import expand
from spannorm_jax.sweep.runner import Share, check_fits, divide, gpus_here
from spannorm_jax.sweep.slurm import ranges


def test_each_job_has_cores_of_its_own():
    assert divide(None, [0, 1, 2], []) == [Share((0, 1, 2), {})]
    assert divide(2, [4, 5, 6, 7, 9], []) == [Share((4, 5), {}), Share((6, 7, 9), {})]
    with pytest.raises(UserError, match="--jobs 3 is more than the 2 cores"):
        divide(3, [0, 1], [])


def test_gpus_are_shared_out_and_their_memory_is_if_jobs_share_one():
    def env(jobs, gpus):
        return [share.env for share in divide(jobs, range(16), gpus)]

    assert env(None, ["0", "1"]) == [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]
    assert env(2, list("abcd")) == [{"CUDA_VISIBLE_DEVICES": "a,b"}, {"CUDA_VISIBLE_DEVICES": "c,d"}]
    shared = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.450"}
    assert env(4, ["0", "1"]) == [{"CUDA_VISIBLE_DEVICES": gpu} | shared for gpu in ("0", "1", "0", "1")]
    for jobs, gpus in ((3, 2), (3, 4)):
        with pytest.raises(UserError, match=f"--jobs {jobs} does not go with {gpus} GPUs"):
            env(jobs, [str(i) for i in range(gpus)])


def test_gpus_are_those_that_a_process_would_see():
    assert gpus_here("auto", {"CUDA_VISIBLE_DEVICES": "2,GPU-5"}) == ["2", "GPU-5"]
    assert gpus_here("gpu", {"CUDA_VISIBLE_DEVICES": ""}) == []
    assert gpus_here("cpu", {"CUDA_VISIBLE_DEVICES": "2"}) == []
    assert gpus_here("auto", {"CUDA_VISIBLE_DEVICES": "2", "JAX_PLATFORMS": "cpu"}) == []


def test_a_run_that_the_devices_of_a_job_do_not_divide_is_named(tiny):
    runs = [(run,) for run in expand("lr", "cpu", tiny).runs]
    check_fits(runs, 8, "cpu")
    with pytest.raises(UserError, match=r"run 0 .* training.batch_size / num_microbatches=8 is not divisible"):
        check_fits(runs, 16, "cpu")
    with pytest.raises(UserError, match=r"run 0 .* mesh.tensor=2"):
        check_fits([expand("lr", "cpu", tiny, [("mesh.tensor", "2")]).runs[:1]], 2, "cpu")


def test_an_array_is_written_as_slurm_writes_it():
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"
    assert ranges([3]) == "3"
