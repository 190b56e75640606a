"""RoIAlign: resamples the part of a map inside each box to a small square of bins, each the mean of bilinear samples.

The samples of a box are a grid of rows and columns, so the result is A F B^T with the map F and two small matrices: no gather,
and no scatter in the backward pass.

Coordinates of boxes are continuous, see ``boxes``; the center of pixel i is at i + 1/2 ("aligned"). A sample at most one pixel
outside the map has the value of the nearest pixel, a sample farther outside is 0. Positions are computed in float32 or better.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from dat_jax.ops.detection.boxes import areas, replace_invalid


def roi_align(
    features: jax.Array,
    boxes: jax.Array,
    *,
    size: int,
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    valid: jax.Array | None = None,
    chunk: int = 32,
) -> jax.Array:
    """Features inside each box, from one map.

    Args:
      features: (H, W, C). Differentiable; the boxes have no gradient.
      boxes: (K, 4), of any size and anywhere.
      size: P, number of bins along each axis.
      spatial_scale: pixels of the map per unit of the boxes, 1 / stride.
      sampling_ratio: number of samples per bin and axis. 0 for ceil(side / P), with the side of the box in pixels of the map;
        then the result is 0 for a box with a side of zero or less.
      valid: (K,) bool; the result of an invalid box is 0, whatever the box is. None if all are valid.
      chunk: number of boxes processed at once; memory is ``chunk * P * W * C`` numbers.

    Returns:
      (K, P, P, C), of the dtype of ``features``. Costs K * P * W * (H + P) * C multiplications.

    Source: Mask R-CNN (ICCV 2017); MMCV 1.7, ``RoIAlign`` with aligned=True.
    """
    return pyramid_roi_align(
        [features],
        boxes,
        size=size,
        strides=[1 / spatial_scale],
        sampling_ratio=sampling_ratio,
        valid=valid,
        chunk=chunk,
    )


def assign_levels(boxes: jax.Array, *, levels: int = 4, finest: float = 56.0) -> jax.Array:
    """Pyramid level of each box: floor(log2(sqrt(area) / finest + 1e-6)), clipped to [0, levels - 1].

    It is computed without the logarithm, whose rounding matters at powers of two.

    Args:
      boxes: (..., 4) in pixels of the image.
      levels: number of levels.
      finest: square root of an area, in pixels; level 0 has the boxes up to twice this size, and each further level doubles it.

    Returns:
      (...,) int32.

    Source: Feature Pyramid Networks (CVPR 2017), equation 1; MMDetection 2.26, ``SingleRoIExtractor``.
    """
    scale = jnp.sqrt(jnp.maximum(areas(boxes), 0)) / finest + 1e-6
    return sum((scale >= 2.0**level).astype(jnp.int32) for level in range(1, levels)) + jnp.zeros(
        scale.shape, jnp.int32
    )


def pyramid_roi_align(
    maps: Sequence[jax.Array],
    boxes: jax.Array,
    *,
    size: int,
    strides: Sequence[float] = (4, 8, 16, 32),
    finest: float = 56.0,
    sampling_ratio: int = 0,
    valid: jax.Array | None = None,
    sizes: Sequence[jax.Array | None] | None = None,
    chunk: int = 32,
) -> jax.Array:
    """Features inside each box, from the pyramid level that fits the area of the box.

    Every box is multiplied with every level, with matrices that are zero for all levels but its own, because arrays have static
    shapes and the level of a box is not known when the program is compiled. Each level has a quarter of the pixels of the one
    before, so this costs a third more than the finest level alone.

    Args:
      maps: (H, W, C) of each level, finest first.
      boxes: (K, 4) in pixels of the image.
      size: P, number of bins along each axis.
      strides: for each level, pixels of the image per pixel of the map.
      finest: see ``assign_levels``.
      sampling_ratio: see ``roi_align``.
      valid: see ``roi_align``.
      sizes: int (2,) for each level, the (height, width) of the map in its array, see ``ops.sizes``; None for (H, W).
      chunk: see ``roi_align``; the finest map determines the memory.

    Returns:
      (K, P, P, C), of the dtype of the maps.

    Raises:
      ValueError: the numbers of strides and maps differ, or a shape is wrong.
    """
    if len(maps) != len(strides) or any(features.ndim != 3 for features in maps) or boxes.shape[1:] != (4,):
        raise ValueError(
            f"RoIAlign expected maps (H, W, C), a stride for each and boxes (K, 4), got {[x.shape for x in maps]}, "
            f"strides {tuple(strides)} and {boxes.shape}."
        )
    valid = jnp.ones(boxes.shape[0], bool) if valid is None else valid
    boxes = replace_invalid(lax.stop_gradient(boxes), valid)
    boxes = boxes.astype(jnp.promote_types(boxes.dtype, jnp.float32))
    level_of_box = assign_levels(boxes, levels=len(maps), finest=finest)
    extents = [(None, None) if size is None else (size[0], size[1]) for size in sizes or [None] * len(maps)]

    def align_chunk(arguments):
        boxes, level_of_box, valid = arguments
        total = 0.0
        for level, (features, stride) in enumerate(zip(maps, strides, strict=True)):
            used = (valid & (level_of_box == level))[:, None, None]
            rows, columns = (
                axis_weights(
                    boxes[:, x_or_y] / stride,
                    boxes[:, x_or_y + 2] / stride,
                    features.shape[axis],
                    size,
                    sampling_ratio,
                    extents[level][axis],
                )
                for axis, x_or_y in ((0, 1), (1, 0))
            )
            rows = jnp.where(used, rows, 0)
            total = total + apply_weights("hwc", features, rows, columns)
        return total

    return map_chunks(align_chunk, (boxes, level_of_box, valid), chunk)


def axis_weights(
    start: jax.Array,
    stop: jax.Array,
    pixels: int,
    size: int,
    sampling_ratio: int = 0,
    extent: jax.Array | int | None = None,
) -> jax.Array:
    """Weight of each pixel of a line in each bin of each box.

    With sampling ratio 0 the samples of a bin wider than one pixel are more than half a pixel apart, so at most four of them are
    within one pixel of any given pixel. Only these are evaluated, six with a margin for rounding: the cost does not depend on
    the sizes of the boxes, and the result is exact for all sizes.

    Args:
      start: (K,), lower edges of the boxes along this axis, in continuous coordinates of the map.
      stop: (K,), upper edges.
      pixels: number of pixels of the line.
      size: P, number of bins.
      sampling_ratio: see ``roi_align``.
      extent: number of pixels without padding; may be traced. None if there is no padding.

    Returns:
      (K, P, pixels), of the dtype of ``start``, without gradient.
    """
    dtype = start.dtype
    last = jnp.asarray(pixels if extent is None else extent, dtype) - 1
    start, stop = ((x - 0.5).reshape(-1, 1, 1) for x in (start, stop))
    bin_side = (stop - start) / size
    bin_start = start + jnp.arange(size, dtype=dtype).reshape(1, -1, 1) * bin_side
    pixel = jnp.arange(pixels, dtype=dtype).reshape(1, 1, -1)
    if sampling_ratio:
        samples = jnp.full_like(bin_side, sampling_ratio)
        candidates, near = range(sampling_ratio), 0.0
    else:
        samples = jnp.ceil(bin_side)
        spacing = bin_side / jnp.maximum(samples, 1)
        # First sample of the bin at or after pixel - 1. Not needed for boxes with at most one sample per bin.
        near = jnp.ceil((pixel - 1 - bin_start) / jnp.where(samples > 1, spacing, 1) - 0.5) - 1
        near = jnp.where(samples > 1, near, 0)
        candidates = range(6)
    weights = jnp.zeros((), dtype)
    for candidate in candidates:
        index = near + candidate
        position = bin_start + (index + 0.5) * bin_side / jnp.maximum(samples, 1)
        counts = (index >= 0) & (index < samples) & (position >= -1) & (position <= last + 1)
        weight = jnp.maximum(0, 1 - jnp.abs(jnp.clip(position, 0, last) - pixel))
        weights = weights + jnp.where(counts, weight, 0)
    return lax.stop_gradient(weights / jnp.maximum(samples, 1))


def apply_weights(axes: str, features: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """Applies weights of rows (K, P, H) and columns (K, P, W) to features.

    Args:
      axes: letters of the axes of ``features``: h, w, and optionally k and c.
      features: the map, or one map per box.
      rows: (K, P, H).
      columns: (K, P, W).

    Returns:
      (K, P, P), or (K, P, P, C) if ``axes`` has c.
    """
    rows, columns = rows.astype(features.dtype), columns.astype(features.dtype)
    rest = axes.replace("k", "").replace("h", "").replace("w", "")
    lines = jnp.einsum(f"kph,{axes}->kpw{rest}", rows, features, precision=lax.Precision.HIGHEST)
    return jnp.einsum(f"kqw,kpw{rest}->kpq{rest}", columns, lines, precision=lax.Precision.HIGHEST)


def map_chunks(function, arguments, chunk: int):
    """Applies ``function`` to ``chunk`` rows of arrays at a time. The last chunk is padded with zeros, which are cut off again.

    Args:
      function: a function of a tree of arrays (chunk, ...), which returns an array (chunk, ...).
      arguments: a tree of arrays with the same leading axis.
      chunk: number of rows per call.
    """
    count = jax.tree.leaves(arguments)[0].shape[0]
    chunk = max(1, min(chunk, count))
    steps = -(-count // chunk)

    def split(x):
        x = jnp.pad(x, [(0, steps * chunk - count)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(steps, chunk, *x.shape[1:])

    out = lax.map(function, jax.tree.map(split, arguments))
    return out.reshape(steps * chunk, *out.shape[2:])[:count]
