"""Transforms of one record on the host, in uint8. Every random draw comes from the generator that is passed in."""

import math
from collections.abc import Callable

import numpy as np
from PIL import Image


def make_eval_transform(*, image_size: int) -> Callable[[dict], dict]:
    """Resizes the image to image_size x image_size, bilinear."""

    def transform(record: dict) -> dict:
        image = Image.fromarray(record["image"]).resize((image_size, image_size), Image.Resampling.BILINEAR)
        return {**record, "image": np.asarray(image)}

    return transform


def make_train_transform(
    *, image_size: int, max_rotation: float, max_shift: float, max_scale: float
) -> Callable[[dict, np.random.Generator], dict]:
    """Resizes to image_size x image_size under a random rotation, shift and change of size, in one bilinear resampling.

    Args:
      image_size: side of the result.
      max_rotation: degrees, either way.
      max_shift: of the side, either way, along each axis.
      max_scale: s for sizes from 1 / (1 + s) to 1 + s, log-uniform.
    """

    def transform(record: dict, rng: np.random.Generator) -> dict:
        image = Image.fromarray(record["image"])
        angle = math.radians(rng.uniform(-max_rotation, max_rotation))
        scale = math.exp(rng.uniform(-1, 1) * math.log1p(max_scale))
        shift_x, shift_y = rng.uniform(-max_shift, max_shift, size=2)
        matrix = _output_to_input(image.size, image_size, angle, scale, (shift_x, shift_y))
        size = (image_size, image_size)
        image = image.transform(size, Image.Transform.AFFINE, matrix, resample=Image.Resampling.BILINEAR)
        return {**record, "image": np.asarray(image)}

    return transform


def _output_to_input(input_size, output_side, angle, scale, shift):
    """The six numbers of PIL's affine transform: input (x, y) of an output (x, y), both in pixels from the corner."""
    zoom_x, zoom_y = (side / output_side / scale for side in input_size)
    cos, sin = math.cos(angle), math.sin(angle)
    center = output_side / 2
    # output, from its centre and less the shift -> rotated -> scaled to input pixels -> from the input's corner
    from_x, from_y = center + shift[0] * output_side, center + shift[1] * output_side
    a, b, d, e = zoom_x * cos, zoom_x * sin, -zoom_y * sin, zoom_y * cos
    c = input_size[0] / 2 - a * from_x - b * from_y
    f = input_size[1] / 2 - d * from_x - e * from_y
    return a, b, c, d, e, f
