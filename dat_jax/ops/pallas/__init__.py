"""Kernels for TPUs, written in Pallas. Each has a plain counterpart in ``dat_jax.ops`` that it is tested against."""
