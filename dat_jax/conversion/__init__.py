"""Published PyTorch configurations and weights to ours, and weights back."""

from dat_jax.conversion.official import from_official, model_from_official, to_official

__all__ = ["from_official", "model_from_official", "to_official"]
