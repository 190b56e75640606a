"""Studies that import dat_jax and are imported by nothing."""
