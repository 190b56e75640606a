"""Conversion between published PyTorch configurations and weights and the models and variables of this package.

``python -m dat_jax.conversion`` is the command. "official" in names stands for the published code of LeapLabTHU (DAT,
DAT-Detection and DAT-Segmentation); a state dict is a mapping from its parameter names to arrays in PyTorch's layouts.
"""

from etils import epy

with epy.lazy_api_imports(globals()):
    from dat_jax.conversion.detectors import (
        detector_from_official,
        detector_settings_from_official,
        detector_to_official,
        detector_variables,
    )
    from dat_jax.conversion.files import read_checkpoint, read_weights, write_safetensors
    from dat_jax.conversion.official import from_official, model_from_official, params_from_official, to_official
    from dat_jax.conversion.python_config import read_python_config
    from dat_jax.conversion.segmentors import (
        segmentor_from_official,
        segmentor_options_from_official,
        segmentor_to_official,
        segmentor_variables,
    )

__all__ = [
    "detector_from_official",
    "detector_settings_from_official",
    "detector_to_official",
    "detector_variables",
    "from_official",
    "model_from_official",
    "params_from_official",
    "read_checkpoint",
    "read_python_config",
    "read_weights",
    "segmentor_from_official",
    "segmentor_options_from_official",
    "segmentor_to_official",
    "segmentor_variables",
    "to_official",
    "write_safetensors",
]
