"""Neighborhood attention: each pixel attends to the K x K window around it, shifted inward at the borders."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dat_jax.ops import dispatch
from dat_jax.ops.attention import neighborhood_tiles
from dat_jax.ops.attention.multi_head import attention_weights, multi_head_attention
from dat_jax.ops.attention.neighborhood_tiles import tile_line, tile_side, window_starts
from dat_jax.ops.calls import tunable
from dat_jax.ops.cpu import neighborhood_rows
from dat_jax.ops.pallas import neighborhood as pallas_neighborhood
from dat_jax.ops.pallas import neighborhood_spans
from dat_jax.ops.triton import neighborhood as triton_neighborhood


@tunable("neighborhood_attention", batched=("query", "key", "value", "sizes"))
def neighborhood_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    table: jax.Array,
    *,
    kernel_size: int,
    num_heads: int,
    sizes: jax.Array | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """softmax(q k^T / sqrt(D) + table) v over the window of each query.

    The window of the query at row i and column j starts at row clip(i - K // 2, 0, H - K) and column clip(j - K // 2, 0, W - K).
    At the borders it is shifted inward, so it always has K x K keys.

    Args:
      query: (B, H, W, C), heads consecutive in the channels.
      key: (B, H, W, C).
      value: (B, H, W, C).
      table: (M, 2K - 1, 2K - 1), read at key - query + K - 1.
      kernel_size: K, side of the window in pixels, at most H and W.
      num_heads: M.
      sizes: int (B, 2), the size of each example's map, at least K, see ``ops.sizes``; None for (H, W). "tiles" replaces
        "rows", and "auto" replaces "pallas" and "triton".
      implementation: see ``dispatch``.

        * "gather" reads K * K keys per query, the plain reference.
        * "tiles" multiplies tiles of queries with the halo of keys that contains all their windows: dense products with a
          static mask.
        * "dense" does so with the whole map as one tile.
        * "rows" does so for one row of tiles after the other (for CPUs).
        * "pallas" is a kernel for TPUs.
        * "triton" is a kernel for GPUs.

    Returns:
      (B, H, W, C), of the dtype of ``value``.

    Raises:
      ValueError: a side is smaller than the window, the shapes do not fit, or the implementation is unknown.

    Source: Neighborhood Attention Transformer (2204.07143), as DAT++ (2309.01430) uses it.
    """
    height, width = query.shape[1:3]
    if min(height, width) < kernel_size:
        raise ValueError(
            f"A window of {kernel_size} needs map sides of at least {kernel_size}, got {height} x {width}."
        )
    if table.shape != (num_heads, 2 * kernel_size - 1, 2 * kernel_size - 1):
        side = 2 * kernel_size - 1
        raise ValueError(f"neighborhood_attention expected a table {(num_heads, side, side)}, got {table.shape}.")
    requested = implementation
    if sizes is not None:
        implementation = {"pallas": "auto", "triton": "auto"}.get(implementation, implementation)
    kernel = functools.partial(fits_kernel, query.shape, query.dtype, kernel_size=kernel_size, num_heads=num_heads)
    implementation = dispatch.choose(
        "neighborhood_attention", implementation, map_shape=(height, width), kernel_fits=kernel
    )
    if implementation == "gather":
        with dispatch.gradients_for(requested):
            return _attend_gathered(query, key, value, table, kernel_size, num_heads, sizes)
    if implementation == "pallas":
        return _attend_with_pallas(query, key, value, table, kernel_size, num_heads)
    if implementation == "triton":
        return triton_neighborhood.neighborhood_attention(
            query, key, value, table, kernel_size=kernel_size, num_heads=num_heads
        )
    if implementation == "rows" and sizes is None:
        return neighborhood_rows.neighborhood_attention(query, key, value, table, kernel_size, num_heads)
    tile = (height, width) if implementation == "dense" else (tile_side(height), tile_side(width))
    return neighborhood_tiles.neighborhood_attention(
        query, key, value, table, kernel_size=kernel_size, num_heads=num_heads, tile=tile, sizes=sizes
    )


def neighborhood_attention_weights(
    query: jax.Array, key: jax.Array, table: jax.Array, *, kernel_size: int, num_heads: int
) -> jax.Array:
    """Attention weights of ``neighborhood_attention``, for visualization.

    Args:
      query: (B, H, W, C), heads consecutive in the channels.
      key: (B, H, W, C).
      table: (M, 2K - 1, 2K - 1).
      kernel_size: K.
      num_heads: M.

    Returns:
      (B, M, H, W, K, K), float32 or better; the weights of a query sum to 1. ``neighborhood_tiles.window_starts`` has the first
      row and column of each window.
    """
    height, width = query.shape[1:3]
    rows, columns = _window_lines((height, width), kernel_size)
    bias = _window_bias(table, rows, columns, kernel_size)
    keys = _gather_windows(key, rows, columns)
    weights = attention_weights(query[:, :, :, None], keys, num_heads=num_heads, bias=bias)
    return jnp.moveaxis(weights[..., 0, :], 3, 1).reshape(-1, num_heads, height, width, kernel_size, kernel_size)


def _attend_gathered(query, key, value, table, kernel_size, num_heads, sizes=None):
    if sizes is not None:
        attend_one = functools.partial(_attend_gathered_in, table=table, kernel_size=kernel_size, num_heads=num_heads)
        return jax.vmap(attend_one)(query, key, value, sizes)
    rows, columns = _window_lines(query.shape[1:3], kernel_size)
    bias = _window_bias(table, rows, columns, kernel_size)
    key, value = (_gather_windows(x, rows, columns) for x in (key, value))
    queries = query[:, :, :, None]  # the pixels are batch axes: one query attends to K * K keys
    return multi_head_attention(queries, key, value, num_heads=num_heads, bias=bias).reshape(query.shape)


def _attend_gathered_in(query, key, value, size, *, table, kernel_size, num_heads):
    """``_attend_gathered`` of one example (H, W, C), whose size (2,) is traced."""
    rows, columns = (
        window_starts(side, kernel_size, size=size[axis])[:, None] + np.arange(kernel_size)[None]
        for axis, side in enumerate(query.shape[:2])
    )
    bias = _window_bias(table, rows, columns, kernel_size)
    keys, values = (_gather_windows(x[None], rows, columns) for x in (key, value))
    queries = query[None, :, :, None]
    return multi_head_attention(queries, keys, values, num_heads=num_heads, bias=bias).reshape(query.shape)


def _window_lines(map_shape, kernel_size):
    """Rows and columns of the window of every row and column of queries: (H, K), (W, K)."""
    return tuple(window_starts(size, kernel_size)[:, None] + np.arange(kernel_size) for size in map_shape)


def _gather_windows(x, rows, columns):
    """(B, H, W, C) -> (B, H, W, K * K, C)."""
    (batch, height, width, channels), kernel_size = x.shape, rows.shape[1]
    x = jnp.take(jnp.take(x, columns, axis=2), rows, axis=1)  # (B, H, K, W, K, C)
    return x.swapaxes(2, 3).reshape(batch, height, width, kernel_size**2, channels)


def _window_bias(table, rows, columns, kernel_size):
    """(1, H, W, M, 1, K * K)."""
    row_index, column_index = (
        (lines - np.arange(len(lines))[:, None] + kernel_size - 1).clip(0, 2 * kernel_size - 2)
        for lines in (rows, columns)
    )  # queries beyond the size of an example are clipped; of others the index is in the table
    bias = table[:, row_index[:, None, :, None], column_index[None, :, None, :]]  # (M, H, W, K, K)
    bias = bias.reshape(len(table), len(rows), len(columns), kernel_size**2)
    return jnp.moveaxis(bias, 0, 2)[None, :, :, :, None]


def fits_kernel(shape: tuple[int, ...], dtype: Any, *, kernel_size: int, num_heads: int) -> bool:
    """Whether there is a Pallas kernel whose memory fits in VMEM.

    Args:
      shape: (B, H, W, C), the shape of the query.
      dtype: of the query.
      kernel_size: K.
      num_heads: M.
    """
    return _fits_whole(shape, dtype, kernel_size, num_heads) or (
        neighborhood_spans.choose_tiling(shape[1:], jnp.dtype(dtype), kernel_size=kernel_size, num_heads=num_heads)
        is not None
    )


def _fits_whole(shape, dtype, kernel_size, num_heads):
    row_tiles, _ = make_tiles(shape[1:3], kernel_size)
    return pallas_neighborhood.fits(shape, dtype, row_tiles=row_tiles, num_heads=num_heads)


def _attend_with_pallas(query, key, value, table, kernel_size, num_heads):
    # If they were split from one projection, the compiler uses that directly, in both directions.
    packed = jnp.concatenate([query, key, value], axis=-1)
    if not _fits_whole(query.shape, query.dtype, kernel_size, num_heads):
        tiling = neighborhood_spans.choose_tiling(
            query.shape[1:], query.dtype, kernel_size=kernel_size, num_heads=num_heads
        )
        assert tiling is not None  # ``fits_kernel``
        return neighborhood_spans.neighborhood_attention(packed, table, tiling)
    row_tiles, column_tile = make_tiles(query.shape[1:3], kernel_size)
    return pallas_neighborhood.neighborhood_attention(
        packed,
        table,
        row_tiles=row_tiles,
        column_tile=column_tile,
        num_heads=num_heads,
    )


def make_tiles(map_shape: tuple[int, ...], kernel_size: int):
    """Arguments "row_tiles" and "column_tile" of ``pallas.neighborhood.neighborhood_attention`` for a map of (H, W)."""
    height, width = map_shape
    rows = pallas_neighborhood.choose_rows((height, width), kernel_size)
    return tile_line(height, rows, kernel_size), tile_line(width, width, kernel_size)[1][0]
