"""Check before training that the anchors of a detector can match the objects of its training data.

An object that overlaps no anchor enough is never a positive example, so that the detector does not learn to find it, although
its losses and its accuracy look good.
"""

import logging
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from dat_jax.ops.detection.anchors import base_anchors

logger = logging.getLogger(__name__)
PADDED_TO = 32  # images are padded to a multiple of this; anchors whose position lies beyond are not used
_MIN_OBJECTS = 10  # a smaller group is not warned about
_MIN_FRACTION = 0.5
_FACTORS = (1.5, 2, 3, 4)  # of the image size, to suggest one that suffices


class AnchorSettings(NamedTuple):
    """Anchors of a dense head and the overlaps that its training requires.

    Attributes:
      strides: stride of each level in pixels.
      scales: see ``ops.detection.anchors.base_anchors``.
      ratios: see ``ops.detection.anchors.base_anchors``.
      inside_only: whether anchors that extend beyond their image are excluded.
      required: IoU of its best anchor that an object needs to be learned.
      positive: IoU above which all anchors of an object are positive, at least ``required``.
    """

    strides: tuple[int, ...]
    scales: tuple[float, ...]
    ratios: tuple[float, ...]
    inside_only: bool
    required: float
    positive: float


def compute_best_ious(boxes: np.ndarray, image_shapes: np.ndarray, settings: AnchorSettings) -> np.ndarray:
    """Compute the IoU of each box with its best anchor.

    Of the anchors of one shape, the best one has the center that is nearest to that of the box, separately in x and y.

    Args:
      boxes: float (n, 4), x1, y1, x2, y2 in pixels of the network's input.
      image_shapes: int (n, 2), height and width in pixels of the image of each box, without padding.
      settings: the anchors.

    Returns:
      float64 (n,), 0 for boxes without area.
    """
    boxes, shapes = np.asarray(boxes, np.float64), np.asarray(image_shapes)[:, ::-1]  # x before y
    starts, ends = boxes[:, :2], boxes[:, 2:]
    areas = np.prod(ends - starts, axis=1)
    best = np.zeros(len(boxes))
    padded = -(-shapes // PADDED_TO) * PADDED_TO
    for stride in settings.strides:
        for anchor in base_anchors(stride, scales=settings.scales, ratios=settings.ratios).astype(np.float64):
            half = anchor[2:]
            first, last = np.zeros_like(shapes), -(-padded // stride) - 1  # indices of the positions in the map
            if settings.inside_only:
                first = np.ceil(half / stride).astype(int) + first
                last = np.minimum(last, np.ceil((shapes - half) / stride).astype(int) - 1)
            nearest = np.clip(np.round((starts + ends) / 2 / stride), first, np.maximum(first, last)) * stride
            sides = np.minimum(ends, nearest + half) - np.maximum(starts, nearest - half)
            overlaps = np.prod(np.maximum(sides, 0), axis=1)
            overlaps = np.where((first <= last).all(axis=1), overlaps, 0)
            best = np.maximum(best, overlaps / (areas + np.prod(2 * half) - overlaps))
    return np.where(areas > 0, best, 0)


def check_anchors(
    boxes: np.ndarray, sizes: np.ndarray, settings: AnchorSettings, *, resize: Callable[[np.ndarray], np.ndarray]
) -> None:
    """Log how many objects have an anchor that they need, and a warning with advice if many of a group do not.

    The groups are COCO's sizes, by the area of the box in pixels of the network's input, and aspect ratios. There is a warning if
    a group of at least 10 objects has fewer than half with such an anchor.

    Args:
      boxes: float (n, 4), x, y, width and height in pixels of the original image.
      sizes: int (n, 2), height and width of the original image of each box.
      settings: the anchors.
      resize: function from sizes (n, 2) to the heights and widths of the images in the network's input.
    """
    if not len(boxes):
        return
    shapes = resize(sizes)
    scaled = _to_corners(boxes) * np.tile((shapes / sizes)[:, ::-1], 2)
    ious = compute_best_ious(scaled, shapes, settings)
    matched = ious >= settings.required
    groups = _group(scaled)
    counts = {name: (int(matched[group].sum()), int(group.sum())) for name, group in groups.items() if group.any()}
    logger.info(
        "Anchors: %s of %s sampled objects have an anchor with an IoU of %g, the least to be learned (%s).%s",
        *(f"{matched.sum():,}", f"{len(boxes):,}", settings.required),
        ", ".join(f"{name} {count:,} of {total:,}" for name, (count, total) in counts.items()),
        f" {(ious >= settings.positive).sum():,} have one with {settings.positive:g}."
        if settings.positive > settings.required
        else "",
    )
    poor = [name for name, (count, total) in counts.items() if total >= _MIN_OBJECTS and count < _MIN_FRACTION * total]
    if not poor:
        return
    chosen = np.any([groups[name] for name in poor], axis=0)
    logger.warning(
        "Few objects of some kinds have an anchor with an IoU of %g: %s. They will hardly be found, even in training images. %s",
        settings.required,
        ", ".join(f"{name} {counts[name][0]:,} of {counts[name][1]:,}" for name in poor),
        _advise(scaled[chosen], shapes[chosen], settings),
    )


def _advise(boxes: np.ndarray, shapes: np.ndarray, settings: AnchorSettings) -> str:
    """Say which image size would suffice for some boxes, or which anchors to change."""
    scales, ratios = (", ".join(f"{value:.3g}" for value in values) for values in (settings.scales, settings.ratios))
    anchors = f"config.head.anchor_scales (now {scales}) and config.head.anchor_ratios (now {ratios})"
    for factor in _FACTORS:
        larger = np.round(shapes * factor).astype(int)
        matched = compute_best_ious(boxes * factor, larger, settings) >= settings.required
        if matched.mean() >= _MIN_FRACTION:
            return (
                f"With images {factor:g} times as large {matched.sum():,} of {len(boxes):,} have one: raise "
                "config.data.short_sides and config.data.long_side, with config.data.buckets, config.data.test_short_side "
                f"and config.data.test_long_side; or set {anchors} in a configuration file."
            )
    return f"Set {anchors} in a configuration file for the sizes and ratios (height over width) of the objects."


def _to_corners(boxes: np.ndarray) -> np.ndarray:
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)


def _group(boxes: np.ndarray) -> dict[str, np.ndarray]:
    """Return masks (n,) of the boxes of each size and of each aspect ratio."""
    width, height = (boxes[:, 2:] - boxes[:, :2]).T
    area, ratio = width * height, np.maximum(width, height) / np.maximum(np.minimum(width, height), 1e-6)
    return {
        "small": area < 32**2,
        "medium": (area >= 32**2) & (area < 96**2),
        "large": area >= 96**2,
        "up to 2:1": ratio <= 2,
        "2:1 to 4:1": (ratio > 2) & (ratio <= 4),
        "longer than 4:1": ratio > 4,
    }
