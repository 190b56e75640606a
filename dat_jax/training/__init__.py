"""One loop for every task: state, step, optimizer, mesh, checkpoints, metrics."""
