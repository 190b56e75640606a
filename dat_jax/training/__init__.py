"""One loop for every task: state, step, optimizer, mesh, checkpoints, metrics."""

from dat_jax.errors import require_extra

require_extra("train")
