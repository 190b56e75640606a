"""Neighborhood attention by tiles of queries, each with the halo of keys that contains all its windows."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dat_jax.ops.attention.multi_head import KEEP_RESULTS, attend


def window_starts(side: int, kernel_size: int, *, size: int | jax.Array | None = None):
    """(side,): first key of each query's window, along one axis; with a traced ``size`` for a map that fills only this part.

    Queries beyond the size have the window of the last one.
    """
    if size is None:
        return np.clip(np.arange(side) - kernel_size // 2, 0, side - kernel_size)
    return jnp.clip(np.arange(side) - kernel_size // 2, 0, size - kernel_size)


def tile_side(size: int, choices: tuple[int, ...] = (7, 8)) -> int:
    """The choice with the least padding of a side of ``size`` pixels (the first of equals), at most ``size``."""
    return min(size, min(choices, key=lambda tile: math.ceil(size / tile) * tile))


def tile_line(size: int, tile: int, kernel_size: int, *, even: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Geometry of the tiles along one axis.

    Args:
      size: pixels of the map.
      tile: pixels of a tile.
      kernel_size: pixels of a window.
      even: whether the halos are at equal steps, of one tile; then the first and the last one reach beyond the map.

    Returns:
      (T,) first key of each tile's halo, and (T, tile, halo) index into the table's axis of each (query, key) pair, -1 where
      the key is outside the query's window. Queries beyond the map have the window of the last query; callers drop them.
    """
    first_query = np.arange(math.ceil(size / tile)) * tile
    queries = np.minimum(first_query[:, None] + np.arange(tile), size - 1)
    starts = window_starts(size, kernel_size)[queries]
    if even:
        before = (first_query - starts.min(axis=1)).max()
        halo = (starts.max(axis=1) + kernel_size - first_query).max() + before
        first_key = first_query - before
    else:
        halo = min(size, tile + kernel_size - 1)
        first_key = np.clip(first_query - kernel_size // 2, 0, size - halo)
    keys = (first_key[:, None] + np.arange(halo))[:, None, :]
    starts, queries = starts[:, :, None], queries[:, :, None]
    inside = (keys >= starts) & (keys < starts + kernel_size)
    return first_key, np.where(inside, keys - queries + kernel_size - 1, -1)


def sized_tile_line(side: int, tile: int, kernel_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Geometry of the tiles along one axis, for maps of any size up to ``side``; see ``tile_line`` for maps of one size.

    The halo of a tile holds the windows of its queries for every size. A window is shifted inward by up to half of it at the
    border of its map, so it begins at most K - 1 pixels before its query.

    Returns:
      (T,) first key of each tile's halo, which may lie before or reach beyond the map, and (T, tile, halo) index into the
      table's axis of each (query, key) pair, -1 for keys that are in no window of the query. ``sized_windows`` has the windows.
    """
    if tile >= side:
        first_query, first_key, halo = np.zeros(1, int), np.zeros(1, int), side
    else:
        first_query = np.arange(math.ceil(side / tile)) * tile
        first_key = first_query - (kernel_size - 1)
        halo = kernel_size - 1 + max(tile + kernel_size - 1 - kernel_size // 2, kernel_size)
    queries = first_query[:, None, None] + np.arange(tile)[:, None]
    index = first_key[:, None, None] + np.arange(halo) - queries + kernel_size - 1
    return first_key, np.where((index >= 0) & (index <= 2 * kernel_size - 2), index, -1)


def sized_windows(first_key: np.ndarray, index: np.ndarray, kernel_size: int, sizes: jax.Array) -> jax.Array:
    """(B, T, tile, halo): whether a key is in the window of a query, for each example. Queries beyond the size see all keys.

    Args:
      first_key: (T,), from ``sized_tile_line``.
      index: (T, tile, halo), from ``sized_tile_line``.
      kernel_size: K.
      sizes: (B,), the size of each example along this axis.
    """
    tile, halo = index.shape[1:]
    queries = (np.arange(len(first_key)) * tile)[:, None] + np.arange(tile)
    size = sizes.reshape(-1, 1, 1)
    starts = jnp.clip(queries[None] - kernel_size // 2, 0, size - kernel_size)[..., None]
    keys = (first_key[:, None] + np.arange(halo))[None, :, None]
    return (keys >= starts) & (keys < starts + kernel_size) | (queries[None] >= size)[..., None]


def tile_bias(table, row_index, column_index):
    """(tile rows, tile columns, M, queries, keys): the table's entries, -inf outside the windows.

    The lookup separates into rows and columns: two products with one-hot matrices, exact and without a scatter in the backward
    pass.

    Args:
      table: (M, 2K - 1, 2K - 1).
      row_index: (tile rows, tile height, halo height), from ``tile_line``.
      column_index: (tile columns, tile width, halo width), from ``tile_line``.
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


def neighborhood_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    table: jax.Array,
    *,
    kernel_size: int,
    num_heads: int,
    tile: tuple[int, int],
    sizes: jax.Array | None = None,
) -> jax.Array:
    """See ``neighborhood.neighborhood_attention``. Computes all tiles at once.

    The backward pass cuts the tiles out again: their halos hold every key three to four times.

    Args:
      query: (B, H, W, C), heads consecutive in the channels.
      key: (B, H, W, C).
      value: (B, H, W, C).
      table: (M, 2K - 1, 2K - 1).
      kernel_size: K.
      num_heads: M.
      tile: (height, width) of a tile.
      sizes: int (B, 2), the size of each example's map; None for (H, W).

    Returns:
      (B, H, W, C).
    """
    attend_tiles = functools.partial(
        _attend_tiles, kernel_size=kernel_size, num_heads=num_heads, tile=tile, sizes=sizes
    )
    return jax.checkpoint(attend_tiles, policy=KEEP_RESULTS)(query, key, value, table)


def _attend_tiles(query, key, value, table, kernel_size, num_heads, tile, sizes):
    batch, height, width, channels = query.shape
    make_line = tile_line if sizes is None else sized_tile_line
    row_starts, row_index = make_line(height, tile[0], kernel_size)
    column_starts, column_index = make_line(width, tile[1], kernel_size)
    (tile_rows, _, halo_rows), (tile_columns, _, halo_columns) = row_index.shape, column_index.shape
    row_windows = None
    column_windows: Any = None
    if sizes is not None:
        row_windows = jnp.moveaxis(sized_windows(row_starts, row_index, kernel_size, sizes[:, 0]), 1, 0)
        column_windows = sized_windows(column_starts, column_index, kernel_size, sizes[:, 1])
        key, value, row_starts, column_starts = _pad_halos(
            key, value, row_starts, column_starts, halo_rows, halo_columns
        )

    def rows_of_queries(x):  # (B, H, W, C) -> (tile rows, B, tile, tile columns * tile, C)
        padding = (tile_rows * tile[0] - height, tile_columns * tile[1] - width)
        x = jnp.pad(x, ((0, 0), (0, padding[0]), (0, padding[1]), (0, 0)))
        return jnp.moveaxis(x.reshape(batch, tile_rows, tile[0], *x.shape[2:]), 1, 0)

    def rows_of_keys(x):  # (B, H, W, C) -> (tile rows, B, halo, W, C)
        return jnp.stack([x[:, start : start + halo_rows] for start in row_starts])

    def attend_row(row):  # one row of tiles
        queries, keys, values, index, windows = row
        queries = queries.reshape(batch, tile[0], tile_columns, tile[1], num_heads, -1).transpose(0, 2, 4, 1, 3, 5)

        def halos(x):  # (B, halo, W, C) -> (B, tile columns, M, keys, D)
            x = jnp.stack([x[:, :, start : start + halo_columns] for start in column_starts], axis=1)
            x = x.reshape(batch, tile_columns, halo_rows * halo_columns, num_heads, -1)
            return jnp.moveaxis(x, 3, 2)

        bias = tile_bias(table, index[None], column_index)  # (1, tile columns, M, queries, keys)
        if windows is not None:
            pairs = windows[:, None, :, None, :, None] & column_windows[:, :, None, :, None, :]
            pairs = pairs.reshape(batch, tile_columns, 1, *bias.shape[-2:])
            bias = jnp.where(pairs, bias, -jnp.inf)
        queries = queries.reshape(batch, tile_columns, num_heads, tile[0] * tile[1], -1)
        out = attend(queries, halos(keys), halos(values), bias.astype(jnp.promote_types(table.dtype, "float32")))
        out = out.reshape(batch, tile_columns, num_heads, *tile, -1).transpose(0, 3, 1, 4, 2, 5)
        return out.reshape(batch, tile[0], tile_columns * tile[1], channels)

    rows = (rows_of_queries(query), rows_of_keys(key), rows_of_keys(value), jnp.asarray(row_index), row_windows)
    attend_row = jax.checkpoint(attend_row, policy=KEEP_RESULTS)
    out = jnp.moveaxis(jax.vmap(attend_row)(rows), 0, 1)
    return out.reshape(batch, tile_rows * tile[0], tile_columns * tile[1], channels)[:, :height, :width]


def _pad_halos(key, value, row_starts, column_starts, halo_rows, halo_columns):
    """Pads maps so that halos that lie partly outside of them can be cut out. Returns the maps and the new first keys."""
    lines = ((row_starts, halo_rows, key.shape[1]), (column_starts, halo_columns, key.shape[2]))
    padding = [(max(0, -int(starts[0])), max(0, int(starts[-1]) + halo - side)) for starts, halo, side in lines]
    key, value = (jnp.pad(x, ((0, 0), *padding, (0, 0))) for x in (key, value))
    return key, value, row_starts + padding[0][0], column_starts + padding[1][0]
