"""Instance masks: cropped to boxes for training, and pasted into the image for results.

For the format of boxes see ``boxes``; the center of pixel (i, j) is at (i + 1/2, j + 1/2).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dat_jax.ops.detection.boxes import clip_boxes, replace_invalid
from dat_jax.ops.detection.roi_align import apply_weights, axis_weights, map_chunks


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
    """Crops a mask to each box, by RoIAlign with sampling ratio 0: soft values from 0 to 1.

    Args:
      masks: (G, H, W) bool or 0 and 1; if packed, (G, H, W / 8) uint8.
      boxes: (K, 4) in pixels of the masks; they are clipped to the masks.
      indices: (K,) int, the mask of each box.
      size: P, the side of the result.
      mask_shape: (height, width) of the masks without padding; may be traced. None if there is no padding.
      valid: (K,) bool; the result of an invalid box is 0, whatever the box and index are. None if all are valid.
      packed: whether a byte of the masks has eight pixels, the first one in the highest bit, as by ``numpy.packbits``.
      chunk: number of boxes processed at once; memory is ``chunk * H * W`` numbers.

    Returns:
      (K, P, P) float, without gradient.

    Source: MMDetection 2.26, ``BitmapMasks.crop_and_resize``.
    """
    rows_of_masks, columns_of_masks = masks.shape[1], masks.shape[2] * (8 if packed else 1)
    height, width = (rows_of_masks, columns_of_masks) if mask_shape is None else mask_shape
    valid = jnp.ones(boxes.shape[0], bool) if valid is None else valid
    boxes = replace_invalid(lax.stop_gradient(boxes), valid)
    boxes = boxes.astype(jnp.promote_types(boxes.dtype, jnp.float32))
    boxes = clip_boxes(boxes, image_shape=(height, width))
    indices = jnp.where(valid, indices, 0)

    def crop_chunk(arguments):
        boxes, indices, valid = arguments
        rows = axis_weights(boxes[:, 1], boxes[:, 3], rows_of_masks, size, extent=height)
        columns = axis_weights(boxes[:, 0], boxes[:, 2], columns_of_masks, size, extent=width)
        box_masks = jnp.asarray(masks)[indices]
        box_masks = jnp.unpackbits(box_masks, axis=-1) if packed else box_masks
        cropped = apply_weights("khw", box_masks.astype(boxes.dtype), rows, columns)
        return jnp.where(valid[:, None, None], cropped, 0)

    return lax.stop_gradient(map_chunks(crop_chunk, (boxes, indices, valid), chunk))


def mask_targets(masks: jax.Array, boxes: jax.Array, indices: jax.Array, **options) -> jax.Array:
    """``crop_masks`` with a threshold: (K, P, P) bool, True where the value is at least 1/2."""
    return crop_masks(masks, boxes, indices, **options) >= 0.5


def paste_masks(
    probabilities: np.ndarray, boxes: np.ndarray, shape: tuple[int, int], *, threshold: float | None = None
) -> np.ndarray:
    """Pastes the masks of boxes into images, with numpy on the host, for images of any size.

    The mask is sampled bilinearly at the center of each pixel, in coordinates of the box, and is zero outside. As published, only
    pixels at most one pixel outside the box (rounded outward) are computed. The blend with zero reaches half a mask pixel beyond
    the box, which is more than that for a box of over 56 pixels: the values that are cut off are below half of those at
    the mask's border. Computed in float32, as published.

    Args:
      probabilities: (n, M, M).
      boxes: (n, 4) in pixels of the image; they may reach outside. A box without area gives zeros.
      shape: (height, width) of the image.
      threshold: if given, the result is bool, True where the value is at least the threshold.

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
    """First pixel to compute, and the weight of each line of the mask in each pixel: (pixels, side)."""
    first, last = max(0, int(np.floor(start)) - 1), min(pixels, int(np.ceil(stop)) + 1)
    centers = np.arange(first, max(first, last), dtype=np.float32) + np.float32(0.5)
    positions = (centers - start) / (stop - start) * np.float32(side) - np.float32(0.5)
    return first, np.maximum(0, 1 - np.abs(positions[:, None] - np.arange(side, dtype=np.float32)[None, :]))
