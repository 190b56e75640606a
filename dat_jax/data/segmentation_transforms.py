"""Transforms of an image with its label map on the host, in uint8.

Operations, their order and their distributions are those of the published recipe (spec/dense_prediction.md, section 2), which
follows MMSegmentation 0.29: resize, crop, flip, photometric distortion. All random draws come from the generator that is passed
in. Drawing parameters and applying them are separate functions, so that the distributions can be tested. Normalization runs on
the device.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import cv2
import numpy as np

cv2.setNumThreads(0)  # the pipeline is already parallel over images
IGNORED = 255  # value in a label map for pixels without a class, which count in no loss and no metric
_CROP_TRIES = 10
_BRIGHTNESS = 32.0
_FACTORS = (0.5, 1.5)  # range of the contrast and saturation factors
_HUES = 18  # of OpenCV's 180 hues


def fit_size(height: int, width: int, *, scale: tuple[int, int]) -> tuple[int, int]:
    """Return the largest size within a scale that keeps the aspect ratio of an image.

    Args:
      height, width: size of the image in pixels.
      scale: bounds of the long and the short side, in either order.

    Returns:
      (height, width) in pixels: both sides times one factor, rounded half up as mmcv's ``rescale_size`` does. Sides are at
      least 1, where mmcv returns 0 for very thin images.
    """
    factor = min(max(scale) / max(height, width), min(scale) / min(height, width))
    return max(int(height * factor + 0.5), 1), max(int(width * factor + 0.5), 1)


def resize_image(image: np.ndarray, *, height: int, width: int) -> np.ndarray:
    """Resize with OpenCV's bilinear interpolation, without antialiasing; uint8 (H, W, 3) -> uint8 (height, width, 3)."""
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)


def resize_label(label: np.ndarray, *, height: int, width: int) -> np.ndarray:
    """Resize to the nearest value as OpenCV does, pixel i from floor(i * scale); uint8 (H, W) -> uint8 (height, width)."""
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
    """Make a transform: random resize, random crop, horizontal flip, photometric distortion, padding.

    Args:
      scale: see ``fit_size``; it is multiplied by a ratio that is uniform between ``min_ratio`` and ``max_ratio``.
      min_ratio, max_ratio: see ``scale``.
      crop_size: side S of the crop and of the result, in pixels.
      max_class_ratio: see ``draw_crop``.
      flip_probability: probability of a horizontal flip.
      distort: whether to distort colors, see ``draw_distortion``.

    Returns:
      A function of {"image": uint8 (H, W, 3), "label": uint8 (H, W)} and a generator. It returns {"image": uint8 (S, S, 3),
      "label": uint8 (S, S), "valid": int32 (2,)}, and "damaged" if the record has it. "valid" is the height and width of the
      region at the top left that is not padding. Padding is 0 in the image, and must be 0 again after normalization, and 255 in
      the label.
    """

    def transform(record: dict, rng: np.random.Generator) -> dict:
        image, label = record["image"], record["label"]
        random_scale = draw_scale(rng, scale=scale, min_ratio=min_ratio, max_ratio=max_ratio)
        height, width = fit_size(*label.shape, scale=random_scale)
        label = resize_label(label, height=height, width=width)
        y, x = draw_crop(label, rng, crop_size=crop_size, max_class_ratio=max_class_ratio)
        crop = np.s_[y : y + crop_size, x : x + crop_size]
        image, label = resize_image(image, height=height, width=width)[crop], label[crop]
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
    """Return both bounds of a scale times one uniform random ratio, truncated to whole pixels."""
    ratio = rng.uniform(min_ratio, max_ratio)
    return int(scale[0] * ratio), int(scale[1] * ratio)


def draw_crop(
    label: np.ndarray, rng: np.random.Generator, *, crop_size: int, max_class_ratio: float
) -> tuple[int, int]:
    """Draw the top left corner of a crop, uniform over all positions within the image (MMSegmentation's RandomCrop).

    A crop is rejected if it contains fewer than two classes, or one class has at least ``max_class_ratio`` of its pixels, both
    without ignored pixels. After ten rejected crops, the next one is accepted unconditionally.

    Args:
      label: label map, uint8 (H, W).
      rng: source of the draws, two integers per try, y first.
      crop_size: side of the crop in pixels.
      max_class_ratio: see above; 1 accepts the first crop.

    Returns:
      (y, x) in pixels; 0 along a side that is shorter than the crop.
    """
    margins = [max(side - crop_size, 0) for side in label.shape]
    for _ in range(_CROP_TRIES):
        y, x = (int(rng.integers(margin + 1)) for margin in margins)
        if max_class_ratio >= 1 or is_varied(label[y : y + crop_size, x : x + crop_size], max_class_ratio):
            return y, x
    y, x = (int(rng.integers(margin + 1)) for margin in margins)
    return y, x


