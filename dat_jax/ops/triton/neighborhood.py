"""Neighborhood attention for GPUs: tiles of queries, each with the rows of keys that its windows reach.

One program is one tile of 4 x 16 pixels of one head of one example:

* Forward and gradient of the query: the tile has queries. One after the other, it loads the rows of keys that the windows of its
  queries reach, in blocks that are wide enough for all of them, and masks the pairs that are in no window.
* Gradients of key and value: the tile has keys, and loads the rows of queries whose windows reach it.

Scores stay in registers. The softmax is computed in one pass, with a running maximum. The backward pass recomputes the weights
from the logarithms of their sums. No two programs write the same element: the gradient of the table is one small array per
program, and these arrays are summed afterward. So results do not depend on the order of the programs.

Source: FlashAttention (2205.14135), algorithms 1 and 4.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from dat_jax.ops.triton.call import (
    Result,
    block_side,
    channels,
    check,
    clamp,
    divide,
    dot,
    kernel_call,
    load,
    loop,
    store,
)

_ROWS, _COLUMNS = 4, 16  # of a tile
_LOWEST = -1e30  # first value of the running maximum; finite, so that a row without a pair in a window has no NaN


class Geometry(NamedTuple):
    """The static arguments of a call.

    Attributes:
      map_shape: (H, W).
      kernel_size: K.
      num_heads: M.
      width: D, channels per head.
    """

    map_shape: tuple[int, int]
    kernel_size: int
    num_heads: int
    width: int

    @property
    def scale(self) -> float:
        """Factor of the logits, 1 / sqrt(D)."""
        return 1 / math.sqrt(self.width)

    @property
    def tiles(self) -> int:
        """Number of tiles of a map."""
        return pl.cdiv(self.map_shape[0], _ROWS) * pl.cdiv(self.map_shape[1], _COLUMNS)


def neighborhood_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, table: jax.Array, *, kernel_size: int, num_heads: int
) -> jax.Array:
    """See ``ops.attention.neighborhood``.

    Args:
      query: (B, H, W, C).
      key: (B, H, W, C).
      value: (B, H, W, C).
      table: (M, 2K - 1, 2K - 1).
      kernel_size: K.
      num_heads: M.

    Returns:
      (B, H, W, C), of the dtype of ``value``.

    Raises:
      ValueError: see ``call.check``.
    """
    check(query, key, value)
    height, width, all_channels = query.shape[1:]
    geometry = Geometry((height, width), kernel_size, num_heads, all_channels // num_heads)
    dtype = jnp.result_type(query, key, value)
    arrays = [x.astype(dtype) for x in (query, key, value)]
    table = table.astype(jnp.promote_types(table.dtype, jnp.float32))
    out = _attention(geometry, *arrays, table)
    return out.astype(value.dtype)  # pyright: ignore[reportAttributeAccessIssue] (custom_vjp loses the type of the result)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(geometry, query, key, value, table):
    return _run_forward(geometry, query, key, value, table)[0]


def _attention_forward(geometry, query, key, value, table):
    out, sums = _run_forward(geometry, query, key, value, table)
    return out, (query, key, value, table, out, sums)


def _run_forward(geometry, query, key, value, table):
    return kernel_call(
        functools.partial(_forward_kernel, geometry),
        [(query, True), (key, True), (value, True), (table, False)],
        [Result(query.shape, query.dtype), _sums(geometry, query)],
        grid=(geometry.tiles, geometry.num_heads),
        name="neighborhood_attention_forward",
    )


def _sums(geometry, query):
    """One number for each query and head, (B, M, H, W)."""
    shape = (query.shape[0], geometry.num_heads, *geometry.map_shape)
    return Result(shape, jnp.promote_types(query.dtype, jnp.float32))


def _attention_backward(geometry, residuals, gradient):
    query, key, value, table, out, sums = residuals
    products = gradient.astype(sums.dtype) * out.astype(sums.dtype)
    products = products.reshape(*query.shape[:3], geometry.num_heads, -1).sum(axis=-1)
    projections = jnp.moveaxis(products, -1, 1)  # (B, M, H, W): the products of a query's gradient and result
    operands = [(query, True), (key, True), (value, True), (table, False)]
    operands += [(gradient, True), (sums, True), (projections, True)]
    side = block_side(table.shape[1])
    parts = (query.shape[0], geometry.num_heads, geometry.tiles, side, side)
    call = functools.partial(kernel_call, operands=operands, grid=(geometry.tiles, geometry.num_heads))
    to_query, to_table = call(
        functools.partial(_query_kernel, geometry),
        results=[Result(query.shape, query.dtype), Result(parts, sums.dtype)],
        name="neighborhood_attention_backward_query",
    )
    to_key, to_value = call(
        functools.partial(_key_kernel, geometry),
        results=[Result(key.shape, key.dtype), Result(value.shape, value.dtype)],
        name="neighborhood_attention_backward_key",
    )
    to_table = to_table.sum(axis=(0, 2))[:, : table.shape[1], : table.shape[2]]
    return to_query, to_key, to_value, to_table.astype(table.dtype)


_attention.defvjp(_attention_forward, _attention_backward)


class _Tile(NamedTuple):
    """The pixels of one head of one example that a program computes.

    Attributes:
      geometry: of the call.
      example: index of the example.
      head: index of the head.
      first_row: row of the first pixel.
      first_column: column of the first pixel.
      rows: row of each of the P pixels, int32 (P, 1). Pixels may be beyond the map, see ``inside``.
      columns: column of each pixel, int32 (P, 1).
    """

    geometry: Geometry
    example: jax.Array
    head: jax.Array
    first_row: jax.Array
    first_column: jax.Array
    rows: jax.Array
    columns: jax.Array

    @property
    def inside(self) -> jax.Array:
        """Whether each pixel is on the map, (P, 1)."""
        height, width = self.geometry.map_shape
        return (self.rows < height) & (self.columns < width)

    @property
    def index(self) -> tuple[jax.Array, ...]:
        """Index of the pixels in an array (B, M, H, W), beyond it for pixels that are not on the map."""
        return self.example, self.head, self.rows, self.columns


def _find_tile(geometry) -> _Tile:
    block, in_a_row = pl.program_id(0), pl.cdiv(geometry.map_shape[1], _COLUMNS)
    row_of_tiles, column_of_tiles = divide(block, in_a_row)
    first_row, first_column = row_of_tiles * _ROWS, column_of_tiles * _COLUMNS
    pixel = lax.broadcasted_iota(jnp.int32, (_ROWS * _COLUMNS, 1), 0)
    rows, columns = divide(pixel, _COLUMNS)
    rows, columns = first_row + rows, first_column + columns
    return _Tile(geometry, pl.program_id(2), pl.program_id(1), first_row, first_column, rows, columns)


def _first_reached(line, side, kernel_size):
    """First key of the window of a query, along one axis."""
    return lax.clamp(jnp.int32(0), line - kernel_size // 2, jnp.int32(side - kernel_size))


def _first_reaching(line, kernel_size):
    """First query whose window reaches a key, along one axis."""
    return jnp.where(line < kernel_size, 0, line - (kernel_size - 1) + kernel_size // 2)


def _count_reached(side, kernel_size):
    """Number of rows of keys that the windows of a tile's queries reach, at most."""
    return min(side, _ROWS + kernel_size - 1)


