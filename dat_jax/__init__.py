"""DAT++ (2309.01430), the deformable attention transformer, in JAX and Flax."""

from dat_jax import conversion
from dat_jax.models.dat import DAT
from dat_jax.models.rcnn import RCNN
from dat_jax.models.registry import VARIANTS, create_detector, create_model, create_segmentor, list_models
from dat_jax.models.retinanet import RetinaNet
from dat_jax.models.segmentation import Segmentor

__version__ = "0.1.0"
__all__ = [
    "DAT",
    "RCNN",
    "VARIANTS",
    "RetinaNet",
    "Segmentor",
    "conversion",
    "create_detector",
    "create_model",
    "create_segmentor",
    "list_models",
    "load_pretrained",
]


def load_pretrained(path, **overrides):
    """(model, variables) of an export or a run's work directory: see ``training.pretrained.load_pretrained``."""
    from dat_jax.training import pretrained  # late: it reads checkpoints, which takes a while to import

    return pretrained.load_pretrained(path, **overrides)
