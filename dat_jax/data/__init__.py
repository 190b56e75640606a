"""Data sets, transforms of examples, and batching. Independent of models."""

from dat_jax.errors import require_extra

require_extra("inference")
