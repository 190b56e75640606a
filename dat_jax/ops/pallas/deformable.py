"""Deformable attention of a small map with the kernels of ``attention``. ``deformable_rows`` has the kernels for other maps."""

from typing import Any

import jax
import jax.numpy as jnp

from dat_jax.ops.pallas import attention
from dat_jax.ops.pallas.biases import BatchedBias, NoBias, TableBias, shift_bits
from dat_jax.ops.pallas.call import MAX_UNROLLED_PIXELS

_MAX_MATRIX_BYTES = 12 * 2**20  # of the result of ``shift_columns``: it and its gradient are in VMEM, each twice


def deformable_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    num_heads: int,
    bias: jax.Array | None = None,
    points: jax.Array | None = None,
    table: jax.Array | None = None,
) -> jax.Array:
    """Attention of every pixel to the N sampled keys.

    Args:
      query: (B, H, W, C).
      key: (B, N, C).
      value: (B, N, C).
      num_heads: M.
      bias: (B, M, N, H * W), or None for no bias; instead of it ``points`` and ``table``:
      points: (B, G, N, 2), (y, x) in pixels, all inside the map.
      table: (M, 2 * H - 1, 2 * W - 1).

    Returns:
      (B, H, W, C).
    """
    batch, height, width, channels = query.shape
    layout = make_layout((height, width), key.shape[1], channels, num_heads)
    arrays = (query.reshape(batch, height * width, channels), key, value)
    if table is not None and points is not None:
        kind, bias_arrays = make_table_bias(points, table, (height, width))
    elif bias is not None:
        kind, bias_arrays = BatchedBias(), (bias,)
    else:
        kind, bias_arrays = NoBias(), ()
    return attention.attention(layout, kind, arrays, bias_arrays).reshape(query.shape)


def make_layout(map_shape, keys, channels, num_heads) -> attention.Layout:
    """Layout of separate queries, keys and values: every pixel attends to all keys."""
    return attention.Layout(num_heads, channels, (attention.Span(0, map_shape[0] * map_shape[1], 0, keys),))


def make_table_bias(points, table, map_shape) -> tuple[TableBias, tuple[jax.Array, jax.Array]]:
    """The bias that looks ``table`` up at ``points``, and its arrays. See ``deformable_attention``."""
    batch, groups = points.shape[:2]
    matrix = shift_columns(table.astype(points.dtype))
    flat = points.swapaxes(1, 2).reshape(batch, -1, 2 * groups)
    return TableBias(map_shape, table.shape[0] // groups), (flat, matrix)


def table_fits(table_shape: tuple[int, ...]) -> bool:
    """Whether the kernel itself can look up a table (M, 2 * H - 1, 2 * W - 1), for a map of H x W."""
    heads, rows, columns = table_shape
    height, width = (rows + 1) // 2, (columns + 1) // 2
    return 4 * heads * (width + 1) * _lines(height) * width <= _MAX_MATRIX_BYTES


def fits(
    shape: tuple[int, ...],
    dtype: Any,
    *,
    keys: int,
    num_heads: int,
    with_bias: bool = False,
    points_shape: tuple[int, ...] | None = None,
    table_shape: tuple[int, ...] | None = None,
) -> bool:
    """Whether one example fits in VMEM, and the map is small. The kernels have all queries of a map in one span.

    Args:
      shape: (B, H, W, C), the shape of the query.
      dtype: of the query.
      keys: N.
      num_heads: M.
      with_bias: whether there is a bias as an array.
      points_shape: (B, G, N, 2), for a table.
      table_shape: (M, 2 * H - 1, 2 * W - 1) if the kernel looks up the bias in a table, otherwise None.
    """
    batch, height, width, channels = shape
    pixels, wide = height * width, jnp.promote_types(dtype, jnp.float32)
    if pixels > MAX_UNROLLED_PIXELS:
        return False
    layout = make_layout((height, width), keys, channels, num_heads)
    kind, biases = NoBias(), ()
    if table_shape is not None and points_shape is not None:
        if not table_fits(table_shape):
            return False
        groups = points_shape[1]
        matrix = (num_heads, width + 1, _lines(height) * width)
        kind, biases = TableBias((height, width), num_heads // groups), ((batch, keys, 2 * groups), matrix)
    elif with_bias:
        kind, biases = BatchedBias(), ((batch, num_heads, keys, pixels),)
    arrays = [jax.ShapeDtypeStruct((batch, count, channels), dtype) for count in (pixels, keys, keys)]
    return attention.fits(layout, kind, tuple(arrays), tuple(jax.ShapeDtypeStruct(s, wide) for s in biases))


def _lines(height):
    """Rows along the lanes: those of the table, and those after them that the largest shift reads."""
    return height + 2 ** shift_bits(height)


def shift_columns(table: jax.Array) -> jax.Array:
    """For a key on each column of the map, and on one more to the left, the columns of the table for all queries.

    Rows and columns share one axis, along the lanes: with 14 columns alone there, a tile would be almost empty.

    Args:
      table: (M, 2 * H - 1, 2 * W - 1).

    Returns:
      (M, W + 1, L): [m, x + 1, (r, j)] = table[m, r, j - x + W - 1], zero outside the table.
    """
    heads, rows, columns = table.shape
    height, width = (rows + 1) // 2, (columns + 1) // 2
    padded = jnp.pad(table, ((0, 0), (0, _lines(height) - rows), (0, 1)))
    shifted = jnp.stack([padded[..., width - x : 2 * width - x] for x in range(width + 1)], axis=1)
    return shifted.reshape(heads, width + 1, -1)
