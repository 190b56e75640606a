"""Deformable attention with the kernels of ``attention``."""

import jax
import jax.numpy as jnp

from dat_jax.ops.pallas import attention
from dat_jax.ops.pallas.biases import BatchedBias, NoBias, TableBias, shift_bits

MAX_MATRIX_BYTES = 12 * 2**20  # of the result of ``shift_columns``: it and its gradient are in VMEM, each twice


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
    return 4 * heads * (width + 1) * _lines(height) * width <= MAX_MATRIX_BYTES


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
