"""DAT++ (2309.01430), the deformable attention transformer, in JAX and Flax."""

from etils import epy

__version__ = "0.1.0"

# Each name is imported when it is first used, so that `--help` of a command does not import jax.
with epy.lazy_api_imports(globals()):
    from dat_jax import conversion, inference
    from dat_jax.checkpoints.backbone import load_backbone
    from dat_jax.checkpoints.exports import export_model
    from dat_jax.checkpoints.loading import load, load_pretrained
    from dat_jax.models.backbone import Backbone
    from dat_jax.models.catalogue import ModelDescription, describe_models
    from dat_jax.models.dat import DAT
    from dat_jax.models.rcnn import RCNN
    from dat_jax.models.registry import VARIANTS, create_detector, create_model, create_segmentor, list_models
    from dat_jax.models.retinanet import RetinaNet
    from dat_jax.models.segmentation import Segmentor

__all__ = [
    "DAT",
    "RCNN",
    "VARIANTS",
    "Backbone",
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
    "load_backbone",
    "load_pretrained",
]
