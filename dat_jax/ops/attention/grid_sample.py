"""Bilinear sampling of feature maps at real-valued positions.

THE COORDINATE CONVENTION of this project, stated once:

* A point is (y, x), in PIXELS of the map it samples. Pixel centers are integers: the first pixel of a row is at 0.0 and the
  last at size - 1 ("aligned corners").
* A position between centers blends its four neighbors linearly. A neighbor outside the map counts as zero.
* Normalized coordinates, where -1 and 1 are the centers of the first and the last pixel, appear only where a published formula
  is written in them; ``to_pixels`` converts them.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dat_jax.ops import dispatch
from dat_jax.ops.calls import tunable
from dat_jax.ops.pallas import sampling as pallas_sampling


def to_pixels(points: jax.Array, map_shape: tuple[int, int], sizes: jax.Array | None = None) -> jax.Array:
    """Converts normalized points to pixels of a map.

    Args:
      points: (..., 2), (y, x), with -1 and 1 at the centers of the first and last pixel; with ``sizes`` (B, ..., 2).
      map_shape: (height, width) of the map. On a side of one pixel every point is at its only center, 0.
      sizes: int (B, 2), the size of each example's map, see ``ops.sizes``; None for ``map_shape``.

    Returns:
      (..., 2) in pixels, of the dtype of ``points``.
    """
    if sizes is not None:
        extent = (sizes - 1).astype(points.dtype)
        return (points + 1) / 2 * extent.reshape(sizes.shape[0], *(1,) * (points.ndim - 2), 2)
    extent = jnp.asarray([size - 1 for size in map_shape], points.dtype)
    return (points + 1) / 2 * extent.reshape((1,) * (points.ndim - 1) + (2,))


def linear_weights(positions: jax.Array, size: int) -> jax.Array:
    """Weight of each pixel of a line at each position: the hat function max(0, 1 - |i - position|).

    It is written with floor and fraction, so that on a pixel center the derivative is the one to the right, as in a sampler
    that blends the pixels floor(p) and floor(p) + 1.

    Args:
      positions: (...,) in pixels.
      size: number of pixels of the line.

    Returns:
      (..., size): at most two nonzero weights per position; their sum is less than one outside the line.
    """
    lower = jnp.floor(positions)
    fraction = (positions - lower)[..., None]
    lower = lower[..., None]
    pixels = jnp.arange(size, dtype=positions.dtype).reshape((1,) * positions.ndim + (size,))
    zero = 0 * fraction  # NaN if the position is NaN, which must not look like a position outside the line
    return jnp.where(pixels == lower, 1 - fraction, zero) + jnp.where(pixels == lower + 1, fraction, zero)


@tunable("grid_sample", batched=("features", "points"))
def grid_sample(features: jax.Array, points: jax.Array, *, implementation: str = "auto") -> jax.Array:
    """Samples each group of channels bilinearly at its own points, zero outside the map.

    Args:
      features: (B, H, W, C) float. Channels are split into G consecutive groups of C / G.
      points: (B, G, N, 2) float, (y, x) in pixels, any real value. Converted to float32 or better.
      implementation: see ``dispatch``.

        * "gather" reads four neighbors per point.
        * "matmul" multiplies with a (N, H * W) matrix of hat weights, without a gather or a scatter in either direction.
        * "pallas" is a kernel for TPUs that does the same.
        * "map_coordinates" is ``jax.scipy.ndimage.map_coordinates`` with order 1, the plain reference.

    Returns:
      (B, N, C), of the dtype of ``features``.

    Raises:
      ValueError: C is not a multiple of G, or the implementation is unknown.

    Source: DAT (CVPR 2022), equation 7; sampling with aligned corners and zero padding as published.
    """
    batch, height, width, channels = features.shape
    groups = points.shape[1] if points.ndim == 4 else 0
    if not groups or points.shape[0] != batch or points.shape[3] != 2 or channels % groups:
        raise ValueError(
            f"grid_sample expected points (B, G, N, 2) with B = {batch} and G a divisor of {channels} channels, "
            f"got points of shape {points.shape}."
        )
    points = points.astype(jnp.promote_types(points.dtype, jnp.float32))
    kernel = functools.partial(fits_kernel, features.shape, features.dtype, points.shape)
    implementation = dispatch.choose("grid_sample", implementation, map_shape=(height, width), kernel_fits=kernel)
    if implementation == "pallas":
        return pallas_sampling.grid_sample(features, points)
    grouped = features.reshape(batch, height, width, groups, channels // groups)
    samplers = {"gather": _sample_gather, "matmul": _sample_matmul, "map_coordinates": _sample_map_coordinates}
    sampled = samplers[implementation](grouped, points)
    return sampled.reshape(batch, points.shape[2], channels).astype(features.dtype)


def fits_kernel(shape: tuple[int, ...], dtype: Any, points_shape: tuple[int, ...]) -> bool:
    """Whether the Pallas kernel can hold an example in VMEM, with the weights of all points.

    Args:
      shape: (B, H, W, C), the shape of the features.
      dtype: of the features.
      points_shape: (B, G, N, 2).
    """
    return pallas_sampling.fits(shape, dtype, groups=points_shape[1], keys=points_shape[2])


def _sample_gather(features: jax.Array, points: jax.Array) -> jax.Array:
    """(B, H, W, G, C), (B, G, N, 2) -> (B, N, G, C)."""
    batch, height, width, groups, channels = features.shape
    flat = features.reshape(batch, height * width, groups, channels)
    lower = jnp.floor(points)
    fraction = points - lower
    lower = lower.astype(jnp.int32)
    total = 0.0
    for dy in (0, 1):
        for dx in (0, 1):
            y, x = lower[..., 0] + dy, lower[..., 1] + dx
            weight_y = fraction[..., 0] if dy else 1 - fraction[..., 0]
            weight_x = fraction[..., 1] if dx else 1 - fraction[..., 1]
            inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
            weight = jnp.where(inside, weight_y * weight_x, 0)
            index = jnp.clip(y, 0, height - 1) * width + jnp.clip(x, 0, width - 1)
            corner = jnp.take_along_axis(flat, index.swapaxes(1, 2)[..., None], axis=1)
            total = total + corner * weight.swapaxes(1, 2)[..., None]
    return total


def _sample_matmul(features: jax.Array, points: jax.Array) -> jax.Array:
    batch, height, width, groups, channels = features.shape
    rows = linear_weights(points[..., 0], height)
    columns = linear_weights(points[..., 1], width)
    weights = (rows[..., :, None] * columns[..., None, :]).reshape(*points.shape[:3], height * width)
    flat = features.reshape(batch, height * width, groups, channels).astype(weights.dtype)
    return jnp.einsum("bgnp,bpgc->bngc", weights, flat, precision=lax.Precision.HIGHEST)


def _sample_map_coordinates(features: jax.Array, points: jax.Array) -> jax.Array:
    def sample_plane(plane, coordinates):  # (H, W), (N, 2) -> (N,)
        return jax.scipy.ndimage.map_coordinates(plane, [coordinates[:, 0], coordinates[:, 1]], order=1)

    over_channels = jax.vmap(sample_plane, in_axes=(2, None), out_axes=1)  # (H, W, C) -> (N, C)
    over_groups = jax.vmap(over_channels, in_axes=(2, 0), out_axes=1)
    return jax.vmap(over_groups)(features.astype(points.dtype), points)
