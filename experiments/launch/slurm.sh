#!/bin/bash
# One run, or with --array a sweep of them, under Slurm: one process a node, all of its accelerators.
#
#   sbatch --nodes=4 --gpus-per-node=8 experiments/launch/slurm.sh --config configs/dense.py:1b --workdir runs/1b
#   sbatch --nodes=1 --gpus-per-node=8 --array=0-5 experiments/launch/slurm.sh sweep demo --size gpu
#
# What follows the script's name are the arguments of spannorm_jax.train. After the word sweep they are those of
# spannorm_jax.sweep less its verb, and task i does run i (spannorm_jax.sweep NAMES slurm submits so). Submit from the
# checkout's root, on a file system that all nodes share. Stopped or crashed, the job goes back to the queue and goes
# on from its newest checkpoint; done, refused or diverged, it ends.
#
#SBATCH --job-name=spannorm
#SBATCH --ntasks-per-node=1
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%A_%a.log
# Two minutes before the time is up srun's tasks get SIGTERM: they save a step that all have reached.
#SBATCH --signal=TERM@120
set -u

if [[ ${1-} == sweep ]]; then
    command=(spannorm_jax.sweep "${2-}" run "${SLURM_ARRAY_TASK_ID-}" "${@:3}")
else
    command=(spannorm_jax.train --stop_code=75 "$@")
fi

# A process that ends ends the others, so that srun returns: with the highest of their exit codes.
srun .venv/bin/python -m "${command[@]}"
code=$?
case $code in
0 | 2 | 3) exit "$code" ;; # done; a mistake, or a loss that is not finite: again would be the same
esac
if ((${SLURM_RESTART_COUNT:-0} >= 20)); then
    echo "ended with code $code for the 21st time: not again" >&2
    exit "$code"
fi
echo "ended with code $code: back to the queue" >&2
scontrol requeue "$SLURM_JOB_ID" # of an array, the id of this task's own job
