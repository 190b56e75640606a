"""Neighborhood attention: each pixel attends to the K x K window around it, shifted inward at the borders."""

import jax
import jax.numpy as jnp
import numpy as np

from dat_jax.ops import attention, dispatch, neighborhood_rows
from dat_jax.ops import neighborhood_tiles as tiles
from dat_jax.ops.pallas import neighborhood as pallas_neighborhood


def neighborhood_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    table: jax.Array,
    *,
    kernel_size: int,
    num_heads: int,
    implementation: str = "auto",
) -> jax.Array:
    """softmax(q k^T / sqrt(D) + table) v over the window of each query.

    The window of row i starts at clip(i - K // 2, 0, H - K), columns likewise: it never shrinks.

    Args:
      query, key, value: (B, H, W, C), heads consecutive in the channels.
      table: (M, 2K - 1, 2K - 1), read at key - query + K - 1.
      kernel_size: K, at most H and W.
      num_heads: M.
      implementation: "gather" reads K * K keys per query, the plain reference. "tiles" takes tiles of queries against
        the one halo of keys that holds all their windows: dense products with a static mask. "dense" is one tile.
        "rows" takes the tiles one row after the other. "pallas" is a kernel for TPUs.
        See ``dispatch``.

    Returns:
      (B, H, W, C), of the dtype of ``value``.

    Raises:
      ValueError: a side is smaller than the window, the shapes do not fit, or the implementation is unknown.

    Source: Neighborhood Attention Transformer (2204.07143), as DAT++ (2309.01430) uses it.
    """
    height, width = query.shape[1:3]
    if min(height, width) < kernel_size:
        raise ValueError(f"A window of {kernel_size} needs a map at least that large, got {height} x {width}.")
    if table.shape != (num_heads, 2 * kernel_size - 1, 2 * kernel_size - 1):
        side = 2 * kernel_size - 1
        raise ValueError(f"neighborhood_attention wants a table {(num_heads, side, side)}, got {table.shape}.")
    implementation = dispatch.choose("neighborhood_attention", implementation, map_shape=(height, width))
    if implementation == "gather":
        return _gathered(query, key, value, table, kernel_size, num_heads)
    if implementation == "pallas":
        return _by_kernel(query, key, value, table, kernel_size, num_heads)
    if implementation == "rows":
        return neighborhood_rows.neighborhood_attention(query, key, value, table, kernel_size, num_heads)
    dense = implementation == "dense"
    tile = (height, width) if dense else (tiles.tile_side(height), tiles.tile_side(width))
    return tiles.neighborhood_attention(
        query, key, value, table, kernel_size=kernel_size, num_heads=num_heads, tile=tile
    )


def _gathered(query, key, value, table, kernel_size, num_heads):
    (batch, height, width, channels), window = query.shape, kernel_size * kernel_size
    rows = tiles.window_starts(height, kernel_size)[:, None] + np.arange(kernel_size)
    columns = tiles.window_starts(width, kernel_size)[:, None] + np.arange(kernel_size)

    def neighbors(x):  # (B, H, W, C) -> (B, H, W, K * K, C)
        x = jnp.take(jnp.take(x, columns, axis=2), rows, axis=1)  # (B, H, K, W, K, C)
        return x.swapaxes(2, 3).reshape(batch, height, width, window, channels)

    row_index = rows - np.arange(height)[:, None] + kernel_size - 1
    column_index = columns - np.arange(width)[:, None] + kernel_size - 1
    bias = table[:, row_index[:, None, :, None], column_index[None, :, None, :]]  # (M, H, W, K, K)
    bias = jnp.moveaxis(bias.reshape(num_heads, height, width, window), 0, 2)[None, :, :, :, None]
    queries = query[:, :, :, None]  # one query attends to its own K * K keys
    out = attention.multi_head_attention(queries, neighbors(key), neighbors(value), num_heads=num_heads, bias=bias)
    return out.reshape(query.shape)


def _by_kernel(query, key, value, table, kernel_size, num_heads):
    height, width = query.shape[1:3]
    rows = pallas_neighborhood.choose_rows((height, width), kernel_size)
    return pallas_neighborhood.neighborhood_attention(
        # Where they were split from one projection the compiler takes that, in both directions.
        jnp.concatenate([query, key, value], axis=-1),
        table,
        row_tiles=tiles.tile_line(height, rows, kernel_size),
        column_tile=tiles.tile_line(width, width, kernel_size)[1][0],
        num_heads=num_heads,
    )
