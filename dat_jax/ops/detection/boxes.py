"""Boxes of object detection: areas, overlaps, and encoding of one box relative to another.

A box is (x1, y1, x2, y2) in pixels, float. Coordinates are continuous: pixel i covers [i, i + 1), an image of width W spans
[0, W], and the width of a box is x2 - x1 (not x2 - x1 + 1).

Sets of boxes are padded and come with a mask of the valid ones. Apply ``replace_invalid`` before any arithmetic, so that values
in the padding, including NaN and infinity, reach neither results nor gradients.
"""

import math

import jax
import jax.numpy as jnp

# Limit of dw and dh: the sides of a decoded box are at most 62.5 times those of its reference box, and at least 1/62.5.
MAX_LOG_SCALE = abs(math.log(16 / 1000))


def replace_invalid(boxes: jax.Array, valid: jax.Array | None) -> jax.Array:
    """Replaces invalid boxes by the unit box. Their gradient is zero.

    Args:
      boxes: (..., 4).
      valid: (...,) bool, or None if all are valid.

    Returns:
      (..., 4), of the dtype of ``boxes``.
    """
    if valid is None:
        return boxes
    unit = jnp.asarray((0, 0, 1, 1), boxes.dtype).reshape((1,) * valid.ndim + (4,))
    return jnp.where(valid[..., None], boxes, unit)


