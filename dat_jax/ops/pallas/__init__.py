"""Kernels for TPUs, written in Pallas. Each is tested against its plain counterpart in ``dat_jax.ops``."""
