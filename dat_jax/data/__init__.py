"""Sources of examples, transforms of one example, batches. Knows nothing of models."""

from dat_jax.errors import require_extra

require_extra("inference")
