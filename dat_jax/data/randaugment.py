"""RandAugment of the published recipe, timm's ``rand-m9-mstd0.5-inc1``, on uint8 images.

``draw_operations`` draws the operations and their arguments; ``apply_operation`` applies one of them.
"""

import math
from collections.abc import Callable

import cv2
import numpy as np
from PIL import Image, ImageEnhance, ImageOps

FILL = (124, 116, 104)  # the ImageNet mean, outside the image in geometric operations
APPLY_PROBABILITY = 0.5  # of each drawn operation
MAX_MAGNITUDE = 10.0


def draw_operations(
    rng: np.random.Generator, *, count: int, magnitude: float, magnitude_std: float
) -> list[tuple[str, float]]:
    """Draw ``count`` operations with replacement, each of which is applied with probability 1/2.

    Args:
      rng: source of all draws.
      count: number of operations; the recipe uses 2.
      magnitude, magnitude_std: mean and standard deviation of the magnitude of each operation, which is clipped to [0, 10].

    Returns:
      (name, argument) of the operations to apply, in order. Depending on the operation, the argument is an angle in degrees, a
      number of bits, a threshold, a factor, a slope, or a fraction of the side; it is 0 for operations without an argument.
    """
    names = rng.integers(len(_OPERATIONS), size=count)
    applied = rng.uniform(size=count) < APPLY_PROBABILITY
    magnitudes = np.clip(rng.normal(magnitude, magnitude_std, size=count), 0, MAX_MAGNITUDE)
    signs = rng.choice([-1.0, 1.0], size=count)
    draws = []
    for index in np.flatnonzero(applied):
        name = OPERATIONS[names[index]]
        to_argument, _ = _OPERATIONS[name]
        draws.append((name, to_argument(float(magnitudes[index]), float(signs[index]))))
    return draws


def apply_operation(image: np.ndarray, name: str, argument: float) -> np.ndarray:
    """Apply one operation to an image.

    Pixels equal Pillow's, except in geometric operations. Those are resampled by OpenCV in a quarter of the time; its cubic
    coefficient is -0.75 instead of Pillow's -0.5, and it blends with the fill color across the border.

    Args:
      image: uint8 (H, W, 3).
      name: one of ``OPERATIONS``.
      argument: see ``draw_operations``.

    Returns:
      uint8 (H, W, 3).
    """
    _, operation = _OPERATIONS[name]
    return operation(image, argument)


def _affine(image: np.ndarray, matrix: tuple[float, ...]) -> np.ndarray:
    """Transform an image as Pillow does: the output at (x, y) is the input at (a x + b y + c, d x + e y + f).

    Coordinates are measured from the top left corner of the first pixel.
    """
    a, b, c, d, e, f = matrix
    # OpenCV measures from the center of the first pixel.
    from_centers = np.array([[a, b, c + (a + b - 1) / 2], [d, e, f + (d + e - 1) / 2]])
    return cv2.warpAffine(
        image,
        from_centers,
        image.shape[1::-1],
        flags=cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=FILL,
    )


def _rotate(image: np.ndarray, degrees: float) -> np.ndarray:
    """Rotate counterclockwise about the center."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = image.shape[1] / 2, image.shape[0] / 2
    return _affine(image, (cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y))


def _pillow(operation: Callable) -> Callable[[np.ndarray, float], np.ndarray]:
    return lambda image, argument: np.asarray(operation(Image.fromarray(image), argument))


def _solarize_add(image: Image.Image, added: float) -> Image.Image:
    return image.point([min(255, value + int(added)) if value < 128 else value for value in range(256)] * 3)


def _posterize(image: Image.Image, bits: float) -> Image.Image:
    mask = 256 - 2 ** (8 - int(bits))  # 0 bits give a black image; ImageOps.posterize rejects 0
    return image.point([value & mask for value in range(256)] * 3)


def _no_argument(magnitude, sign):
    return 0.0


def _factor(magnitude, sign):
    return max(0.1, 1 + sign * 0.09 * magnitude)


def _signed(slope):
    return lambda magnitude, sign: sign * slope * magnitude


# Name -> (function of a magnitude in [0, 10] and a sign that returns the argument, function of an image and the argument).
_OPERATIONS: dict[str, tuple[Callable[[float, float], float], Callable[[np.ndarray, float], np.ndarray]]] = {
    "AutoContrast": (_no_argument, _pillow(lambda image, _: ImageOps.autocontrast(image))),
    "Equalize": (_no_argument, _pillow(lambda image, _: ImageOps.equalize(image))),
    "Invert": (_no_argument, _pillow(lambda image, _: ImageOps.invert(image))),
    "Rotate": (_signed(3.0), _rotate),
    "Posterize": (lambda magnitude, sign: 4 - int(0.4 * magnitude), _pillow(_posterize)),
    "Solarize": (lambda magnitude, sign: 256 - min(256, int(25.6 * magnitude)), _pillow(ImageOps.solarize)),
    "SolarizeAdd": (lambda magnitude, sign: min(128, int(11 * magnitude)), _pillow(_solarize_add)),
    "Color": (_factor, _pillow(lambda image, factor: ImageEnhance.Color(image).enhance(factor))),
    "Contrast": (_factor, _pillow(lambda image, factor: ImageEnhance.Contrast(image).enhance(factor))),
    "Brightness": (_factor, _pillow(lambda image, factor: ImageEnhance.Brightness(image).enhance(factor))),
    "Sharpness": (_factor, _pillow(lambda image, factor: ImageEnhance.Sharpness(image).enhance(factor))),
    "ShearX": (_signed(0.03), lambda image, slope: _affine(image, (1, slope, 0, 0, 1, 0))),
    "ShearY": (_signed(0.03), lambda image, slope: _affine(image, (1, 0, 0, slope, 1, 0))),
    "TranslateX": (_signed(0.045), lambda image, part: _affine(image, (1, 0, part * image.shape[1], 0, 1, 0))),
    "TranslateY": (_signed(0.045), lambda image, part: _affine(image, (1, 0, 0, 0, 1, part * image.shape[0]))),
}
OPERATIONS = tuple(_OPERATIONS)
