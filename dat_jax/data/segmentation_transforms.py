"""Transforms of an image with its label map on the host, in uint8. Every random draw comes from the generator passed in.

The order and the distributions are those of the published recipe (spec/dense_prediction.md, section 2), which are those of
MMSegmentation 0.29: resize, crop, flip, photometric distortion. Normalising follows on the device. What is drawn and what is
done with it stand apart, so that the draws can be looked at.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import cv2
import numpy as np

cv2.setNumThreads(0)  # the pipeline is parallel over images
IGNORED = 255  # in a label map: belongs to no class, counts in no loss and no metric
_CROP_TRIES = 10
_BRIGHTNESS = 32.0
_FACTORS = (0.5, 1.5)  # of contrast and of saturation
_HUES = 18  # of OpenCV's 180


def fit_size(height: int, width: int, *, scale: tuple[int, int]) -> tuple[int, int]:
    """Height and width in pixels of an image made as large as fits into a scale, ratio kept.

    Args:
      height, width: of the image.
      scale: bounds of the long and of the short side, in either order.

    Returns:
      (height, width): sides times one factor, rounded half up as mmcv's ``rescale_size`` does; at least 1, where mmcv has 0
      for a line of pixels.
    """
    factor = min(max(scale) / max(height, width), min(scale) / min(height, width))
    return max(int(height * factor + 0.5), 1), max(int(width * factor + 0.5), 1)


def resize_image(image: np.ndarray, *, height: int, width: int) -> np.ndarray:
    """Bilinear without antialiasing, OpenCV's; uint8 (H, W, 3) -> uint8 (height, width, 3)."""
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)


def resize_label(label: np.ndarray, *, height: int, width: int) -> np.ndarray:
    """Nearest, OpenCV's: pixel i comes from floor(i * scale); uint8 (H, W) -> uint8 (height, width)."""
    return cv2.resize(label, (width, height), interpolation=cv2.INTER_NEAREST)


def make_segmentation_train_transform(
    *,
    scale: tuple[int, int] = (2048, 512),
    min_ratio: float = 0.5,
    max_ratio: float = 2.0,
    crop_size: int = 512,
    max_class_ratio: float = 0.75,
    flip_probability: float = 0.5,
    distort: bool = True,
) -> Callable[[dict, np.random.Generator], dict]:
    """Random resize, crop of at most crop_size x crop_size, horizontal flip, photometric distortion, padding.

    Args:
      scale: see ``fit_size``; times a ratio that is uniform between ``min_ratio`` and ``max_ratio``.
      min_ratio, max_ratio: see ``scale``.
      crop_size: S, side of the result.
      max_class_ratio: see ``draw_crop``.
      flip_probability: of mirroring left and right.
      distort: whether to distort colours, see ``draw_distortion``.

    Returns:
      A function of {"image": uint8 (H, W, 3), "label": uint8 (H, W)} and a generator, that gives {"image": uint8 (S, S, 3),
      "label": uint8 (S, S), "valid": int32 (2,)}, and "damaged" if the record has it. "valid" is the height and the width of
      the part that is image, at the top left; the rest is padding: image 0, to be 0 again after normalising, label 255.
    """

    def transform(record: dict, rng: np.random.Generator) -> dict:
        image, label = record["image"], record["label"]
        drawn = draw_scale(rng, scale=scale, min_ratio=min_ratio, max_ratio=max_ratio)
        height, width = fit_size(*label.shape, scale=drawn)
        label = resize_label(label, height=height, width=width)
        y, x = draw_crop(label, rng, crop_size=crop_size, max_class_ratio=max_class_ratio)
        cut = np.s_[y : y + crop_size, x : x + crop_size]
        image, label = resize_image(image, height=height, width=width)[cut], label[cut]
        if rng.uniform() < flip_probability:
            image, label = cv2.flip(image, 1), cv2.flip(label, 1)
        if distort:
            image = distort_photometrically(image, rng)
        padded = {
            "image": pad(image, height=crop_size, width=crop_size, value=0),
            "label": pad(label, height=crop_size, width=crop_size, value=IGNORED),
            "valid": np.array(label.shape, np.int32),
        }
        return padded | {key: record[key] for key in ("damaged",) if key in record}

    return transform


def draw_scale(
    rng: np.random.Generator, *, scale: tuple[int, int], min_ratio: float, max_ratio: float
) -> tuple[int, int]:
    """Both bounds of a scale times one ratio, uniform between the two, cut to whole pixels."""
    ratio = rng.uniform(min_ratio, max_ratio)
    return int(scale[0] * ratio), int(scale[1] * ratio)


def draw_crop(
    label: np.ndarray, rng: np.random.Generator, *, crop_size: int, max_class_ratio: float
) -> tuple[int, int]:
    """The top left corner (y, x) of a crop, uniform over the places where it fits; 0 along a side that is too short.

    Drawn anew while fewer than two classes are in it or one has at least ``max_class_ratio`` of its pixels, both without the
    ignored ones; up to ten times, and the tenth is taken whatever is in it (MMSegmentation's RandomCrop).

    Args:
      label: uint8 (H, W).
      rng: draws two integers a try, y first.
      crop_size: side in pixels.
      max_class_ratio: 1 takes the first draw.
    """
    margins = [max(side - crop_size, 0) for side in label.shape]
    for _ in range(_CROP_TRIES):
        y, x = (int(rng.integers(margin + 1)) for margin in margins)
        if max_class_ratio >= 1 or is_varied(label[y : y + crop_size, x : x + crop_size], max_class_ratio):
            return y, x
    y, x = (int(rng.integers(margin + 1)) for margin in margins)
    return y, x


