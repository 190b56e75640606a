"""Masks of instances: cut out under boxes for training, and pasted back into the image for results.

Boxes are as in ``boxes``; the centre of pixel (i, j) is at (i + 1/2, j + 1/2).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dat_jax.ops.detection import boxes as bx
from dat_jax.ops.detection import roi_align as ra


def crop_masks(
    masks: jax.Array,
    boxes: jax.Array,
    indices: jax.Array,
    *,
    size: int = 28,
    mask_shape=None,
    valid: jax.Array | None = None,
    packed: bool = False,
    chunk: int = 8,
) -> jax.Array:
    """Each box's part of its mask, by RoIAlign with ratio 0: soft, from 0 to 1.

    Args:
      masks: (G, H, W) bool or 0 and 1; packed, uint8 (G, H, W / 8).
      boxes: (K, 4) in pixels of the masks; clipped to them.
      indices: (K,) int, which mask each box is cut from.
      size: P, the side of the result.
      mask_shape: (height, width) that count, if the rest of ``masks`` is padding; may be traced. The whole unless given.
      valid: (K,) bool; for others the result is 0, whatever box and index are. None for all.
      packed: whether a byte of the masks has eight pixels, the first in its highest bit, as of ``numpy.packbits``.
      chunk: boxes treated at once; memory is ``chunk * H * W`` numbers.

    Returns:
      (K, P, P) float, without gradient.

    Source: MMDetection 2.26, ``BitmapMasks.crop_and_resize``.
    """
    rows_of_masks, columns_of_masks = masks.shape[1], masks.shape[2] * (8 if packed else 1)
    height, width = (rows_of_masks, columns_of_masks) if mask_shape is None else mask_shape
    valid = jnp.ones(boxes.shape[0], bool) if valid is None else valid
    boxes = bx.replace_invalid(lax.stop_gradient(boxes), valid)
    boxes = boxes.astype(jnp.promote_types(boxes.dtype, jnp.float32))
    boxes = bx.clip_boxes(boxes, image_shape=(height, width))
    indices = jnp.where(valid, indices, 0)

    def crop_chunk(arguments):
        boxes, indices, valid = arguments
        rows = ra.axis_weights(boxes[:, 1], boxes[:, 3], rows_of_masks, size, extent=height)
        columns = ra.axis_weights(boxes[:, 0], boxes[:, 2], columns_of_masks, size, extent=width)
        chosen = jnp.asarray(masks)[indices]
        chosen = jnp.unpackbits(chosen, axis=-1) if packed else chosen
        cropped = ra.apply_weights("khw", chosen.astype(boxes.dtype), rows, columns)
        return jnp.where(valid[:, None, None], cropped, 0)

    return lax.stop_gradient(ra.map_chunks(crop_chunk, (boxes, indices, valid), chunk))


def mask_targets(masks: jax.Array, boxes: jax.Array, indices: jax.Array, **options) -> jax.Array:
    """``crop_masks`` with a threshold: (K, P, P) bool, True from 1/2 on."""
    return crop_masks(masks, boxes, indices, **options) >= 0.5


def paste_masks(
    probabilities: np.ndarray, boxes: np.ndarray, shape: tuple[int, int], *, threshold: float | None = None
) -> np.ndarray:
    """Pastes the masks of boxes into images, on the host: numpy, for images of any size.

    A pixel's centre, in the coordinates of its box, is sampled bilinearly; around the mask all is zero. As published, only
    pixels within one of the box rounded outward are computed. The blend with zero around a mask reaches half of a mask's
    pixel out of the box, which is more in a box of over 56 pixels: what is cut off there is below half the mask's
    border. In float32, as published.

    Args:
      probabilities: (n, M, M).
      boxes: (n, 4) in pixels of the image; they may reach outside. One without area gives zeros.
      shape: (height, width) of the image.
      threshold: with it, the result is bool, True from the threshold on.

    Returns:
      (n, height, width) float32 or bool.

    Source: MMDetection 2.26, ``_do_paste_mask`` with skip_empty=True.
    """
    pasted = np.zeros((len(probabilities), *shape), np.float32 if threshold is None else bool)
    for out, mask, (x1, y1, x2, y2) in zip(pasted, probabilities, np.asarray(boxes, np.float32), strict=True):
        if not (x2 > x1 and y2 > y1):
            continue
        top, rows = _paste_weights(y1, y2, shape[0], mask.shape[0])
        left, columns = _paste_weights(x1, x2, shape[1], mask.shape[1])
        values = rows @ np.asarray(mask, np.float32) @ columns.T
        if threshold is not None:
            values = values >= threshold
        out[top : top + len(rows), left : left + len(columns)] = values
    return pasted


def _paste_weights(start, stop, pixels, side):
    """First pixel reached, and (pixels reached, side): how much of each line of the mask."""
    first, last = max(0, int(np.floor(start)) - 1), min(pixels, int(np.ceil(stop)) + 1)
    centers = np.arange(first, max(first, last), dtype=np.float32) + np.float32(0.5)
    positions = (centers - start) / (stop - start) * np.float32(side) - np.float32(0.5)
    return first, np.maximum(0, 1 - np.abs(positions[:, None] - np.arange(side, dtype=np.float32)[None, :]))
