"""Configurations of runs: their keys and the checks on them."""

from dat_jax.config.validation import make_schema, validate

__all__ = ["make_schema", "validate"]
