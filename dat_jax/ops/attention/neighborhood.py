"""Neighborhood attention: each pixel attends to the K x K window around it, shifted inward at the borders."""

import jax
import jax.numpy as jnp
import numpy as np

from dat_jax.ops import dispatch
from dat_jax.ops.attention import multi_head as attention
from dat_jax.ops.attention import neighborhood_rows
from dat_jax.ops.attention import neighborhood_tiles as tiles
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


def neighborhood_attention_weights(
    query: jax.Array, key: jax.Array, table: jax.Array, *, kernel_size: int, num_heads: int
) -> jax.Array:
    """What ``neighborhood_attention`` weighs the values of a window with, to look at.

    Args:
      query, key, table, kernel_size, num_heads: as there.

    Returns:
      (B, M, H, W, K, K), float32 or better; a query's sum to 1. The first key is that of ``tiles.window_starts``.
    """
    height, width = query.shape[1:3]
    rows, columns = _window_lines((height, width), kernel_size)
    bias = _window_bias(table, rows, columns, kernel_size)
    keys = _gather_windows(key, rows, columns)
    weights = attention.attention_weights(query[:, :, :, None], keys, num_heads=num_heads, bias=bias)
    return jnp.moveaxis(weights[..., 0, :], 3, 1).reshape(-1, num_heads, height, width, kernel_size, kernel_size)


def _gathered(query, key, value, table, kernel_size, num_heads):
    rows, columns = _window_lines(query.shape[1:3], kernel_size)
    bias = _window_bias(table, rows, columns, kernel_size)
    key, value = (_gather_windows(x, rows, columns) for x in (key, value))
    queries = query[:, :, :, None]  # one query attends to its own K * K keys
    return attention.multi_head_attention(queries, key, value, num_heads=num_heads, bias=bias).reshape(query.shape)


def _window_lines(map_shape, kernel_size):
    """Rows and columns of the window of every row and column of queries: (H, K), (W, K)."""
    return tuple(tiles.window_starts(size, kernel_size)[:, None] + np.arange(kernel_size) for size in map_shape)


def _gather_windows(x, rows, columns):
    """(B, H, W, C) -> (B, H, W, K * K, C)."""
    (batch, height, width, channels), kernel_size = x.shape, rows.shape[1]
    x = jnp.take(jnp.take(x, columns, axis=2), rows, axis=1)  # (B, H, K, W, K, C)
    return x.swapaxes(2, 3).reshape(batch, height, width, kernel_size**2, channels)


def _window_bias(table, rows, columns, kernel_size):
    """(1, H, W, M, 1, K * K)."""
    row_index, column_index = (lines - np.arange(len(lines))[:, None] + kernel_size - 1 for lines in (rows, columns))
    bias = table[:, row_index[:, None, :, None], column_index[None, :, None, :]]  # (M, H, W, K, K)
    bias = bias.reshape(len(table), len(rows), len(columns), kernel_size**2)
    return jnp.moveaxis(bias, 0, 2)[None, :, :, :, None]


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
