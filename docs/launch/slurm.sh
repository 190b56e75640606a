#!/usr/bin/env bash
#SBATCH --job-name=dat_jax
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1      # one process a node, with all of its GPUs
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue                # a job that was preempted comes back, and goes on from its checkpoint
#SBATCH --signal=TERM@120        # two minutes before the end: the run saves and ends
#SBATCH --open-mode=append
# sbatch docs/launch/slurm.sh CONFIG WORKDIR, from the root of a checkout with an environment in .venv.
# WORKDIR: on a file system that all nodes see. jax finds the nodes from SLURM's variables.
set -euo pipefail
srun --kill-on-bad-exit=1 .venv/bin/python -m dat_jax.main --config="$1" --workdir="$2"