def areas(boxes: jax.Array) -> jax.Array:
    """(..., 4) -> (...,) in square pixels; not clipped at zero if a side is negative."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def pairwise_iou(a: jax.Array, b: jax.Array, *, mode: str = "iou", eps: float = 1e-6) -> jax.Array:
    """Overlap of every box of one set with every box of the other.

    Args:
      a: (N, 4) boxes.
      b: (M, 4) boxes.
      mode: "iou", intersection over union, or "iof", intersection over the area of ``a``.
      eps: minimum of the denominator, in square pixels. With 0, 0 / 0 is 0.

    Returns:
      (N, M), of the dtype of the boxes.

    Raises:
      ValueError: the mode is unknown, or a shape is wrong.

    Source: MMDetection 2.26, ``bbox_overlaps``.
    """
    if mode not in ("iou", "iof"):
        raise ValueError(f'Unknown mode {mode!r} of pairwise_iou; choose one of the modes "iou", "iof".')
    if not a.ndim == b.ndim == 2 or a.shape[1] != 4 or b.shape[1] != 4:
        raise ValueError(f"pairwise_iou expected boxes (N, 4) and (M, 4), got {a.shape} and {b.shape}.")
    a, b = a[:, None], b[None]
    common = _intersections(a, b)
    whole = areas(a) + areas(b) - common if mode == "iou" else jnp.broadcast_to(areas(a), common.shape)
    return _ratio(common, jnp.maximum(whole, eps))


def aligned_giou(a: jax.Array, b: jax.Array, *, eps: float = 1e-6) -> jax.Array:
    """Generalized IoU of each box with its partner: IoU - (hull - union) / hull, from -1 to 1.

    Args:
      a: (..., 4) boxes. Differentiable in both arguments.
      b: (..., 4) boxes of the same shape.
      eps: minimum of the union and of the hull, in square pixels.

    Returns:
      (...,) of the dtype of the boxes.

    Raises:
      ValueError: the shapes differ.

    Source: Generalized Intersection over Union (CVPR 2019), with the eps of MMDetection 2.26's ``GIoULoss``.
    """
    if a.shape != b.shape or a.shape[-1] != 4:
        raise ValueError(f"aligned_giou expected two arrays (..., 4) of the same shape, got {a.shape} and {b.shape}.")
    common = _intersections(a, b)
    union = jnp.maximum(areas(a) + areas(b) - common, eps)
    sides = jnp.maximum(a[..., 2:], b[..., 2:]) - jnp.minimum(a[..., :2], b[..., :2])
    hull = jnp.maximum(_area_of_sides(jnp.maximum(sides, 0)), eps)
    return _ratio(common, union) - _ratio(hull - union, hull)


def encode_boxes(boxes: jax.Array, targets: jax.Array, *, means, stds) -> jax.Array:
    """Encodes targets as deltas relative to boxes.

    With centers (x, y), widths w and heights h: dx = (x_target - x_box) / w_box, dy = (y_target - y_box) / h_box,
    dw = log(w_target / w_box), dh = log(h_target / h_box). The result is (delta - mean) / std. A box or target without area gives
    infinity or NaN: replace such boxes before.

    Args:
      boxes: (..., 4), the references.
      targets: (..., 4), of the same rank as ``boxes``; they broadcast.
      means: four floats, subtracted from (dx, dy, dw, dh).
      stds: four floats, divisors after that.

    Returns:
      (..., 4) deltas (dx, dy, dw, dh), dimensionless.

    Source: MMDetection 2.26, ``bbox2delta``.
    """
    center, size = _center_and_size(boxes)
    target_center, target_size = _center_and_size(targets)
    deltas = jnp.concatenate([(target_center - center) / size, jnp.log(target_size / size)], axis=-1)
    return (deltas - _row(means, deltas)) / _row(stds, deltas)


def decode_boxes(boxes: jax.Array, deltas: jax.Array, *, means, stds, image_shape=None) -> jax.Array:
    """Decodes deltas to boxes; the inverse of ``encode_boxes`` where nothing is clipped.

    Args:
      boxes: (..., 4), the references.
      deltas: (..., 4), of the same rank as ``boxes``; they broadcast. Deltas for each class, (N, 4K) class-major, are
        ``deltas.reshape(N, K, 4)`` with ``boxes[:, None]``.
      means: see ``encode_boxes``.
      stds: see ``encode_boxes``.
      image_shape: see ``clip_boxes``; None for no clipping.

    Returns:
      (..., 4) boxes. dw and dh are clipped to +-|log(16 / 1000)|.

    Source: MMDetection 2.26, ``delta2bbox``.
    """
    deltas = deltas * _row(stds, deltas) + _row(means, deltas)
    center, size = _center_and_size(boxes)
    center = center + size * deltas[..., :2]
    half = size * jnp.exp(jnp.clip(deltas[..., 2:], -MAX_LOG_SCALE, MAX_LOG_SCALE)) * 0.5
    decoded = jnp.concatenate([center - half, center + half], axis=-1)
    return decoded if image_shape is None else clip_boxes(decoded, image_shape=image_shape)


def clip_boxes(boxes: jax.Array, *, image_shape) -> jax.Array:
    """Clips boxes to an image.

    Args:
      boxes: (..., 4).
      image_shape: (height, width) in pixels; may be traced.

    Returns:
      (..., 4), with x in [0, width] and y in [0, height].
    """
    height, width = image_shape
    limits = jnp.stack([jnp.asarray(side, boxes.dtype) for side in (width, height, width, height)])
    return jnp.clip(boxes, 0, limits.reshape((1,) * (boxes.ndim - 1) + (4,)))


def _intersections(a, b):
    """Areas of the intersections of boxes (..., 4) of the same rank, after broadcasting: (...,)."""
    sides = jnp.minimum(a[..., 2:], b[..., 2:]) - jnp.maximum(a[..., :2], b[..., :2])
    return _area_of_sides(jnp.maximum(sides, 0))


def _area_of_sides(sides):
    return sides[..., 0] * sides[..., 1]


def _ratio(part, whole):
    """part / whole, and 0 where the whole is 0; the inner ``where`` keeps 0 / 0 out of the gradient."""
    return jnp.where(whole > 0, part / jnp.where(whole > 0, whole, 1), 0)


def _center_and_size(boxes):
    return (boxes[..., :2] + boxes[..., 2:]) * 0.5, boxes[..., 2:] - boxes[..., :2]


def _row(values, like):
    return jnp.asarray(values, like.dtype).reshape((1,) * (like.ndim - 1) + (4,))