def _count_reaching(side, kernel_size):
    """Number of rows of queries whose windows reach a tile's keys, at most."""
    starts = np.clip(np.arange(side) - kernel_size // 2, 0, side - kernel_size)
    counts = [((starts < first + _ROWS) & (starts + kernel_size > first)).sum() for first in range(0, side, _ROWS)]
    return int(max(counts))


def _load_pixels(ref, tile, rows, columns):
    """Channels (P, D) of the tile's head and example, for pixels at rows and columns (P, 1)."""
    index, mask = channels(tile.head, tile.geometry.width)
    height, width = tile.geometry.map_shape
    rows, columns = clamp(rows, height), clamp(columns, width)
    mask = None if mask is None else jnp.broadcast_to(mask, (columns.shape[0], mask.shape[1]))
    return load(ref, (tile.example, rows, columns, index), mask)


def _store_tile(ref, tile, values):
    """Writes channels (P, D) of the tile's pixels that are on the map."""
    index, mask = channels(tile.head, tile.geometry.width)
    inside = jnp.broadcast_to(tile.inside, values.shape)
    example, _, rows, columns = tile.index
    store(ref, (example, rows, columns, index), values, inside if mask is None else inside & mask)


def _pair_bias(tile, table_ref, query_lines, key_lines):
    """The table's entry of each pair, -inf outside the window of the query.

    Args:
      tile: of the program.
      table_ref: (M, 2K - 1, 2K - 1).
      query_lines: (rows, columns) of the queries, arrays that broadcast with those of the keys.
      key_lines: (rows, columns) of the keys.
    """
    size = tile.geometry.kernel_size
    inside: Any = True
    entry = []
    for query, key, side in zip(query_lines, key_lines, tile.geometry.map_shape, strict=True):
        first = _first_reached(query, side, size)
        inside = inside & (query >= 0) & (query < side) & (key >= first) & (key < first + size)
        entry.append(clamp(key - query + size - 1, 2 * size - 1))
    bias = load(table_ref, (tile.head, *entry), inside)
    return jnp.where(inside, bias, -jnp.inf)


def _forward_kernel(geometry, q_ref, k_ref, v_ref, table_ref, out_ref, sums_ref):
    tile, size = _find_tile(geometry), geometry.kernel_size
    height = geometry.map_shape[0]
    count = _count_reached(height, size)
    query = _load_pixels(q_ref, tile, tile.rows, tile.columns)
    line = _line(tile, size)
    first = lax.clamp(jnp.int32(0), tile.first_row - size // 2, jnp.int32(height - count))

    def step(index, carry):
        maximum, total, result = carry
        key, value = (_load_pixels(ref, tile, first + index, line[:, None]) for ref in (k_ref, v_ref))
        bias = _pair_bias(tile, table_ref, (tile.rows, tile.columns), (first + index, line[None]))
        logits = dot(query, key, 1, 1) * geometry.scale + bias
        larger = jnp.maximum(maximum, logits.max(axis=1))
        weights = jnp.exp(logits - larger[:, None])
        shrink = jnp.exp(maximum - larger)
        result = result * shrink[:, None] + dot(weights.astype(value.dtype), value, 1, 0)
        return larger, total * shrink + weights.sum(axis=1), result

    dtype = sums_ref.dtype
    pixels = query.shape[0]
    start = jnp.full(pixels, _LOWEST, dtype), jnp.zeros(pixels, dtype), jnp.zeros(query.shape, dtype)
    maximum, total, result = loop(count, step, start)
    _store_tile(out_ref, tile, result / total[:, None])
    store(sums_ref, tile.index, (maximum + jnp.log(total))[:, None], tile.inside)


def _line(tile, kernel_size):
    """Columns of the keys that the windows of a tile's queries reach, and more, up to a power of two.

    At the border on the right the window of a query begins up to K - 1 pixels before it, elsewhere it begins K // 2 before.
    """
    reach = kernel_size - 1 + _COLUMNS + kernel_size // 2
    return tile.first_column - (kernel_size - 1) + lax.iota(jnp.int32, block_side(reach))


def _query_kernel(
    geometry, q_ref, k_ref, v_ref, table_ref, gradient_ref, sums_ref, projections_ref, to_query_ref, to_table_ref
):
    tile, size = _find_tile(geometry), geometry.kernel_size
    height = geometry.map_shape[0]
    count = _count_reached(height, size)
    query, gradient = (_load_pixels(ref, tile, tile.rows, tile.columns) for ref in (q_ref, gradient_ref))
    sums, projections = (load(ref, tile.index, tile.inside) for ref in (sums_ref, projections_ref))
    line = _line(tile, size)
    first = lax.clamp(jnp.int32(0), tile.first_row - size // 2, jnp.int32(height - count))

    def step(index, carry):
        to_query, to_table = carry
        key, value = (_load_pixels(ref, tile, first + index, line[:, None]) for ref in (k_ref, v_ref))
        bias = _pair_bias(tile, table_ref, (tile.rows, tile.columns), (first + index, line[None]))
        weights = jnp.exp(dot(query, key, 1, 1) * geometry.scale + bias - sums)
        to_logits = weights * (dot(gradient, value, 1, 1) - projections)
        to_query = to_query + dot((to_logits * geometry.scale).astype(key.dtype), key, 1, 0)
        return to_query, to_table + _sum_displacements(geometry, to_logits, first + index - tile.first_row)

    side, dtype = to_table_ref.shape[-1], sums_ref.dtype
    start = jnp.zeros(query.shape, dtype), jnp.zeros((side, side), dtype)
    to_query, to_table = loop(count, step, start)
    _store_tile(to_query_ref, tile, to_query)
    entry = lax.iota(jnp.int32, side)
    at = (tile.example, tile.head, pl.program_id(0), entry[:, None], entry[None])
    store(to_table_ref, at, to_table)


def _sum_displacements(geometry, to_logits, row):
    """Gradient of the table, in a square array: sums of the gradients of the logits over pairs with the same displacement.

    Args:
      geometry: of the call.
      to_logits: (P, L) for the pixels of a tile of queries and the columns of a row of keys.
      row: the row of keys, counted from the first row of the tile.
    """
    size = geometry.kernel_size
    side = block_side(2 * size - 1)
    shape = (_ROWS, _COLUMNS, to_logits.shape[1])
    grouped = to_logits.reshape(shape)
    # The line begins K - 1 columns before the tile, so that this is the column of the table.
    column = lax.broadcasted_iota(jnp.int32, shape, 2) - lax.broadcasted_iota(jnp.int32, shape, 1)
    entry = lax.broadcasted_iota(jnp.int32, (_ROWS, side), 1)
    lines = jnp.zeros((_ROWS, side), to_logits.dtype)
    for index in range(2 * size - 1):
        line = jnp.where(column == index, grouped, 0).sum(axis=2).sum(axis=1)
        lines = jnp.where(entry == index, line[:, None], lines)
    entry = lax.broadcasted_iota(jnp.int32, (_ROWS, side, side), 1)
    table_row = row - lax.broadcasted_iota(jnp.int32, (_ROWS, side, side), 0) + size - 1
    return jnp.where(entry == table_row, lines[:, None, :], 0).sum(axis=0)


def _key_kernel(
    geometry, q_ref, k_ref, v_ref, table_ref, gradient_ref, sums_ref, projections_ref, to_key_ref, to_value_ref
):
    tile, size = _find_tile(geometry), geometry.kernel_size
    height, width = geometry.map_shape
    count = _count_reaching(height, size)
    key, value = (_load_pixels(ref, tile, tile.rows, tile.columns) for ref in (k_ref, v_ref))
    # At the borders queries reach keys up to K - 1 columns away from them.
    line = tile.first_column - (size - 1) + lax.iota(jnp.int32, block_side(_COLUMNS + 2 * (size - 1)))
    first = jnp.minimum(_first_reaching(tile.first_row, size), height - count)

    def step(index, carry):
        to_key, to_value = carry
        row = first + index
        query, gradient = (_load_pixels(ref, tile, row, line[:, None]) for ref in (q_ref, gradient_ref))
        at = (tile.example, tile.head, row, clamp(line, width))
        sums, projections = load(sums_ref, at)[None], load(projections_ref, at)[None]
        bias = _pair_bias(tile, table_ref, (row, line[None]), (tile.rows, tile.columns))
        weights = jnp.exp(dot(key, query, 1, 1) * geometry.scale + bias - sums)
        to_value = to_value + dot(weights.astype(value.dtype), gradient, 1, 0)
        to_logits = weights * (dot(value, gradient, 1, 1) - projections)
        return to_key + dot((to_logits * geometry.scale).astype(key.dtype), query, 1, 0), to_value

    zeros = jnp.zeros(key.shape, sums_ref.dtype)
    to_key, to_value = loop(count, step, (zeros, zeros))
    _store_tile(to_key_ref, tile, to_key)
    _store_tile(to_value_ref, tile, to_value)
