"""Transforms of one record on the host, in uint8. Every random draw comes from the generator that is passed in.

The order and the distributions are those of the published recipe: random resized crop, flip, RandAugment. What follows,
normalising, erasing and mixing, runs on the device (tasks/augmentation.py).
"""

import math
from collections.abc import Callable

import numpy as np
from PIL import Image

from dat_jax.data.images import resize_bicubic
from dat_jax.data.randaugment import apply_operation, draw_operations

_CROP_TRIES = 10


def make_eval_transform(*, resize: int, image_size: int) -> Callable[[dict], dict]:
    """Resizes to resize x resize whatever the ratio was, bicubic, and takes the central image_size x image_size.

    Pixels are Pillow's. The recipe has 256 and 224, or 384 and 384 (spec: the published evaluation).
    """
    border = round((resize - image_size) / 2)

    def transform(record: dict) -> dict:
        image = Image.fromarray(record["image"]).resize((resize, resize), Image.Resampling.BICUBIC)
        image = image.crop((border, border, border + image_size, border + image_size))
        return {**record, "image": np.asarray(image)}

    return transform


def make_train_transform(
    *,
    image_size: int,
    min_crop_area: float,
    max_crop_aspect: float,
    flip_probability: float,
    rand_augment_count: int,
    rand_augment_magnitude: float,
    rand_augment_std: float,
) -> Callable[[dict, np.random.Generator], dict]:
    """Random resized crop to image_size x image_size, horizontal flip, RandAugment.

    Args:
      image_size: side of the result.
      min_crop_area: of the image; the crop's is uniform between it and 1.
      max_crop_aspect: r for width / height between 1 / r and r, log-uniform.
      flip_probability: of mirroring left and right.
      rand_augment_count, rand_augment_magnitude, rand_augment_std: see ``draw_operations``; a count of 0 does nothing.
    """

    def transform(record: dict, rng: np.random.Generator) -> dict:
        image = record["image"]
        height, width = image.shape[:2]
        x, y, w, h = draw_crop(rng, width=width, height=height, min_area=min_crop_area, max_aspect=max_crop_aspect)
        image = resize_bicubic(image[y : y + h, x : x + w], width=image_size, height=image_size)
        if rng.uniform() < flip_probability:
            image = np.ascontiguousarray(image[:, ::-1])
        operations = draw_operations(
            rng, count=rand_augment_count, magnitude=rand_augment_magnitude, magnitude_std=rand_augment_std
        )
        for name, argument in operations:
            image = apply_operation(image, name, argument)
        return {**record, "image": image}

    return transform


def draw_crop(
    rng: np.random.Generator, *, width: int, height: int, min_area: float, max_aspect: float
) -> tuple[int, int, int, int]:
    """The place of a random resized crop in an image, (x, y, width, height) in pixels.

    Up to ten draws of an area and a ratio, the first that fits at a uniform place; otherwise the largest central crop
    with a ratio within the bounds (torchvision's RandomResizedCrop).
    """
    for _ in range(_CROP_TRIES):
        area = rng.uniform(min_area, 1) * width * height
        aspect = math.exp(rng.uniform(-1, 1) * math.log(max_aspect))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h
    w = min(width, round(height * max_aspect))
    h = min(height, round(width * max_aspect))
    return (width - w) // 2, (height - h) // 2, w, h
