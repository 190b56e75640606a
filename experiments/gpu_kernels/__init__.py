"""The kernels for GPUs, compiled for an H100 that is not attached."""
