"""Transforms of one classification example on the host, in the dtype of the images.

Operations, their order and their distributions are those of the published recipe: random resized crop, flip, RandAugment. All
random draws come from the generator that is passed in. Normalization, random erasing and mixing run on the device
(tasks/classification/augmentation.py).
"""

import math
from collections.abc import Callable

import cv2
import numpy as np
from PIL import Image

from dat_jax.data.images import resize_as_pillow, resize_bicubic
from dat_jax.data.randaugment import apply_operation, draw_operations
from dat_jax.data.three_augment import apply_color_jitter, apply_three_augment

_CROP_TRIES = 10


def make_eval_transform(*, resize: int, image_size: int) -> Callable[[dict], dict]:
    """Make a transform that resizes an image to a square, ignoring its aspect ratio, and takes the central crop.

    Pixels equal those of Pillow's bicubic filter, channel by channel. The recipe uses (resize, image_size) = (256, 224) or
    (384, 384) (spec: the published evaluation).

    Args:
      resize: side of the square before the crop, in pixels.
      image_size: side of the crop.

    Returns:
      A function of a record with "image", uint8, uint16 or float32 (H, W, C), that replaces it by (image_size, image_size, C)
      of the same dtype.
    """
    border = round((resize - image_size) / 2)

    def transform(record: dict) -> dict:
        image = record["image"]
        if image.dtype != np.uint8 or image.shape[2] != 3:
            resized = resize_as_pillow(image, width=resize, height=resize)
            return {**record, "image": resized[border:, border:][:image_size, :image_size]}
        image = Image.fromarray(image).resize((resize, resize), Image.Resampling.BICUBIC)
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
    three_augment: bool = False,
    color_jitter: float = 0.0,
) -> Callable[[dict, np.random.Generator], dict]:
    """Make a transform that applies a random resized crop, a random horizontal flip, and RandAugment or 3-Augment.

    Args:
      image_size: side of the result in pixels.
      min_crop_area: smallest area of the crop, as a fraction of the image; the fraction is uniform between it and 1.
      max_crop_aspect: largest aspect ratio r; width / height is log-uniform between 1 / r and r.
      flip_probability: probability of a horizontal flip.
      rand_augment_count, rand_augment_magnitude, rand_augment_std: see ``draw_operations``; a count of 0 disables RandAugment,
        which is for RGB images with 8 bits.
      three_augment: whether to apply ``apply_three_augment``, which is for RGB images with 8 bits, too.
      color_jitter: strength of ``apply_color_jitter``, the last operation, for the same images; 0 disables it.

    Returns:
      A function of a record with "image", uint8, uint16 or float32 (H, W, C), and a generator, that replaces the image by
      (image_size, image_size, C) of the same dtype.
    """

    def transform(record: dict, rng: np.random.Generator) -> dict:
        image = record["image"]
        height, width = image.shape[:2]
        x, y, w, h = draw_crop(rng, width=width, height=height, min_area=min_crop_area, max_aspect=max_crop_aspect)
        image = resize_bicubic(image[y : y + h, x : x + w], width=image_size, height=image_size)
        if rng.uniform() < flip_probability:
            # Left and right; a copy by numpy takes 20 times as long. OpenCV drops the axis of a single channel.
            image = cv2.flip(image, 1).reshape(image.shape)
        operations = draw_operations(
            rng, count=rand_augment_count, magnitude=rand_augment_magnitude, magnitude_std=rand_augment_std
        )
        for name, argument in operations:
            image = apply_operation(image, name, argument)
        if three_augment:
            image = apply_three_augment(image, rng)
        image = apply_color_jitter(image, rng, strength=color_jitter)
        return {**record, "image": image}

    return transform


def draw_crop(
    rng: np.random.Generator, *, width: int, height: int, min_area: float, max_aspect: float
) -> tuple[int, int, int, int]:
    """Draw the position and size of a random resized crop (torchvision's RandomResizedCrop).

    Up to ten times, an area and an aspect ratio are drawn; the first crop that fits is placed uniformly. If none fits, the
    result is the largest central crop whose aspect ratio is within the bounds.

    Args:
      rng: source of all draws.
      width, height: size of the image in pixels.
      min_area, max_aspect: see ``make_train_transform``.

    Returns:
      (x, y, width, height) in pixels.
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