def is_varied(label: np.ndarray, max_class_ratio: float) -> bool:
    """Whether a label map, uint8 (H, W), has two classes or more, none with ``max_class_ratio`` of the pixels that count."""
    counts = np.bincount(label.ravel(), minlength=256)[:IGNORED]
    return np.count_nonzero(counts) > 1 and bool(counts.max() / counts.sum() < max_class_ratio)


def pad(array: np.ndarray, *, height: int, width: int, value: int) -> np.ndarray:
    """Fills up at the bottom and at the right with ``value``; (H, W, ...) -> (height, width, ...), a copy."""
    padded = np.full((height, width, *array.shape[2:]), value, array.dtype)
    padded[: array.shape[0], : array.shape[1]] = array
    return padded


class Distortion(NamedTuple):
    """What to do to the colours of an image; None leaves a step out.

    Attributes:
      brightness: added to every value.
      contrast: a factor of every value.
      saturation: a factor of the saturation.
      hue: added to the hue, in half degrees.
      contrast_first: contrast before saturation and hue, or after them.
    """

    brightness: float | None
    contrast: float | None
    saturation: float | None
    hue: int | None
    contrast_first: bool


def draw_distortion(rng: np.random.Generator) -> Distortion:
    """Every step with a probability of 1/2, contrast first or last by a coin (MMSegmentation's PhotoMetricDistortion).

    Brightness is uniform within +-32, contrast and saturation between 0.5 and 1.5, the hue an integer in -18..17.
    """

    def maybe(value):
        return value if rng.random() < 0.5 else None

    return Distortion(
        brightness=maybe(rng.uniform(-_BRIGHTNESS, _BRIGHTNESS)),
        contrast=maybe(rng.uniform(*_FACTORS)),
        saturation=maybe(rng.uniform(*_FACTORS)),
        hue=maybe(int(rng.integers(-_HUES, _HUES))),
        contrast_first=bool(rng.random() < 0.5),
    )


def distort_photometrically(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One draw of ``draw_distortion``, applied; uint8 (H, W, 3) RGB -> the same, a copy or the image itself."""
    return apply_distortion(image, draw_distortion(rng))


def apply_distortion(image: np.ndarray, distortion: Distortion) -> np.ndarray:
    """Brightness, contrast if first, saturation, hue, contrast if last; uint8 (H, W, 3) RGB -> the same.

    Values are clipped to 0..255 and truncated to uint8 after every step. Saturation and hue each go to OpenCV's uint8 HSV,
    hue in 0..179, and back.
    """
    first, last = (distortion.contrast, None) if distortion.contrast_first else (None, distortion.contrast)
    table = _scale_and_shift(shift=distortion.brightness)
    table = _scale_and_shift(factor=first)[table]
    if distortion.brightness is not None or first is not None:
        image = cv2.LUT(image, table)
    if distortion.saturation is not None:
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        hsv[..., 1] = cv2.LUT(hsv[..., 1], _scale_and_shift(factor=distortion.saturation))
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    if distortion.hue is not None:
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        hsv[..., 0] = cv2.LUT(hsv[..., 0], ((np.arange(256) + distortion.hue) % 180).astype(np.uint8))
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    return image if last is None else cv2.LUT(image, _scale_and_shift(factor=last))


def _scale_and_shift(*, factor: float | None = None, shift: float | None = None) -> np.ndarray:
    """What becomes of each value, uint8 (256,): a table gives the same as arithmetic in float32, several times as fast."""
    values = np.arange(256, dtype=np.float32)
    values = values * np.float32(1 if factor is None else factor) + np.float32(0 if shift is None else shift)
    return np.clip(values, 0, 255).astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class SegmentationEvalTransform:
    """See ``make_segmentation_eval_transform``."""

    scale: tuple[int, int]
    ratios: tuple[float, ...]

    def view_shapes(self, height: int, width: int) -> tuple[tuple[int, int], ...]:
        """(height, width) in pixels of every view of an image of this size."""
        scales = [(int(self.scale[0] * ratio), int(self.scale[1] * ratio)) for ratio in self.ratios]
        return tuple(fit_size(height, width, scale=scale) for scale in scales)

    def __call__(self, record: dict) -> dict:
        """The views of a record."""
        image, label = record["image"], record["label"]
        shapes = self.view_shapes(*label.shape)
        views = [resize_image(image, height=height, width=width) for height, width in shapes]
        named = {f"view_{index}": view for index, view in enumerate(views)}
        return {**named, "label": label, "size": np.array(label.shape, np.int32)}


def make_segmentation_eval_transform(
    *, scale: tuple[int, int] = (2048, 512), ratios: Sequence[float] = (1.0,)
) -> SegmentationEvalTransform:
    """The whole image at one size or at several, ratio kept, nothing padded.

    Args:
      scale: see ``fit_size``; times every ratio, cut to whole pixels.
      ratios: of the views. The published test at several scales has 0.5, 0.75, 1, 1.25, 1.5 and 1.75, each also mirrored.

    Returns:
      ``view_shapes(height, width)``, and a function of {"image": uint8 (H, W, 3), "label": uint8 (H, W)} that gives
      {"view_0": uint8 (h, w, 3), ... one for each ratio, "label": uint8 (H, W), "size": int32 (2,)}, the size (H, W).
    """
    return SegmentationEvalTransform(tuple(scale), tuple(ratios))
