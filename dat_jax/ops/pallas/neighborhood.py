"""Neighborhood attention of a small map with the kernels of ``attention``: spans of whole rows, with the rows of their windows.

``neighborhood_spans`` has the kernels for other maps.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dat_jax.ops.pallas import attention
from dat_jax.ops.pallas.biases import SharedBias
from dat_jax.ops.pallas.call import MAX_UNROLLED_PIXELS

_SPAN_COST = 16  # fixed cost of a head and span, in registers of 8 x 128 scores


def neighborhood_attention(
    packed: jax.Array, table: jax.Array, *, row_tiles, column_tile: np.ndarray, num_heads: int
) -> jax.Array:
    """See ``ops.attention.neighborhood``.

    Args:
      packed: (B, H, W, 3C), query, key and value side by side.
      table: (M, 2K - 1, 2K - 1).
      row_tiles: for the T tiles of R rows, ((T,) first row of keys, (T, R, halo) index into the table's rows, -1 outside the
        window); R divides H.
      column_tile: (W, W) index into the table's columns of each (query, key) pair, -1 outside the window.
      num_heads: M.

    Returns:
      (B, H, W, C).
    """
    batch, height, width, channels = packed.shape
    layout, bias = make_layout(table, width, row_tiles, column_tile, channels // 3, num_heads)
    out = attention.attention(layout, SharedBias(), (packed.reshape(batch, height * width, -1),), (bias,))
    return out.reshape(batch, height, width, channels // 3)


def fits(shape: tuple[int, ...], dtype, *, row_tiles, num_heads: int) -> bool:
    """Whether one example fits in VMEM, and its program, which has every span of the map, is not too long.

    Args:
      shape: (B, H, W, C), the shape of the query.
      dtype: of the query.
      row_tiles: see ``neighborhood_attention``.
      num_heads: M.
    """
    batch, height, width, channels = shape
    if height * width > MAX_UNROLLED_PIXELS:
        return False
    layout, kinds = _make_layout(width, channels, row_tiles, num_heads)
    span = layout.spans[0]
    bias = (len(kinds), num_heads, span.keys, span.queries)
    arrays = (jax.ShapeDtypeStruct((batch, height * width, 3 * channels), dtype),)
    biases = (jax.ShapeDtypeStruct(bias, jnp.promote_types(dtype, jnp.float32)),)
    return attention.fits(layout, SharedBias(), arrays, biases)


def make_layout(table, width, row_tiles, column_tile, channels, num_heads) -> tuple[attention.Layout, jax.Array]:
    """Layout of packed queries, keys and values, and the array of a ``SharedBias``."""
    layout, kinds = _make_layout(width, channels, row_tiles, num_heads)
    return layout, _span_bias(table, kinds, column_tile)


def _make_layout(width, channels, row_tiles, num_heads):
    """Layout of the kernels, and the different tiles of ``row_tiles``."""
    first_rows, row_index = row_tiles
    _, rows, halo = row_index.shape
    kinds, kind_of_tile = np.unique(row_index, axis=0, return_inverse=True)
    spans = tuple(
        attention.Span(tile * rows * width, rows * width, int(first) * width, halo * width, int(kind))
        for tile, (first, kind) in enumerate(zip(first_rows, kind_of_tile.reshape(-1), strict=True))
    )
    columns = (0, channels, 2 * channels)
    return attention.Layout(num_heads, channels, spans, columns, packed=True), kinds


def choose_rows(map_shape: tuple[int, int], kernel_size: int) -> int:
    """Rows of queries per span: the divisor of H with the lowest cost, counted in registers of scores plus a cost per span."""
    height, width = map_shape

    def cost(rows):
        halo = min(height, rows + kernel_size - 1)
        return height // rows * (math.ceil(halo * width / 8) * math.ceil(rows * width / 128) + _SPAN_COST)

    return min((rows for rows in range(1, height + 1) if height % rows == 0), key=cost)


def _span_bias(table, row_index, column_index):
    """(kinds, M, halo * W, R * W): entries of the table, -inf outside the windows, by products with one-hot matrices."""
    dtype = jnp.promote_types(table.dtype, jnp.float32)
    side = np.arange(table.shape[1])
    rows, columns = (jnp.asarray(index[..., None] == side, dtype) for index in (row_index, column_index))
    highest = lax.Precision.HIGHEST
    bias = jnp.einsum("tiku,muv->tmkiv", rows, table.astype(dtype), precision=highest)
    bias = jnp.einsum("tmkiv,jlv->tmklij", bias, columns, precision=highest)
    inside = (row_index >= 0).swapaxes(1, 2)[:, :, None, :, None] & (column_index >= 0).T[None, None, :, None, :]
    bias = jnp.where(inside[:, None], bias, -jnp.inf)
    kinds, heads, halo, width, rows_of_span, _ = bias.shape
    return bias.reshape(kinds, heads, halo * width, rows_of_span * width)
