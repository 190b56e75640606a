"""Kernels for GPUs, written in Pallas and compiled by Triton. Each is tested against its plain counterpart in ``dat_jax.ops``."""
