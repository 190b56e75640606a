"""flax.linen modules: the DAT backbone and what is built on it."""