def is_varied(label: np.ndarray, max_class_ratio: float) -> bool:
    """Return whether a label map contains at least two classes, none with ``max_class_ratio`` or more of its pixels.

    Args:
      label: uint8 (H, W); pixels of 255 are not counted.
      max_class_ratio: fraction of the counted pixels.
    """
    counts = np.bincount(label.ravel(), minlength=256)[:IGNORED]
    return bool(np.count_nonzero(counts) > 1 and counts.max() / counts.sum() < max_class_ratio)


def pad(array: np.ndarray, *, height: int, width: int, value: int) -> np.ndarray:
    """Return a copy padded with ``value`` at the bottom and the right; (H, W, ...) -> (height, width, ...)."""
    padded = np.full((height, width, *array.shape[2:]), value, array.dtype)
    padded[: array.shape[0], : array.shape[1]] = array
    return padded


class Distortion(NamedTuple):
    """Parameters of a photometric distortion; None omits a step.

    Attributes:
      brightness: value added to every channel.
      contrast: factor of every channel.
      saturation: factor of the saturation.
      hue: value added to the hue, in units of two degrees.
      contrast_first: whether contrast precedes saturation and hue, instead of following them.
    """

    brightness: float | None
    contrast: float | None
    saturation: float | None
    hue: int | None
    contrast_first: bool


def draw_distortion(rng: np.random.Generator) -> Distortion:
    """Draw the parameters of MMSegmentation's PhotoMetricDistortion.

    Every step is applied with probability 1/2, and contrast comes first or last with probability 1/2. Brightness is uniform in
    [-32, 32], contrast and saturation are uniform in [0.5, 1.5], and the hue is an integer from -18 to 17.
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
    """Draw a distortion and apply it; uint8 (H, W, 3) RGB -> uint8 (H, W, 3), a copy or the image itself."""
    return apply_distortion(image, draw_distortion(rng))


def apply_distortion(image: np.ndarray, distortion: Distortion) -> np.ndarray:
    """Apply brightness, contrast (if first), saturation, hue, and contrast (if last).

    After every step, values are clipped to 0..255 and truncated to uint8. Saturation and hue are each applied in OpenCV's uint8
    HSV, with hues in 0..179.

    Args:
      image: uint8 (H, W, 3) RGB.
      distortion: the parameters.

    Returns:
      uint8 (H, W, 3) RGB, a copy or the image itself.
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
    """Return the lookup table of value * factor + shift, uint8 (256,).

    A table gives the same result as float32 arithmetic on the image and is several times as fast.
    """
    values = np.arange(256, dtype=np.float32)
    values = values * np.float32(1 if factor is None else factor) + np.float32(0 if shift is None else shift)
    return np.clip(values, 0, 255).astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class SegmentationEvalTransform:
    """Evaluation transform; see ``make_segmentation_eval_transform``.

    Attributes:
      scale: see ``fit_size``.
      ratios: factor of the scale for each view.
    """

    scale: tuple[int, int]
    ratios: tuple[float, ...]

    def view_shapes(self, height: int, width: int) -> tuple[tuple[int, int], ...]:
        """Return (height, width) in pixels of every view of an image of the given size."""
        scales = [(int(self.scale[0] * ratio), int(self.scale[1] * ratio)) for ratio in self.ratios]
        return tuple(fit_size(height, width, scale=scale) for scale in scales)

    def __call__(self, record: dict) -> dict:
        """Return the views, the label map and the original size of a record."""
        image, label = record["image"], record["label"]
        shapes = self.view_shapes(*label.shape)
        views = [resize_image(image, height=height, width=width) for height, width in shapes]
        named_views = {f"view_{index}": view for index, view in enumerate(views)}
        return {**named_views, "label": label, "size": np.array(label.shape, np.int32)}


def make_segmentation_eval_transform(
    *, scale: tuple[int, int] = (2048, 512), ratios: Sequence[float] = (1.0,)
) -> SegmentationEvalTransform:
    """Make a transform that resizes the whole image to one or several sizes, keeping its aspect ratio, without padding.

    Args:
      scale: see ``fit_size``; it is multiplied by every ratio and truncated to whole pixels.
      ratios: one per view. The published multi-scale test uses 0.5, 0.75, 1, 1.25, 1.5 and 1.75, each also mirrored.

    Returns:
      A transform with ``view_shapes(height, width)``, to be called with {"image": uint8 (H, W, 3), "label": uint8 (H, W)}. It
      returns {"view_0": uint8 (h, w, 3), ... one per ratio, "label": uint8 (H, W), "size": int32 (2,), which is (H, W)}.
    """
    return SegmentationEvalTransform((scale[0], scale[1]), tuple(ratios))
