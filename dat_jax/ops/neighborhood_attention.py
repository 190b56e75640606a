"""Neighborhood attention: each pixel attends to the K x K window around it, shifted inward at the borders."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from dat_jax.ops import attention, dispatch
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
        "pallas" is a kernel for TPUs.
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
    dense = implementation == "dense"
    tile = (height, width) if dense else (_tile_side(height), _tile_side(width))
    tiled = functools.partial(_tiled, kernel_size=kernel_size, num_heads=num_heads, tile=tile)
    # Tiles are cut out again in the backward pass: their halos hold every key three to four times.
    return jax.checkpoint(tiled, policy=attention.KEEP_RESULTS)(query, key, value, table)


def window_starts(size: int, kernel_size: int) -> np.ndarray:
    """(size,): first key of the window of each query along one axis."""
    return np.clip(np.arange(size) - kernel_size // 2, 0, size - kernel_size)


def _gathered(query, key, value, table, kernel_size, num_heads):
    (batch, height, width, channels), window = query.shape, kernel_size * kernel_size
    rows = window_starts(height, kernel_size)[:, None] + np.arange(kernel_size)
    columns = window_starts(width, kernel_size)[:, None] + np.arange(kernel_size)

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


def _tile_side(size: int) -> int:
    """7 or 8, whichever pads the side less; at most the side."""
    return min(size, min((7, 8), key=lambda tile: math.ceil(size / tile) * tile))


def _tile_line(size: int, tile: int, kernel_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Geometry of the tiles along one axis.

    Returns:
      (T,) first key of each tile's halo, and (T, tile, halo) index into the table's axis of each (query, key), -1 where
      the key is outside the query's window. Queries beyond the map take the window of the last one; they are dropped.
    """
    tiles, halo = math.ceil(size / tile), min(size, tile + kernel_size - 1)
    first_query = np.arange(tiles) * tile
    first_key = np.clip(first_query - kernel_size // 2, 0, size - halo)
    queries = np.minimum(first_query[:, None] + np.arange(tile), size - 1)[:, :, None]
    keys = (first_key[:, None] + np.arange(halo))[:, None, :]
    starts = window_starts(size, kernel_size)[queries]
    inside = (keys >= starts) & (keys < starts + kernel_size)
    return first_key, np.where(inside, keys - queries + kernel_size - 1, -1)


def _tiled(query, key, value, table, kernel_size, num_heads, tile):
    batch, height, width, channels = query.shape
    row_starts, row_index = _tile_line(height, tile[0], kernel_size)
    column_starts, column_index = _tile_line(width, tile[1], kernel_size)
    (tile_rows, _, halo_rows), (tile_columns, _, halo_columns) = row_index.shape, column_index.shape

    def rows_of_queries(x):  # (B, H, W, C) -> (tile rows, B, tile, tile columns * tile, C)
        padding = (tile_rows * tile[0] - height, tile_columns * tile[1] - width)
        x = jnp.pad(x, ((0, 0), (0, padding[0]), (0, padding[1]), (0, 0)))
        return jnp.moveaxis(x.reshape(batch, tile_rows, tile[0], *x.shape[2:]), 1, 0)

    def rows_of_keys(x):  # (B, H, W, C) -> (tile rows, B, halo, W, C)
        return jnp.stack([x[:, start : start + halo_rows] for start in row_starts])

    def attend_row(row):  # of tiles
        queries, keys, values, index = row
        queries = queries.reshape(batch, tile[0], tile_columns, tile[1], num_heads, -1).transpose(0, 2, 4, 1, 3, 5)

        def halos(x):  # (B, halo, W, C) -> (B, tile columns, M, keys, D)
            x = jnp.stack([x[:, :, start : start + halo_columns] for start in column_starts], axis=1)
            x = x.reshape(batch, tile_columns, halo_rows * halo_columns, num_heads, -1)
            return jnp.moveaxis(x, 3, 2)

        bias = _tile_bias(table, index[None], column_index)  # (1, tile columns, M, queries, keys)
        queries = queries.reshape(batch, tile_columns, num_heads, tile[0] * tile[1], -1)
        out = attention.attend(
            queries, halos(keys), halos(values), bias.astype(jnp.promote_types(table.dtype, "float32"))
        )
        out = out.reshape(batch, tile_columns, num_heads, *tile, -1).transpose(0, 3, 1, 4, 2, 5)
        return out.reshape(batch, tile[0], tile_columns * tile[1], channels)

    rows = (rows_of_queries(query), rows_of_keys(key), rows_of_keys(value), jnp.asarray(row_index))
    attend_row = jax.checkpoint(attend_row, policy=attention.KEEP_RESULTS)
    # One row after the other on CPU, where fresh memory is what costs: half a second a GiB.
    over_rows = (
        functools.partial(jax.lax.map, attend_row) if dispatch.target_platform() == "cpu" else jax.vmap(attend_row)
    )
    out = jnp.moveaxis(over_rows(rows), 0, 1)
    return out.reshape(batch, tile_rows * tile[0], tile_columns * tile[1], channels)[:, :height, :width]


def _by_kernel(query, key, value, table, kernel_size, num_heads):
    height, width = query.shape[1:3]
    rows = pallas_neighborhood.choose_rows((height, width), kernel_size)
    return pallas_neighborhood.neighborhood_attention(
        # Where they were split from one projection the compiler takes that, in both directions.
        jnp.concatenate([query, key, value], axis=-1),
        table,
        row_tiles=_tile_line(height, rows, kernel_size),
        column_tile=_tile_line(width, width, kernel_size)[1][0],
        num_heads=num_heads,
    )


def _tile_bias(table, row_index, column_index):
    """(tile rows, tile columns, M, queries, keys): the table's entries, -inf outside the windows.

    The lookup separates into rows and columns: two products with one-hot matrices, exact and without a scatter in the
    backward pass.
    """
    pixels = jnp.arange(table.shape[1])
    rows, columns = (
        (index[..., None] == pixels.reshape((1,) * index.ndim + (-1,))).astype(table.dtype)
        for index in (row_index, column_index)
    )
    highest = jax.lax.Precision.HIGHEST
    bias = jnp.einsum("aiku,muv->amikv", rows, table, precision=highest)
    bias = jnp.einsum("amikv,bjlv->abmijkl", bias, columns, precision=highest)
    inside_rows = (row_index >= 0)[:, None, None, :, None, :, None]
    inside_columns = (column_index >= 0)[None, :, None, None, :, None, :]
    bias = jnp.where(inside_rows & inside_columns, bias, -jnp.inf)
    tile_rows, tile_columns, heads, *pair = bias.shape
    return bias.reshape(tile_rows, tile_columns, heads, pair[0] * pair[1], pair[2] * pair[3])
