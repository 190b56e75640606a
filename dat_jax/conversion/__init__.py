"""Published PyTorch configurations and weights to ours, and weights back. As a command: ``__main__``."""

from typing import TYPE_CHECKING

from dat_jax import lazy

if TYPE_CHECKING:  # what _PLACES says, for type checkers
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

# Public name -> the module that has it, imported when the name is first asked for.
_PLACES = {
    "detector_from_official": "dat_jax.conversion.detectors",
    "detector_settings_from_official": "dat_jax.conversion.detectors",
    "detector_to_official": "dat_jax.conversion.detectors",
    "detector_variables": "dat_jax.conversion.detectors",
    "from_official": "dat_jax.conversion.official",
    "model_from_official": "dat_jax.conversion.official",
    "params_from_official": "dat_jax.conversion.official",
    "read_checkpoint": "dat_jax.conversion.files",
    "read_python_config": "dat_jax.conversion.python_config",
    "read_weights": "dat_jax.conversion.files",
    "segmentor_from_official": "dat_jax.conversion.segmentors",
    "segmentor_options_from_official": "dat_jax.conversion.segmentors",
    "segmentor_to_official": "dat_jax.conversion.segmentors",
    "segmentor_variables": "dat_jax.conversion.segmentors",
    "to_official": "dat_jax.conversion.official",
    "write_safetensors": "dat_jax.conversion.files",
}
__getattr__, __dir__ = lazy.attach(__name__, _PLACES)
