"""Neighborhood attention of maps of any size: one grid step has some rows of the map, and tiles of columns inside them.

The grid is (batch, steps), and sequential. Step s reads block s of the rows, so every row is read once:

* Scratch memory holds three blocks. Each step moves them up by one block and appends the new one. The block in the middle has the
  queries; their windows reach into its neighbors.
* A block of queries is processed in tiles of columns, each with the halo of keys that contains all its windows.
* The bias of a pair depends on its displacement only, so one array serves all tiles. A mask, computed in the kernel, has the
  windows, which are shifted inward at the borders of the map.
* The backward pass adds the gradients of keys and values in three such blocks, in float32 or better, and writes a block once all
  queries that attend to it are done.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dat_jax.ops.pallas.attention import Layout, attend, attend_backward
from dat_jax.ops.pallas.call import ALIGNMENT, KernelCall, Result, Rows, round_up, stored_bytes

_TILE_COST = 48  # fixed cost of a head and tile, in registers of 8 x 128 scores
_MAX_ROWS = 32
_MAX_STEP_BYTES = 44 * 2**20  # a v5p has 64 MiB of VMEM


@dataclasses.dataclass(frozen=True)
class Tiling:
    """The static arguments of a call.

    Attributes:
      layout: heads and channels.
      map_shape: (H, W).
      kernel_size: K.
      rows: rows per block.
      columns: columns of queries per tile.
    """

    layout: Layout
    map_shape: tuple[int, int]
    kernel_size: int
    rows: int
    columns: int

    @property
    def blocks(self) -> int:
        """Blocks of rows."""
        return math.ceil(self.map_shape[0] / self.rows)

    @property
    def tiles(self) -> int:
        """Tiles of columns."""
        return math.ceil(self.map_shape[1] / self.columns)

    @property
    def row_halo(self) -> tuple[int, int]:
        """Rows of keys before and after a block of queries."""
        return _halo(self.map_shape[0], self.rows, self.kernel_size)

    @property
    def column_halo(self) -> tuple[int, int]:
        """Columns of keys before and after a tile of queries, in whole registers."""
        if self.tiles == 1:
            return 0, 0
        before, after = _halo(self.map_shape[1], self.columns, self.kernel_size)
        return round_up(before, ALIGNMENT), round_up(after, ALIGNMENT)

    @property
    def key_shape(self) -> tuple[int, int]:
        """Rows and columns of the keys of a tile."""
        return self.rows + sum(self.row_halo), self.columns + sum(self.column_halo)

    @property
    def pairs(self) -> int:
        """Query and key pairs of a tile."""
        return self.rows * self.columns * math.prod(self.key_shape)

    @property
    def width(self) -> int:
        """Columns of the blocks in scratch memory: those of the map, and zeros."""
        return self.tiles * self.columns + sum(self.column_halo)


@functools.lru_cache
def _halo(size: int, tile: int, kernel_size: int) -> tuple[int, int]:
    """Pixels of keys before and after a tile of queries, the most that any tile needs."""
    first = np.arange(0, size, tile)
    queries = np.minimum(first[:, None] + np.arange(tile), size - 1)
    starts = np.clip(queries - kernel_size // 2, 0, size - kernel_size)
    before = (first - starts.min(axis=1)).max()
    after = (starts.max(axis=1) + kernel_size - first - tile).max()
    return max(0, int(before)), max(0, int(after))


@functools.lru_cache
def choose_tiling(shape: tuple[int, ...], dtype: Any, *, kernel_size: int, num_heads: int) -> Tiling | None:
    """The tiling of the least work, counted in registers of scores, whose kernels fit in VMEM; None if there is none.

    Args:
      shape: (H, W, C), the shape of a query.
      dtype: of the query.
      kernel_size: K.
      num_heads: M.
    """
    height, width, channels = shape
    layout = Layout(num_heads, channels, ())
    packed = jax.ShapeDtypeStruct((1, height, width, 3 * channels), dtype)
    gradient = jax.ShapeDtypeStruct((1, *shape), dtype)

    def cost(tiling):
        keys = math.prod(tiling.key_shape)
        scores = math.ceil(keys / 8) * math.ceil(tiling.rows * tiling.columns / 128)
        work = num_heads * (scores + _TILE_COST) + math.ceil(keys / 8) * math.ceil(channels / 128)
        return work * tiling.blocks * tiling.tiles

    best, least = None, math.inf
    for rows in range(1, min(height, _MAX_ROWS) + 1):
        for columns in range(ALIGNMENT, round_up(width, ALIGNMENT) + 1, ALIGNMENT):
            tiling = Tiling(layout, (height, width), kernel_size, rows, columns)
            # The halo of a block must lie in the two blocks beside it.
            if cost(tiling) >= least or max(tiling.row_halo) > rows:
                continue
            if _call(tiling, packed, gradient).vmem_bytes <= _MAX_STEP_BYTES:
                best, least = tiling, cost(tiling)
    return best


def neighborhood_attention(packed: jax.Array, table: jax.Array, tiling: Tiling) -> jax.Array:
    """See ``ops.attention.neighborhood``.

    Args:
      packed: (B, H, W, 3C), query, key and value side by side.
      table: (M, 2K - 1, 2K - 1).
      tiling: from ``choose_tiling``.

    Returns:
      (B, H, W, C).
    """
    return _attention(tiling, packed, _tile_bias(table, tiling))


def _tile_bias(table, tiling):
    """(M, keys, queries) of a tile: entries of the table, any one for pairs that are in no window."""
    dtype = jnp.promote_types(table.dtype, jnp.float32)
    weights = []
    for queries, keys, before in zip(
        (tiling.rows, tiling.columns),
        tiling.key_shape,
        (tiling.row_halo[0], tiling.column_halo[0]),
        strict=True,
    ):
        displacement = np.arange(keys)[:, None] - before - np.arange(queries)
        index = np.clip(displacement + tiling.kernel_size - 1, 0, table.shape[1] - 1)
        weights.append(jnp.asarray(index[..., None] == np.arange(table.shape[1]), dtype))
    bias = jnp.einsum(
        "kiu,muv->mkiv", weights[0], table.astype(dtype), precision=lax.Precision.HIGHEST
    )  # one-hot products, exact and without a scatter in the backward pass
    bias = jnp.einsum("mkiv,ljv->mklij", bias, weights[1], precision=lax.Precision.HIGHEST)
    return bias.reshape(len(table), math.prod(tiling.key_shape), tiling.rows * tiling.columns)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(tiling, packed, bias):
    (out,) = _call(tiling, packed, None, bias).run()
    return out


def _attention_forward(tiling, packed, bias):
    return _attention(tiling, packed, bias), (packed, bias)


def _attention_backward(tiling, residuals, gradient):
    packed, bias = residuals
    return tuple(_call(tiling, packed, gradient, bias).run())


_attention.defvjp(_attention_forward, _attention_backward)


def _call(tiling: Tiling, packed, gradient=None, bias=None) -> KernelCall:
    """The forward kernel, or the backward kernel if there is a gradient."""
    layout, rows = tiling.layout, tiling.rows
    wide = jnp.promote_types(packed.dtype, jnp.float32)
    keys, queries = math.prod(tiling.key_shape), rows * tiling.columns
    if bias is None:
        bias = jax.ShapeDtypeStruct((layout.num_heads, keys, queries), wide)
    # Row and column of each key of a tile, and of each query, counted from the first key and the first query.
    key_lines = np.stack(np.unravel_index(np.arange(keys), tiling.key_shape), axis=1)
    query_lines = np.stack(np.unravel_index(np.arange(queries), (rows, tiling.columns)))
    operands = [
        (packed, Rows(rows)),
        (bias, False),
        *((np.asarray(lines, np.int32), False) for lines in (key_lines, query_lines)),
    ]
    window = ((3 * rows, tiling.width, 3 * layout.channels), packed.dtype)
    result = ((rows, tiling.tiles * tiling.columns, layout.channels), packed.dtype)
    if gradient is None:
        kernel, results, scratch = (
            _forward_kernel,
            [Result((*packed.shape[:3], layout.channels), packed.dtype, Rows(rows, 1))],
            [window, result],
        )
    else:
        operands.append((gradient, Rows(rows, 1)))
        kernel, results = _backward_kernel, [Result(packed.shape, packed.dtype, Rows(rows, 2))]
        results.append(Result(bias.shape, bias.dtype, False))
        sums = ((2, 3 * rows, tiling.width, layout.channels), wide)
        scratch = [window, result, result, sums]
    scores = stored_bytes((keys, queries), wide)
    copies = stored_bytes((max(keys, queries), layout.channels), wide)
    blocks = tiling.blocks * tiling.tiles * layout.num_heads
    products = 2 if gradient is None else 5
    return KernelCall(
        functools.partial(kernel, tiling),
        operands,
        results,
        flops=2 * products * layout.width * tiling.pairs * blocks,
        exponentials=tiling.pairs * blocks,
        work_bytes=5 * scores + 8 * copies + sum(stored_bytes(*array) for array in scratch),
        name="neighborhood_spans_" + ("forward" if gradient is None else "backward"),
        scratch=[pltpu.VMEM(shape, dtype) for shape, dtype in scratch],
        steps=tiling.blocks + (1 if gradient is None else 2),
    )


def _append_block(tiling: Tiling, packed_ref, window, step):
    """Moves the blocks in scratch memory up by one, and appends the block of this step."""
    rows, (height, width) = tiling.rows, tiling.map_shape

    @pl.when(step == 0)
    def _():
        window[...] = jnp.zeros_like(window)  # what is left of another example may be NaN

    @pl.when(step > 0)
    def _():
        window[: 2 * rows] = window[rows:]

    block = packed_ref[0]
    if height % rows:
        row = step * rows + lax.broadcasted_iota(jnp.int32, block.shape, 0)
        block = jnp.where(row < height, block, jnp.zeros_like(block))
    first = tiling.column_halo[0]
    window[2 * rows :, first : first + width] = block


def _window_mask(tiling: Tiling, key_lines, query_lines, first_row, first_column):
    """(keys, queries) of a tile: 0 if a key is in the window of a query, otherwise -inf."""
    inside: Any = True
    for axis, (first, before) in enumerate(((first_row, tiling.row_halo[0]), (first_column, tiling.column_halo[0]))):
        size, kernel_size = tiling.map_shape[axis], tiling.kernel_size
        query = jnp.minimum(first + query_lines[axis : axis + 1], size - 1)
        start = jnp.clip(query - kernel_size // 2, 0, size - kernel_size) - (first - before)
        key = key_lines[:, axis : axis + 1]
        near = (key >= start) & (key < start + kernel_size)
        inside = inside & near
    return jnp.where(inside, 0.0, -jnp.inf)


def _for_each_tile(tiling: Tiling, process):
    """Calls ``process(first column)`` for each tile of columns."""

    def step(tile, _):
        process(pl.multiple_of(tile * tiling.columns, ALIGNMENT))
        return 0

    lax.fori_loop(0, tiling.tiles, step, 0)


def _load_tile(tiling: Tiling, window, column):
    """Query transposed (C, Q), key and value (K, C), and where the keys are in the window: rows and columns."""
    rows, channels = tiling.rows, tiling.layout.channels
    key_rows = slice(rows - tiling.row_halo[0], 2 * rows + tiling.row_halo[1])
    key_columns = pl.ds(column, tiling.key_shape[1])
    first = pl.multiple_of(column + tiling.column_halo[0], ALIGNMENT)
    query = window[rows : 2 * rows, pl.ds(first, tiling.columns), :channels].reshape(-1, channels)
    key = window[key_rows, key_columns, channels : 2 * channels].reshape(-1, channels)
    value = window[key_rows, key_columns, 2 * channels :].reshape(-1, channels)
    return query.T, key, value, (key_rows, key_columns)


def _forward_kernel(tiling, packed_ref, bias_ref, key_lines, query_lines, out_ref, window, result):
    step, rows, layout = pl.program_id(1), tiling.rows, tiling.layout
    _append_block(tiling, packed_ref, window, step)

    @pl.when(step > 0)
    def _():
        def process(column):
            query_t, key, value, _ = _load_tile(tiling, window, column)
            mask = _window_mask(tiling, key_lines[...], query_lines[...], (step - 1) * rows, column)
            out = attend(layout, query_t, key, value, lambda head: bias_ref[head] + mask)
            result[:, pl.ds(column, tiling.columns)] = out.T.astype(result.dtype).reshape(rows, tiling.columns, -1)

        _for_each_tile(tiling, process)
        out_ref[0] = result[:, : tiling.map_shape[1]]


def _backward_kernel(tiling, packed_ref, bias_ref, key_lines, query_lines, gradient_ref, to_packed, to_bias, *scratch):
    window, gradient, to_query, sums = scratch
    step, rows, layout = pl.program_id(1), tiling.rows, tiling.layout
    height, width = tiling.map_shape
    channels, first = layout.channels, tiling.column_halo[0]
    _append_block(tiling, packed_ref, window, step)

    @pl.when((pl.program_id(0) == 0) & (step == 0))
    def _():
        to_bias[...] = jnp.zeros_like(to_bias)

    @pl.when(step == 0)
    def _():
        sums[...] = jnp.zeros_like(sums)
        gradient[...] = jnp.zeros_like(gradient)
        to_query[...] = jnp.zeros_like(to_query)

    @pl.when(step > 0)
    def _():
        sums[:, : 2 * rows] = sums[:, rows:]
        sums[:, 2 * rows :] = jnp.zeros_like(sums[:, 2 * rows :])

    to_packed[0, :, :, :channels] = to_query[:, :width]  # of the previous step, as the keys below

    @pl.when((step > 0) & (step <= tiling.blocks))
    def _():
        block = gradient_ref[0]
        if height % rows:
            row = (step - 1) * rows + lax.broadcasted_iota(jnp.int32, block.shape, 0)
            block = jnp.where(row < height, block, jnp.zeros_like(block))
        gradient[:, :width] = block

        def process(column):
            query_t, key, value, (key_rows, key_columns) = _load_tile(tiling, window, column)
            mask = _window_mask(tiling, key_lines[...], query_lines[...], (step - 1) * rows, column)
            at = pl.ds(column, tiling.columns)

            def add_gradient(head, to_logits):
                to_bias[head] += to_logits

            gradient_t = gradient[:, at].reshape(-1, channels).T
            gradients = attend_backward(
                layout, query_t, key, value, gradient_t, lambda head: bias_ref[head] + mask, add_gradient
            )
            to_query[:, at] = gradients[0].T.astype(to_query.dtype).reshape(rows, tiling.columns, channels)
            for index in (0, 1):
                to_keys = gradients[1 + index].T.reshape(*tiling.key_shape, channels)
                sums[index, key_rows, key_columns] += to_keys

        _for_each_tile(tiling, process)

    for index in (0, 1):
        at = slice((1 + index) * channels, (2 + index) * channels)
        to_packed[0, :, :, at] = sums[index, :rows, first : first + width].astype(to_packed.dtype)
