#!/usr/bin/env bash
# Train on all hosts of a TPU pod slice:
#   REPOSITORY=ADDRESS docs/launch/tpu_pod.sh NAME ZONE CONFIG WORKDIR --config.data.directory=DATA [--config.KEY=VALUE ...]
# REPOSITORY is what `git clone` gets, and NAME the TPU VM. WORKDIR is gs://BUCKET/NAME. DATA is an absolute path that is the same on all
# hosts, such as a mounted bucket (gcsfuse) or Filestore. PYTHON is a Python of at least 3.11 on the hosts, whose images may come with an older one.
# The run ends with this command: start it where it is not interrupted, for example in tmux.
set -euo pipefail
name=$1 zone=$2 config=$3 workdir=$4
shift 4
flags=""
if (($#)); then flags=$(printf " %q" "$@"); fi

on_all_hosts() { gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$1"; }

on_all_hosts "test -d dat_jax || git clone --depth=1 ${REPOSITORY:?the address of this repository} dat_jax"
on_all_hosts "cd dat_jax && ${PYTHON:-python3} -m venv .venv && .venv/bin/pip install --quiet '.[train,tpu,gcs]'"
# Every host runs the same command. With --distributed=on, jax gets the addresses of the other hosts from the TPU.
on_all_hosts "cd dat_jax && .venv/bin/python -m dat_jax.main --distributed=on --config=$(printf %q "$config") --workdir=$(printf %q "$workdir")$flags"
