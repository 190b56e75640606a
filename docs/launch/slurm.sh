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
# WORKDIR and the data must be on a file system that is visible to all nodes. jax reads the nodes from SLURM's variables.
set -euo pipefail
srun --kill-on-bad-exit=1 .venv/bin/python -m dat_jax.main --config="$1" --workdir="$2" "${@:3}"
