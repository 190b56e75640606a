"""Configurations of runs: declared keys with defaults and explanations, checks, and the packaged files of configs/."""

from dat_jax.config.classification import get_classification_config
from dat_jax.config.detection import get_detection_config
from dat_jax.config.files import choose, list_configs, load_config
from dat_jax.config.segmentation import get_segmentation_config
from dat_jax.config.validation import TASKS, get_keys, validate

__all__ = [
    "TASKS",
    "choose",
    "get_classification_config",
    "get_detection_config",
    "get_keys",
    "get_segmentation_config",
    "list_configs",
    "load_config",
    "validate",
]
