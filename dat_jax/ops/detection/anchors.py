"""Anchor boxes of a feature pyramid, and which of them an image may use.

Anchors of a level are ordered (row, column, base anchor). The anchor at column x and row y of a map of stride s is centred
at (s * x, s * y), without half a pixel of offset. Boxes are as in ``boxes``.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def base_anchors(stride: int, *, scales: Sequence[float], ratios: Sequence[float]) -> np.ndarray:
    """The anchors around (0, 0) of one level, (A, 4) float32, A = ratios x scales, ratio-major.

    A ratio r is height over width: width = stride * scale / sqrt(r), height = stride * scale * sqrt(r).

    Source: MMDetection 2.26, ``AnchorGenerator``, in its float32.
    """
    root = np.sqrt(np.asarray(ratios, np.float32))[:, None]
    scales = np.asarray(scales, np.float32)[None, :]
    width, height = (np.float32(stride) * side * scales for side in (1 / root, root))
    half = 0.5 * np.stack([width.ravel(), height.ravel()], axis=1)
    return np.concatenate([-half, half], axis=1)


def make_anchors(
    map_shapes: Sequence[tuple[int, int]],
    *,
    strides: Sequence[int],
    scales: Sequence[float],
    ratios: Sequence[float],
) -> list[jax.Array]:
    """All anchors of every level.

    Args:
      map_shapes: (height, width) of each level's map.
      strides: pixels of the image in one of the map, a level.
      scales: as in ``base_anchors``, the same at every level.
      ratios: as in ``base_anchors``.

    Returns:
      One (H * W * A, 4) float32 a level, in pixels of the image.

    Raises:
      ValueError: there are not as many strides as maps.
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
    map_shapes: Sequence[tuple[int, int]], *, strides: Sequence[int], per_position: int, pad_shape
) -> list[jax.Array]:
    """Which anchors start inside the padded image: those whose centre does. The rest of an anchor may be outside.

    Args:
      map_shapes: (height, width) of each level's map.
      strides: as in ``make_anchors``.
      per_position: A, the number of base anchors.
      pad_shape: (height, width) in pixels to which this image was padded, at most the batch's; may be traced.

    Returns:
      One (H * W * A,) bool a level.

    Raises:
      ValueError: there are not as many strides as maps.
    """
    validity = []
    for shape, stride in zip(map_shapes, strides, strict=True):
        rows, columns = (stride * jnp.arange(side) < limit for side, limit in zip(shape, pad_shape, strict=True))
        validity.append(jnp.repeat((rows[:, None] & columns[None, :]).reshape(-1), per_position))
    return validity


def inside_image(anchors: jax.Array, *, image_shape, border: float = 0) -> jax.Array:
    """Which anchors (N, 4) lie in an image of (height, width), which may be traced, by at most ``border`` pixels outside.

    (N,) bool. The right and lower edge must be strictly less than the width or height plus the border, as published.

    Source: MMDetection 2.26, ``anchor_inside_flags`` with allowed_border >= 0.
    """
    height, width = image_shape
    x1, y1, x2, y2 = (anchors[:, i] for i in range(4))
    return (x1 >= -border) & (y1 >= -border) & (x2 < width + border) & (y2 < height + border)
