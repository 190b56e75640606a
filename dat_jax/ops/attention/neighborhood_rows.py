"""Neighborhood attention, one row of tiles after the other in both directions: for CPUs.

Each row works in the memory that the row before it used. Fresh memory is what costs on a CPU, half a second a GiB, and the
halos of all tiles hold every key three to four times.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from dat_jax.ops.attention import multi_head as attention
from dat_jax.ops.attention import neighborhood_tiles as tiles

# Small ones, so that a tile reads few keys that no query of it wants. Against 7 the gradient takes 0.86 of the time on
# 28 x 28 and 0.9 on 56 x 56; 2 x 7, 7 x 14 and 14 x 7 take more.
_TILE_SIDES = (4, 5)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def neighborhood_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, table: jax.Array, kernel_size: int, num_heads: int
) -> jax.Array:
    """As ``neighborhood_attention.neighborhood_attention``. For the backward pass it keeps its inputs and its output."""
    rows = _Rows(query.shape, kernel_size, num_heads)

    def attend_row(row, out):
        heads = rows.queries(queries, row), rows.keys(key, row), rows.keys(value, row)
        return rows.write(out, attention.attend(*heads, rows.bias(table, row)), row)

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
        found = attention.attend_backward(*heads, bias, rows.queries(outs, row), rows.queries(gradients, row))
        return (
            rows.write(to_query, found[0], row),
            rows.add_keys(to_key, found[1], row),
            rows.add_keys(to_value, found[2], row),
            to_table + bias_backward(found[3])[0],
        )

    zeros = (jnp.zeros_like(x) for x in (queries, key, value, table))
    to_query, to_key, to_value, to_table = lax.fori_loop(0, rows.count, add_row, tuple(zeros))
    return rows.crop(to_query), to_key, to_value, to_table


neighborhood_attention.defvjp(_forward, _backward)


class _Rows:
    """How the tiles of a row lie in maps (B, H, W, C). A row may be traced."""

    def __init__(self, shape, kernel_size, num_heads):
        self.batch, self.height, self.width, self.channels = shape
        self.num_heads = num_heads
        self.tile = tiles.tile_side(self.height, _TILE_SIDES), tiles.tile_side(self.width, _TILE_SIDES)
        self.starts, self.row_index = tiles.tile_line(self.height, self.tile[0], kernel_size)
        # Along a row the halos have equal steps, so that they are cut from a padded map by slices.
        first_keys, self.column_index = tiles.tile_line(self.width, self.tile[1], kernel_size, even=True)
        self.before = -first_keys[0]
        self.count, self.columns = len(self.row_index), len(self.column_index)

    def pad(self, x):
        """To whole tiles."""
        sizes = self.count * self.tile[0] - self.height, self.columns * self.tile[1] - self.width
        return jnp.pad(x, ((0, 0), (0, sizes[0]), (0, sizes[1]), (0, 0)))

    def crop(self, x):
        return x[:, : self.height, : self.width]

    def bias(self, table, row):
        """(1, tile columns, M, queries, keys)."""
        bias = tiles.tile_bias(table, jnp.asarray(self.row_index)[row][None], self.column_index)
        return bias.astype(jnp.promote_types(table.dtype, jnp.float32))

    def queries(self, x, row):
        """(B, tile columns, M, queries, D) of a padded map."""
        x = lax.dynamic_slice_in_dim(x, row * self.tile[0], self.tile[0], axis=1)
        x = x.reshape(self.batch, self.tile[0], self.columns, self.tile[1], self.num_heads, -1)
        return x.transpose(0, 2, 4, 1, 3, 5).reshape(self.batch, self.columns, self.num_heads, math.prod(self.tile), -1)

    def write(self, x, heads, row):
        """A padded map with the row that ``queries`` would read replaced."""
        heads = heads.reshape(self.batch, self.columns, self.num_heads, *self.tile, -1).transpose(0, 3, 1, 4, 2, 5)
        heads = heads.reshape(self.batch, self.tile[0], self.columns * self.tile[1], self.channels)
        return lax.dynamic_update_slice_in_dim(x, heads, row * self.tile[0], axis=1)

    def keys(self, x, row):
        """(B, tile columns, M, keys, D) of a map: the halos."""
        return self._halos(self._key_rows(x, row))

    def add_keys(self, x, heads, row):
        """A map with numbers of halos added where they were read."""
        old = self._key_rows(x, row)
        (rows,) = jax.linear_transpose(self._halos, old)(heads)
        return lax.dynamic_update_slice_in_dim(x, old + rows, jnp.asarray(self.starts)[row], axis=1)

    def _key_rows(self, x, row):
        return lax.dynamic_slice_in_dim(x, jnp.asarray(self.starts)[row], self.row_index.shape[2], axis=1)

    def _halos(self, x):
        tile, halo = self.tile[1], self.column_index.shape[2]
        parts = -(-halo // tile)  # of a halo, each one tile wide, the last one cut
        blocks = self.columns + parts - 1
        x = jnp.pad(x, ((0, 0), (0, 0), (self.before, blocks * tile - self.before - self.width), (0, 0)))
        x = x.reshape(self.batch, x.shape[1], blocks, tile, self.num_heads, -1).transpose(0, 2, 4, 1, 3, 5)
        x = jnp.concatenate(
            [x[:, part : part + self.columns, ..., : halo - part * tile, :] for part in range(parts)], axis=-2
        )
        return x.reshape(self.batch, self.columns, self.num_heads, -1, x.shape[-1])
