"""Resizing of maps (B, H, W, C) as in the published heads: pixels are areas, corners are not aligned, no antialiasing.

Bilinear resizing and adaptive pooling are separable, so they are two products with small matrices, one for rows and one for
columns: no gather, and no scatter in the backward pass.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from dat_jax.ops.sizes import clear


def resize_bilinear(
    x: jax.Array, shape: tuple[int, ...], *, sizes: jax.Array | None = None, to: jax.Array | None = None
) -> jax.Array:
    """Resizes maps bilinearly, like PyTorch's ``interpolate`` (mode "bilinear", align_corners=False).

    Pixel i of the result is sampled at (i + 1/2) * old / new - 1/2 pixels, clipped to the map. By default
    ``jax.image.resize`` differs where the map shrinks: it antialiases.

    Args:
      x: (B, H, W, C).
      shape: (H', W').
      sizes: int (B, 2), the size of each example's map, see ``ops.sizes``; None for (H, W).
      to: int (B, 2), the size of each example's result, needed with ``sizes``.

    Returns:
      (B, H', W', C), of the dtype of ``x``.
    """
    if sizes is not None and to is not None:
        return _apply_sized_weights(clear(x, sizes), shape, sizes, to, _sized_bilinear_weights)
    if x.shape[1:3] == tuple(shape):
        return x
    rows, columns = (bilinear_weights(old, new) for old, new in zip(x.shape[1:3], shape, strict=True))
    return _apply_weights(x, rows, columns)


def bilinear_weights(old: int, new: int) -> np.ndarray:
    """(new, old) float64: the weight of each old pixel in each new pixel, along one axis."""
    center = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
    return np.maximum(0, 1 - np.abs(center[:, None] - np.arange(old)[None, :]))


def traced_bilinear_weights(old: int, new: jax.Array, *, count: int, dtype) -> jax.Array:
    """``bilinear_weights`` for a traced ``new`` of at most ``count``.

    Returns:
      (count, old), of the given dtype. Rows from ``new`` on are undefined.
    """
    center = jnp.clip((jnp.arange(count, dtype=dtype) + 0.5) * old / new.astype(dtype) - 0.5, 0, old - 1)
    return jnp.maximum(0, 1 - jnp.abs(center[:, None] - jnp.arange(old, dtype=dtype)[None, :]))


def _sized_bilinear_weights(old: jax.Array, new: jax.Array, *, pixels: int, count: int, dtype) -> jax.Array:
    """``bilinear_weights`` for traced sizes in lines of ``pixels`` and ``count``: (count, pixels)."""
    center = (jnp.arange(count, dtype=dtype) + 0.5) * old.astype(dtype) / new.astype(dtype) - 0.5
    center = jnp.clip(center, 0, old.astype(dtype) - 1)
    return jnp.maximum(0, 1 - jnp.abs(center[:, None] - jnp.arange(pixels, dtype=dtype)[None, :]))


def resize_nearest(
    x: jax.Array, shape: tuple[int, ...], *, sizes: jax.Array | None = None, to: jax.Array | None = None
) -> jax.Array:
    """Resizes maps like PyTorch's ``interpolate`` (mode "nearest"): new pixel i is old pixel floor(i * old / new).

    Args:
      x: (B, H, W, C).
      shape: (H', W').
      sizes: see ``resize_bilinear``.
      to: see ``resize_bilinear``.

    Returns:
      (B, H', W', C), of the dtype of ``x``.
    """
    if sizes is not None and to is not None:
        return _apply_sized_weights(clear(x, sizes), shape, sizes, to, _sized_nearest_weights)
    for axis, new in zip((1, 2), shape, strict=True):
        old = x.shape[axis]
        is_multiple = new % old == 0  # then no gather, and no scatter in the backward pass
        x = jnp.repeat(x, new // old, axis) if is_multiple else jnp.take(x, np.arange(new) * old // new, axis)
    return x


def _sized_nearest_weights(old: jax.Array, new: jax.Array, *, pixels: int, count: int, dtype) -> jax.Array:
    """One-hot rows (count, pixels) of the old pixel of each new pixel, for traced sizes."""
    index = jnp.arange(count) * old // new
    return (index[:, None] == jnp.arange(pixels)[None, :]).astype(dtype)


def adaptive_average_pool(x: jax.Array, side: int, *, sizes: jax.Array | None = None) -> jax.Array:
    """Averages maps over side x side bins, like PyTorch's ``adaptive_avg_pool2d``.

    Along each axis bin i is the mean from floor(i * old / side) to ceil((i + 1) * old / side).

    Args:
      x: (B, H, W, C).
      side: number of bins along each axis.
      sizes: int (B, 2), the size of each example's map, see ``ops.sizes``; None for (H, W).

    Returns:
      (B, side, side, C), of the dtype of ``x``.
    """
    if sizes is not None:
        to = jnp.full_like(sizes, side)
        return _apply_sized_weights(clear(x, sizes), (side, side), sizes, to, _sized_pooling_weights)
    rows, columns = (_pooling_weights(old, side) for old in x.shape[1:3])
    return _apply_weights(x, rows, columns)


def _pooling_weights(old: int, new: int) -> np.ndarray:
    start, stop = np.arange(new) * old // new, -(-(np.arange(new) + 1) * old // new)
    inside = (np.arange(old)[None, :] >= start[:, None]) & (np.arange(old)[None, :] < stop[:, None])
    return inside / inside.sum(axis=1, keepdims=True)


def _sized_pooling_weights(old: jax.Array, new: jax.Array, *, pixels: int, count: int, dtype) -> jax.Array:
    """``_pooling_weights`` for a traced size in a line of ``pixels``: (count, pixels)."""
    bins, line = jnp.arange(count), jnp.arange(pixels)[None, :]
    start, stop = bins * old // new, -(-(bins + 1) * old // new)
    inside = (line >= start[:, None]) & (line < stop[:, None])
    return inside.astype(dtype) / inside.sum(axis=1, keepdims=True).astype(dtype)


def _apply_sized_weights(x, shape, sizes, to, make_weights):
    """Applies weights that depend on the size of each example. They are computed in float32 or better."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    rows, columns = (
        jax.vmap(functools.partial(make_weights, pixels=x.shape[1 + axis], count=count, dtype=dtype))(
            sizes[:, axis], to[:, axis]
        ).astype(x.dtype)
        for axis, count in enumerate(shape)
    )
    x = jnp.einsum("byi,bijc->byjc", rows, x, precision=jax.lax.Precision.HIGHEST)
    return jnp.einsum("bxj,byjc->byxc", columns, x, precision=jax.lax.Precision.HIGHEST)


def _apply_weights(x, rows, columns):
    """Applies the rows first: the intermediate map has the old width. Precision is the highest, as logits stay float32 on TPU."""
    rows, columns = jnp.asarray(rows, x.dtype), jnp.asarray(columns, x.dtype)
    x = jnp.einsum("yi,bijc->byjc", rows, x, precision=jax.lax.Precision.HIGHEST)
    return jnp.einsum("xj,byjc->byxc", columns, x, precision=jax.lax.Precision.HIGHEST)
