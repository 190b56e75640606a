"""Anchor boxes of a feature pyramid, and masks of the anchors that an image may use.

The anchors of a level are ordered by (row, column, base anchor). The anchor at column x and row y of a map of stride s is
centered at (s * x, s * y), without an offset of half a pixel. For the format of boxes see ``boxes``.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def base_anchors(stride: int, *, scales: Sequence[float], ratios: Sequence[float]) -> np.ndarray:
    """Anchors around (0, 0) of one level.

    A ratio r is height over width: width = stride * scale / sqrt(r), height = stride * scale * sqrt(r).

    Args:
      stride: pixels of the image per pixel of the map.
      scales: sizes, as multiples of the stride.
      ratios: height over width.

    Returns:
      (A, 4) float32 with A = len(ratios) * len(scales), ratio-major.

    Source: MMDetection 2.26, ``AnchorGenerator``, which also computes in float32.
    """
    root = np.sqrt(np.asarray(ratios, np.float32))[:, None]
    multiples = np.asarray(scales, np.float32)[None, :]
    width, height = (np.float32(stride) * side * multiples for side in (1 / root, root))
    half = 0.5 * np.stack([width.ravel(), height.ravel()], axis=1)
    return np.concatenate([-half, half], axis=1)


def make_anchors(
    map_shapes: Sequence[tuple[int, ...]],
    *,
    strides: Sequence[int],
    scales: Sequence[float],
    ratios: Sequence[float],
) -> list[jax.Array]:
    """Makes all anchors of every level.

    Args:
      map_shapes: (height, width) of each level's map.
      strides: for each level, pixels of the image per pixel of the map.
      scales: see ``base_anchors``; the same at every level.
      ratios: see ``base_anchors``; the same at every level.

    Returns:
      For each level an array (H * W * A, 4), float32, in pixels of the image.

    Raises:
      ValueError: the numbers of strides and maps differ.
    """
    anchors = []
    for (height, width), stride in zip(map_shapes, strides, strict=True):
        x, y = (stride * jnp.arange(side, dtype=jnp.float32) for side in (width, height))
        y, x = jnp.meshgrid(y, x, indexing="ij")
        corners = jnp.stack([x, y, x, y], axis=-1)[:, :, None]
        base = jnp.asarray(base_anchors(stride, scales=scales, ratios=ratios))
        anchors.append((corners + base[None, None]).reshape(-1, 4))
    return anchors


def anchor_validity(
    map_shapes: Sequence[tuple[int, ...]], *, strides: Sequence[int], per_position: int, pad_shape
) -> list[jax.Array]:
    """Mask of the anchors whose center is inside the padded image. The rest of such an anchor may be outside.

    Args:
      map_shapes: (height, width) of each level's map.
      strides: see ``make_anchors``.
      per_position: A, the number of base anchors.
      pad_shape: (height, width) in pixels to which this image was padded, at most the shape of the batch; may be traced.

    Returns:
      For each level an array (H * W * A,), bool.

    Raises:
      ValueError: the numbers of strides and maps differ.
    """
    validity = []
    for shape, stride in zip(map_shapes, strides, strict=True):
        rows, columns = (stride * jnp.arange(side) < limit for side, limit in zip(shape, pad_shape, strict=True))
        validity.append(jnp.repeat((rows[:, None] & columns[None, :]).reshape(-1), per_position))
    return validity


def inside_image(anchors: jax.Array, *, image_shape, border: float = 0) -> jax.Array:
    """Mask of the anchors that are inside an image, or reach at most ``border`` pixels beyond it.

    The right edge must be strictly less than the width plus the border, the lower edge than the height plus the border, as
    published.

    Args:
      anchors: (N, 4).
      image_shape: (height, width) in pixels; may be traced.
      border: in pixels.

    Returns:
      (N,) bool.

    Source: MMDetection 2.26, ``anchor_inside_flags`` with allowed_border >= 0.
    """
    height, width = image_shape
    x1, y1, x2, y2 = (anchors[:, i] for i in range(4))
    return (x1 >= -border) & (y1 >= -border) & (x2 < width + border) & (y2 < height + border)
