#!/usr/bin/env bash
#SBATCH --job-name=dat_jax
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1      # one process per node, with all of its GPUs
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue                # a preempted job is queued again and resumes from its checkpoint
#SBATCH --signal=TERM@120        # two minutes before the time limit: the run saves and exits
#SBATCH --open-mode=append
# Usage, from the root of a checkout with an environment in .venv: sbatch docs/launch/slurm.sh CONFIG WORKDIR [--config.KEY=VALUE ...]
# The checkout and the data must be on a file system that is visible to all nodes. WORKDIR is a directory there, or gs://BUCKET/RUN if the
# nodes have access to it. jax reads the nodes from SLURM's variables.
set -euo pipefail
if (($# < 2)) || [[ $1 == -* || $2 == -* ]]; then
  echo "Expected CONFIG WORKDIR [--config.KEY=VALUE ...], such as configs/dat_pp_s.py /shared/runs/dat_pp_s" >&2
  exit 2
fi
# In a SLURM task, jax uses only one GPU unless it is told which ones.
export JAX_LOCAL_DEVICE_IDS
JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((${SLURM_GPUS_ON_NODE:?start this script with sbatch} - 1)))
srun --kill-on-bad-exit=1 .venv/bin/python -m dat_jax.main --config="$1" --workdir="$2" "${@:3}"
