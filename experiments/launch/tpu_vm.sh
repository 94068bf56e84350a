#!/bin/bash
# One run on all hosts of a Cloud TPU slice, started again until it is done.
#
#   experiments/launch/tpu_vm.sh NAME ZONE --config configs/dense.py:1b --workdir /mnt/runs/1b
#
# NAME is an existing TPU VM slice (gcloud compute tpus tpu-vm create). Every host needs this checkout in ~/spannorm_jax
# with its environment (make env, then .venv/bin/pip install -e '.[tpu]'), and the folder of --workdir mounted at the
# same path: the processes share it. They find one another by themselves. Ctrl-C here ends the loop, not the run: that
# is pkill -TERM -f spannorm_jax.train on any one host, after which all of them save the same step.
set -u

if (($# < 3)); then
    echo "error: give NAME ZONE and the arguments of spannorm_jax.train" >&2
    exit 2
fi
name=$1 zone=$2
shift 2
command="cd ~/spannorm_jax && exec .venv/bin/python -m spannorm_jax.train$(printf ' %q' --config.platform=tpu "$@")"

for attempt in {1..20}; do
    gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$command"
    code=$?
    case $code in
    0 | 2 | 3) exit "$code" ;; # done or stopped; a mistake; a loss that is not finite
    esac
    echo "attempt $attempt ended with code $code; what is left of it is stopped, and it goes on" >&2
    gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="pkill -KILL -f spannorm_jax.train"
done
exit 1
