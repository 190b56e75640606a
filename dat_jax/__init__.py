"""DAT++ (2309.01430), the deformable attention transformer, in JAX and Flax."""

from typing import TYPE_CHECKING

from dat_jax import lazy

if TYPE_CHECKING:  # what _PLACES says, for type checkers
    from dat_jax import conversion, inference
    from dat_jax.models.catalogue import ModelDescription, describe_models
    from dat_jax.models.dat import DAT
    from dat_jax.models.rcnn import RCNN
    from dat_jax.models.registry import VARIANTS, create_detector, create_model, create_segmentor, list_models
    from dat_jax.models.retinanet import RetinaNet
    from dat_jax.models.segmentation import Segmentor
    from dat_jax.training.pretrained import export_model, load, load_pretrained

__version__ = "0.1.0"
__all__ = [
    "DAT",
    "RCNN",
    "VARIANTS",
    "ModelDescription",
    "RetinaNet",
    "Segmentor",
    "conversion",
    "create_detector",
    "create_model",
    "create_segmentor",
    "describe_models",
    "export_model",
    "inference",
    "list_models",
    "load",
    "load_pretrained",
]

# Public name -> the module that has it, imported when the name is first asked for: --help of a tool takes no jax.
_PLACES = {
    "DAT": "dat_jax.models.dat",
    "ModelDescription": "dat_jax.models.catalogue",
    "RCNN": "dat_jax.models.rcnn",
    "RetinaNet": "dat_jax.models.retinanet",
    "Segmentor": "dat_jax.models.segmentation",
    "VARIANTS": "dat_jax.models.registry",
    "conversion": "dat_jax.conversion",
    "create_detector": "dat_jax.models.registry",
    "create_model": "dat_jax.models.registry",
    "create_segmentor": "dat_jax.models.registry",
    "describe_models": "dat_jax.models.catalogue",
    "export_model": "dat_jax.training.pretrained",
    "inference": "dat_jax.inference",
    "list_models": "dat_jax.models.registry",
    "load": "dat_jax.training.pretrained",
    "load_pretrained": "dat_jax.training.pretrained",
}
__getattr__, __dir__ = lazy.attach(__name__, _PLACES)
