"""DAT++ (2309.01430), the deformable attention transformer, in JAX and Flax."""

from dat_jax import conversion
from dat_jax.models.dat import DAT
from dat_jax.models.registry import VARIANTS, create_model, list_models

__version__ = "0.1.0"
__all__ = ["DAT", "VARIANTS", "conversion", "create_model", "list_models"]
