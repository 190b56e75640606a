"""Figures: learning curves, predictions, sampled points and attention."""

from dat_jax.errors import require_extra

require_extra("inference")
