"""Boxes of object detection: areas, overlaps, and the coding of one box relative to another.

A box is (x1, y1, x2, y2) in pixels, float. Coordinates are continuous: pixel i covers [i, i + 1), an image of width W
spans [0, W], and the width of a box is x2 - x1, without a one.

Sets of boxes are padded, and a mask says which are valid. ``replace_invalid`` comes before any arithmetic, so that what
stands in the padding, NaN and infinity too, reaches neither a result nor a gradient.
"""

import math

import jax
import jax.numpy as jnp

MAX_LOG_SCALE = abs(
    math.log(16 / 1000)
)  # no decoded box is more than 62.5 times its reference box, or less than 1/62.5


def replace_invalid(boxes: jax.Array, valid: jax.Array | None) -> jax.Array:
    """Boxes (..., 4), those that are not valid (...,) bool replaced by the unit box; their gradient is zero.

    None means that all are valid.
    """
    if valid is None:
        return boxes
    unit = jnp.asarray((0, 0, 1, 1), boxes.dtype).reshape((1,) * valid.ndim + (4,))
    return jnp.where(valid[..., None], boxes, unit)


def areas(boxes: jax.Array) -> jax.Array:
    """(..., 4) -> (...,) in square pixels; not cut at zero where a side is negative."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def pairwise_iou(a: jax.Array, b: jax.Array, *, mode: str = "iou", eps: float = 1e-6) -> jax.Array:
    """Overlap of every box of one set with every box of the other.

    Args:
      a: (N, 4) boxes.
      b: (M, 4) boxes.
      mode: "iou", intersection over union, or "iof", intersection over the area of ``a``.
      eps: the least value of the denominator, in square pixels. With 0, 0 / 0 is 0.

    Returns:
      (N, M) of the dtype of the boxes.

    Raises:
      ValueError: the mode is unknown, or a shape is another.

    Source: MMDetection 2.26, ``bbox_overlaps``.
    """
    if mode not in ("iou", "iof"):
        raise ValueError(f'pairwise_iou knows the modes "iou" and "iof", not {mode!r}.')
    if not a.ndim == b.ndim == 2 or a.shape[1] != 4 or b.shape[1] != 4:
        raise ValueError(f"pairwise_iou wants boxes (N, 4) and (M, 4), got {a.shape} and {b.shape}.")
    a, b = a[:, None], b[None]
    common = _intersections(a, b)
    whole = areas(a) + areas(b) - common if mode == "iou" else jnp.broadcast_to(areas(a), common.shape)
    return _ratio(common, jnp.maximum(whole, eps))


def aligned_giou(a: jax.Array, b: jax.Array, *, eps: float = 1e-6) -> jax.Array:
    """Generalised IoU of each box with its partner: IoU - (hull - union) / hull, from -1 to 1.

    Args:
      a: (..., 4) boxes. Differentiable in both arguments.
      b: (..., 4) boxes of the same shape.
      eps: the least union and the least hull, in square pixels.

    Returns:
      (...,) of the dtype of the boxes.

    Raises:
      ValueError: the shapes differ.

    Source: Generalized Intersection over Union (CVPR 2019), with the eps of MMDetection 2.26's ``GIoULoss``.
    """
    if a.shape != b.shape or a.shape[-1] != 4:
        raise ValueError(f"aligned_giou wants two arrays (..., 4) of the same shape, got {a.shape} and {b.shape}.")
    common = _intersections(a, b)
    union = jnp.maximum(areas(a) + areas(b) - common, eps)
    sides = jnp.maximum(a[..., 2:], b[..., 2:]) - jnp.minimum(a[..., :2], b[..., :2])
    hull = jnp.maximum(_area_of_sides(jnp.maximum(sides, 0)), eps)
    return _ratio(common, union) - _ratio(hull - union, hull)


def encode_boxes(boxes: jax.Array, targets: jax.Array, *, means, stds) -> jax.Array:
    """Deltas that lead from boxes to targets.

    dx = (target's centre x - box's) / box's width, dw = log(target's width / box's); y and h likewise; then
    (delta - mean) / std. A box or target without area gives infinity or NaN: replace such boxes before.

    Args:
      boxes: (..., 4), the references.
      targets: (..., 4), of the same rank as ``boxes``; they broadcast.
      means: four floats, subtracted from (dx, dy, dw, dh).
      stds: four floats that divide what is left.

    Returns:
      (..., 4) deltas (dx, dy, dw, dh), without a unit.

    Source: MMDetection 2.26, ``bbox2delta``.
    """
    center, size = _center_and_size(boxes)
    target_center, target_size = _center_and_size(targets)
    deltas = jnp.concatenate([(target_center - center) / size, jnp.log(target_size / size)], axis=-1)
    return (deltas - _row(means, deltas)) / _row(stds, deltas)


def decode_boxes(boxes: jax.Array, deltas: jax.Array, *, means, stds, image_shape=None) -> jax.Array:
    """The boxes to which deltas lead; the inverse of ``encode_boxes`` where nothing is cut.

    Args:
      boxes: (..., 4), the references.
      deltas: (..., 4), of the same rank as ``boxes``; they broadcast. Deltas for each class, (N, 4K) class-major, are
        ``deltas.reshape(N, K, 4)`` with ``boxes[:, None]``.
      means: four floats, as in ``encode_boxes``.
      stds: four floats, as in ``encode_boxes``.
      image_shape: see ``clip_boxes``; not clipped unless given.

    Returns:
      (..., 4) boxes. dw and dh are cut to +-|log(16 / 1000)|.

    Source: MMDetection 2.26, ``delta2bbox``.
    """
    deltas = deltas * _row(stds, deltas) + _row(means, deltas)
    center, size = _center_and_size(boxes)
    center = center + size * deltas[..., :2]
    half = size * jnp.exp(jnp.clip(deltas[..., 2:], -MAX_LOG_SCALE, MAX_LOG_SCALE)) * 0.5
    decoded = jnp.concatenate([center - half, center + half], axis=-1)
    return decoded if image_shape is None else clip_boxes(decoded, image_shape=image_shape)


def clip_boxes(boxes: jax.Array, *, image_shape) -> jax.Array:
    """Boxes (..., 4) cut to [0, width] and [0, height] of an image; ``image_shape`` is (height, width), may be traced."""
    height, width = image_shape
    limits = jnp.stack([jnp.asarray(side, boxes.dtype) for side in (width, height, width, height)])
    return jnp.clip(boxes, 0, limits.reshape((1,) * (boxes.ndim - 1) + (4,)))


def _intersections(a, b):
    """Area common to boxes (..., 4) of the same rank, after broadcasting: (...,)."""
    sides = jnp.minimum(a[..., 2:], b[..., 2:]) - jnp.maximum(a[..., :2], b[..., :2])
    return _area_of_sides(jnp.maximum(sides, 0))


def _area_of_sides(sides):
    return sides[..., 0] * sides[..., 1]


def _ratio(part, whole):
    """part / whole, 0 where the whole is; the inner ``where`` keeps 0 / 0 out of the gradient."""
    return jnp.where(whole > 0, part / jnp.where(whole > 0, whole, 1), 0)


def _center_and_size(boxes):
    return (boxes[..., :2] + boxes[..., 2:]) * 0.5, boxes[..., 2:] - boxes[..., :2]


def _row(four, like):
    return jnp.asarray(four, like.dtype).reshape((1,) * (like.ndim - 1) + (4,))
