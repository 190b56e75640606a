"""Neighborhood attention, one row of tiles after the other, in the forward and the backward pass.

Each row reuses the memory of the row before it. On a CPU fresh memory is expensive, half a second per GiB, and the halos of all
tiles hold every key three to four times.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from dat_jax.ops.attention.multi_head import attend, attend_backward
from dat_jax.ops.attention.neighborhood_tiles import tile_bias, tile_line, tile_side

# Small tiles read few keys that are outside all of their windows. Compared with 7, the gradient takes 0.86 of the time on
# 28 x 28 and 0.9 on 56 x 56; 2 x 7, 7 x 14 and 14 x 7 take longer.
_TILE_SIDES = (4, 5)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def neighborhood_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, table: jax.Array, kernel_size: int, num_heads: int
) -> jax.Array:
    """See ``ops.attention.neighborhood``. For the backward pass it keeps its inputs and its output.

    Args:
      query: (B, H, W, C), heads consecutive in the channels.
      key: (B, H, W, C).
      value: (B, H, W, C).
      table: (M, 2K - 1, 2K - 1).
      kernel_size: K.
      num_heads: M.

    Returns:
      (B, H, W, C).
    """
    rows = _Rows(query.shape, kernel_size, num_heads)

    def attend_row(row, out):
        heads = rows.queries(queries, row), rows.keys(key, row), rows.keys(value, row)
        return rows.write(out, attend(*heads, rows.bias(table, row)), row)

    queries = rows.pad(query)
    out = lax.fori_loop(0, rows.count, attend_row, jnp.zeros(queries.shape, value.dtype))
    return rows.crop(out)


def _forward(query, key, value, table, kernel_size, num_heads):
    out = neighborhood_attention(query, key, value, table, kernel_size, num_heads)
    return out, (query, key, value, table, out)


def _backward(kernel_size, num_heads, residuals, gradient):
    query, key, value, table, out = residuals
    rows = _Rows(query.shape, kernel_size, num_heads)
    queries, outs, gradients = (rows.pad(x) for x in (query, out, gradient))

    def add_row(row, sums):
        to_query, to_key, to_value, to_table = sums
        bias, bias_backward = jax.vjp(functools.partial(rows.bias, row=row), table)
        heads = rows.queries(queries, row), rows.keys(key, row), rows.keys(value, row)
        row_gradients = attend_backward(*heads, bias, rows.queries(outs, row), rows.queries(gradients, row))
        return (
            rows.write(to_query, row_gradients[0], row),
            rows.add_keys(to_key, row_gradients[1], row),
            rows.add_keys(to_value, row_gradients[2], row),
            to_table + bias_backward(row_gradients[3])[0],
        )

    zeros = (jnp.zeros_like(x) for x in (queries, key, value, table))
    to_query, to_key, to_value, to_table = lax.fori_loop(0, rows.count, add_row, tuple(zeros))
    return rows.crop(to_query), to_key, to_value, to_table


neighborhood_attention.defvjp(_forward, _backward)


class _Rows:
    """Access to the rows of tiles of maps (B, H, W, C). The index of a row may be traced."""

    def __init__(self, shape, kernel_size, num_heads):
        self.batch, self.height, self.width, self.channels = shape
        self.num_heads = num_heads
        self.tile = tile_side(self.height, _TILE_SIDES), tile_side(self.width, _TILE_SIDES)
        self.starts, self.row_index = tile_line(self.height, self.tile[0], kernel_size)
        # Along a row the halos are at equal steps, so that slices of a padded map cut them out.
        first_keys, self.column_index = tile_line(self.width, self.tile[1], kernel_size, even=True)
        self.before = -first_keys[0]
        self.count, self.columns = len(self.row_index), len(self.column_index)

    def pad(self, x):
        """Pads a map to whole tiles."""
        sizes = self.count * self.tile[0] - self.height, self.columns * self.tile[1] - self.width
        return jnp.pad(x, ((0, 0), (0, sizes[0]), (0, sizes[1]), (0, 0)))

    def crop(self, x):
        """Crops a padded map to its size."""
        return x[:, : self.height, : self.width]

    def bias(self, table, row):
        """Bias of a row: (1, tile columns, M, queries, keys)."""
        bias = tile_bias(table, jnp.asarray(self.row_index)[row][None], self.column_index)
        return bias.astype(jnp.promote_types(table.dtype, jnp.float32))

    def queries(self, x, row):
        """Queries of a row of a padded map: (B, tile columns, M, queries, D)."""
        x = lax.dynamic_slice_in_dim(x, row * self.tile[0], self.tile[0], axis=1)
        x = x.reshape(self.batch, self.tile[0], self.columns, self.tile[1], self.num_heads, -1)
        return x.transpose(0, 2, 4, 1, 3, 5).reshape(self.batch, self.columns, self.num_heads, math.prod(self.tile), -1)

    def write(self, x, heads, row):
        """Replaces the row of a padded map that ``queries`` reads."""
        heads = heads.reshape(self.batch, self.columns, self.num_heads, *self.tile, -1).transpose(0, 3, 1, 4, 2, 5)
        heads = heads.reshape(self.batch, self.tile[0], self.columns * self.tile[1], self.channels)
        return lax.dynamic_update_slice_in_dim(x, heads, row * self.tile[0], axis=1)

    def keys(self, x, row):
        """Keys of a row of a map, the halos of its tiles: (B, tile columns, M, keys, D)."""
        return self._halos(self._key_rows(x, row))

    def add_keys(self, x, heads, row):
        """Adds halos to a map where ``keys`` reads them: the transpose of ``keys``."""
        old = self._key_rows(x, row)
        (rows,) = jax.linear_transpose(self._halos, old)(heads)
        return lax.dynamic_update_slice_in_dim(x, old + rows, jnp.asarray(self.starts)[row], axis=1)

    def _key_rows(self, x, row):
        return lax.dynamic_slice_in_dim(x, jnp.asarray(self.starts)[row], self.row_index.shape[2], axis=1)

    def _halos(self, x):
        tile, halo = self.tile[1], self.column_index.shape[2]
        parts = -(-halo // tile)  # per halo, each one tile wide, the last one cropped
        blocks = self.columns + parts - 1
        x = jnp.pad(x, ((0, 0), (0, 0), (self.before, blocks * tile - self.before - self.width), (0, 0)))
        x = x.reshape(self.batch, x.shape[1], blocks, tile, self.num_heads, -1).transpose(0, 2, 4, 1, 3, 5)
        x = jnp.concatenate(
            [x[:, part : part + self.columns, ..., : halo - part * tile, :] for part in range(parts)], axis=-2
        )
        return x.reshape(self.batch, self.columns, self.num_heads, -1, x.shape[-1])
