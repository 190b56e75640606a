"""3-Augment and color jitter, the simpler augmentation of DeiT III (2204.07118), on uint8 images of RGB."""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

_SOLARIZE_THRESHOLD = 128
_BLUR_RADIUS = (0.1, 2.0)  # standard deviation in pixels
_JITTERED = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


def apply_three_augment(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Apply one of three operations, each with probability 1/3: grayscale, solarization or Gaussian blur.

    Solarization inverts values of at least 128. The standard deviation of the blur is uniform from 0.1 to 2 pixels. Pixels equal
    Pillow's. Source: 2204.07118, section 3.2, and its published code.

    Args:
      image: uint8 (H, W, 3).
      rng: source of the draws.

    Returns:
      uint8 (H, W, 3).
    """
    operation = _OPERATIONS[rng.integers(len(_OPERATIONS))]
    return np.asarray(operation(Image.fromarray(image), rng))


def apply_color_jitter(image: np.ndarray, rng: np.random.Generator, *, strength: float) -> np.ndarray:
    """Multiply brightness, contrast and saturation, in a random order, by factors from 1 - strength to 1 + strength.

    Pixels equal those of torchvision's ColorJitter(strength, strength, strength) for Pillow images.

    Args:
      image: uint8 (H, W, 3).
      rng: source of the draws.
      strength: 0 leaves the image unchanged; 2204.07118 uses 0.3. Factors are at least 0.

    Returns:
      uint8 (H, W, 3).
    """
    if strength == 0:
        return image
    jittered = Image.fromarray(image)
    for index in rng.permutation(len(_JITTERED)):
        factor = rng.uniform(max(0.0, 1 - strength), 1 + strength)
        jittered = _JITTERED[index](jittered).enhance(factor)
    return np.asarray(jittered)


def _to_grayscale(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    return image.convert("L").convert("RGB")


def _solarize(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    return ImageOps.solarize(image, _SOLARIZE_THRESHOLD)


def _blur(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(rng.uniform(*_BLUR_RADIUS)))


_OPERATIONS: tuple[Callable[[Image.Image, np.random.Generator], Image.Image], ...] = (_to_grayscale, _solarize, _blur)
