"""Facts about the variants: counted sizes and published accuracies."""

import dataclasses

import numpy as np

from dat_jax.models.registry import create_model, list_models


@dataclasses.dataclass(frozen=True)
class ModelDescription:
    """A variant with 1,000 classes.

    Attributes:
      name: name for ``create_model``.
      image_size: side of its images in pixels.
      parameters: number of parameters; None if not counted.
      multiply_adds: number of multiply-adds per image of that size, counted by ``experiments/multiply_adds``; None if not
        counted.
      top1: published top-1 accuracy on ImageNet-1k at that size in percent; None if unknown.
    """

    name: str
    image_size: int
    parameters: int | None
    multiply_adds: int | None
    top1: float | None


# Parameters, multiply-adds, top-1 accuracy as published in DAT++ (2309.01430) and DAT v1 (CVPR 2022).
_KNOWN = {
    "dat_pp_tiny": (23_962_876, 4_258_983_616, 83.9),
    "dat_pp_small": (53_127_366, 9_382_477_344, 84.6),
    "dat_pp_base": (93_690_640, 16_501_972_352, 84.9),
    "dat_pp_base_384": (93_690_640, 49_502_205_952, 85.9),
    "dat_p_tiny": (22_772_796, 4_024_611_520, None),
    "dat_tiny": (28_319_138, 4_563_459_840, 82.0),
    "dat_small": (49_700_402, 8_958_726_912, 83.7),
    "dat_base": (87_881_632, 15_721_415_680, 84.0),
    "dat_base_384": (88_178_272, 49_449_656_320, 84.8),
    "dat_pp_nano": (1_311_696, 15_589_248, None),
}
_IMAGE_SIZES = {"dat_pp_base_384": 384}  # variants whose images are not of the size that position tables are made for


def describe_models(filter: str = "*") -> list[ModelDescription]:
    """Descriptions of the models whose names match a pattern, see ``list_models``.

    ``python -m dat_jax --list_models`` prints them.
    """
    return [_describe(name) for name in list_models(filter)]


def _describe(name):
    parameters, multiply_adds, top1 = _KNOWN.get(name, (None, None, None))
    size = _IMAGE_SIZES.get(name) or int(np.max(create_model(name).image_size))
    return ModelDescription(name, size, parameters, multiply_adds, top1)
