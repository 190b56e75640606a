"""Deformable attention for GPUs: blocks of queries, with all sampled keys in blocks.

One program is one block of one head of one example:

* Forward and gradient of the query: 64 queries, which pass over all keys.
* Gradients of key and value: a block of keys, which passes over a range of the queries. There are few keys, so several programs
  share the queries of a block of keys, and their results are summed afterward.

Scores stay in registers. The softmax is computed in one pass, with a running maximum. The backward pass recomputes the weights
from the logarithms of their sums. No two programs write the same element, so results do not depend on their order.

The bias is an array, or is looked up in a table inside the kernels, four entries per pair. The backward pass writes its gradient
as an array in both cases. A third kernel computes the gradient of the table from that: an entry belongs to at most four queries
per key, whose gradients it loads. The gradient of the points is summed with those of the keys. For a table made for another map
size, or with another query grid, both follow by matrix products instead, see ``ops.attention.position_bias``.

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

from dat_jax.ops.attention.position_bias import Tile, table_fits, table_position_bias
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

_QUERIES = 64  # per block
_STEP = 32  # queries at a time, for a block of keys; with 64 a table needs more registers (N <= 64, D = 32)
_BORDER = 2  # rows and columns of zeros around a table
_ENTRIES = 256  # of a table, per block
_MAX_KEYS = 64  # per block
_LOWEST = -1e30  # first value of the running maximum; finite, so that a row without a finite logit has no NaN
_PROGRAMS = 1024  # that the backward pass aims at for the keys: several for each of the 132 multiprocessors of an H100


class TableBias(NamedTuple):
    """A bias that is looked up in a table, see ``ops.attention.position_bias``. The static arguments of the lookup.

    Attributes:
      map_shape: (H, W).
      tile_shape: (height, width) of the tile of queries.
      query_grid: "corners" or "centers".
      table_shape: (rows, columns).
      heads_per_group: M / G.
    """

    map_shape: tuple[int, int]
    tile_shape: tuple[int, int]
    query_grid: str
    table_shape: tuple[int, int]
    heads_per_group: int

    @property
    def fits(self) -> bool:
        """Whether one step between queries of the map is one row or column of the table."""
        return table_fits((1, *self.table_shape), map_shape=self.map_shape, query_grid=self.query_grid)

    def position(self, line: jax.Array, point: jax.Array, axis: int) -> jax.Array:
        """Row (axis 0) or column (axis 1) of the table, for queries on a line of the map and keys at a coordinate."""
        size, center = self.map_shape[axis], (self.table_shape[axis] - 1) // 2
        if self.query_grid == "centers":
            return (line + 0.5) * (center / size) - point + center
        return (line - point) * (center / (size - 1) if size > 1 else 1.0) + center


class Layout(NamedTuple):
    """The static arguments of a call.

    Attributes:
      queries: Q.
      keys: N.
      num_heads: M.
      width: D, channels per head.
      bias: "none"; "array" for an array (B, M, Q, N); "shared" for an array (1, M, Q, N); or a ``TableBias``.
    """

    queries: int
    keys: int
    num_heads: int
    width: int
    bias: str | TableBias

    @property
    def scale(self) -> float:
        """Factor of the logits, 1 / sqrt(D)."""
        return 1 / math.sqrt(self.width)

    @property
    def has_fitting_table(self) -> bool:
        """Whether the bias is looked up in a table that was made for this map size."""
        return isinstance(self.bias, TableBias) and self.bias.fits

    @property
    def key_block(self) -> int:
        """Number of keys per block."""
        return min(_MAX_KEYS, block_side(self.keys))

    @property
    def query_blocks(self) -> int:
        """Number of blocks of queries."""
        return pl.cdiv(self.queries, _QUERIES)

    @property
    def key_blocks(self) -> int:
        """Number of blocks of keys."""
        return pl.cdiv(self.keys, self.key_block)


def deformable_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    num_heads: int,
    bias: jax.Array | None = None,
    points: jax.Array | None = None,
    table: jax.Array | None = None,
    map_shape: tuple[int, int],
    tile: Tile,
    query_grid: str = "corners",
) -> jax.Array:
    """Attention of every pixel of a tile to the N sampled keys.

    Args:
      query: (B, h, w, C), the tile.
      key: (B, N, C).
      value: (B, N, C).
      num_heads: M.
      bias: (B | 1, M, h * w, N), or None for no bias; instead of it ``points`` and ``table``:
      points: (B, G, N, 2), see ``position_bias.table_position_bias``.
      table: (M, 2 * H0 - 1, 2 * W0 - 1).
      map_shape: (H, W) of the map.
      tile: the part of the map that ``query`` is.
      query_grid: see ``position_bias.table_position_bias``.

    Returns:
      (B, h, w, C), of the dtype of ``value``.

    Raises:
      ValueError: see ``call.check``.
    """
    check(query, key, value)
    shape, (batch, _, _, all_channels) = query.shape, query.shape
    kind: str | TableBias = "none"
    arrays: tuple[jax.Array, ...] = ()
    if table is not None and points is not None:
        dtype = jnp.promote_types(points.dtype, jnp.float32)
        arrays = (points.astype(dtype), table.astype(dtype), jnp.stack([jnp.int32(line) for line in tile.first]))
        sides, heads_per_group = (table.shape[1], table.shape[2]), num_heads // points.shape[1]
        kind = TableBias(map_shape, tile.shape, query_grid, sides, heads_per_group)
    elif bias is not None:
        kind = "array" if bias.shape[0] == batch else "shared"
        arrays = (bias.astype(jnp.promote_types(bias.dtype, jnp.float32)),)
    dtype = jnp.result_type(query, key, value)
    layout = Layout(math.prod(tile.shape), key.shape[1], num_heads, all_channels // num_heads, kind)
    query = query.reshape(batch, layout.queries, all_channels)
    out = _attention(layout, *(x.astype(dtype) for x in (query, key, value)), arrays)
    return out.reshape(shape).astype(value.dtype)  # pyright: ignore[reportAttributeAccessIssue] (custom_vjp loses the type)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(layout, query, key, value, bias_arrays):
    return _run_forward(layout, query, key, value, bias_arrays)[0]


def _attention_forward(layout, query, key, value, bias_arrays):
    out, sums = _run_forward(layout, query, key, value, bias_arrays)
    return out, (query, key, value, bias_arrays, out, sums)


def _operands(layout, query, key, value, bias_arrays):
    batched = {"none": (), "array": (True,), "shared": (False,)}.get(layout.bias, (True, False, False))
    if isinstance(layout.bias, TableBias):
        points, table, first = bias_arrays
        table = jnp.pad(table, ((0, 0), (_BORDER, _BORDER), (_BORDER, _BORDER)))
        bias_arrays = points, table.reshape(len(table), -1), first
    return [(query, True), (key, True), (value, True), *zip(bias_arrays, batched, strict=True)]


def _run_forward(layout, query, key, value, bias_arrays):
    sums = (query.shape[0], layout.num_heads, layout.queries)
    return kernel_call(
        functools.partial(_forward_kernel, layout),
        _operands(layout, query, key, value, bias_arrays),
        [Result(query.shape, query.dtype), Result(sums, jnp.promote_types(query.dtype, jnp.float32))],
        grid=(layout.query_blocks, layout.num_heads),
        name="deformable_attention_forward",
    )


def _attention_backward(layout, residuals, gradient):
    query, key, value, bias_arrays, out, sums = residuals
    batch, dtype = query.shape[0], sums.dtype
    products = gradient.astype(dtype) * out.astype(dtype)
    products = products.reshape(batch, layout.queries, layout.num_heads, -1).sum(axis=-1)
    projections = products.swapaxes(1, 2)  # (B, M, Q): the products of a query's gradient and result
    operands = _operands(layout, query, key, value, bias_arrays)
    operands += [(gradient, True), (sums, True), (projections, True)]
    pairs = (layout.keys, layout.queries) if layout.has_fitting_table else (layout.queries, layout.keys)
    to_query, *to_bias = kernel_call(
        functools.partial(_query_kernel, layout),
        operands,
        [Result(query.shape, query.dtype)]
        + [Result((batch, layout.num_heads, *pairs), dtype)] * (layout.bias != "none"),
        grid=(layout.query_blocks, layout.num_heads),
        name="deformable_attention_backward_query",
    )
    wanted = pl.cdiv(_PROGRAMS, batch * layout.num_heads * layout.key_blocks)
    parts = min(pl.cdiv(layout.queries, _STEP), wanted)
    part = Result((batch, parts, *key.shape[1:]), dtype)
    to_points = Result((batch, parts, layout.num_heads, layout.keys, 2), dtype)
    sums_of_parts = kernel_call(
        functools.partial(_key_kernel, layout, parts),
        operands,
        [part, part] + [to_points] * layout.has_fitting_table,
        grid=(layout.key_blocks * parts, layout.num_heads),
        name="deformable_attention_backward_key",
    )
    to_key, to_value, *to_points = (x.sum(axis=1) for x in sums_of_parts)
    to_bias_arrays = _differentiate_bias(layout, bias_arrays, *to_bias, *to_points)
    return to_query, to_key.astype(key.dtype), to_value.astype(value.dtype), to_bias_arrays


def _differentiate_bias(layout, bias_arrays, gradient: Any = None, to_points: Any = None):
    """Gradients of the arrays of a bias, from its gradient (B, M, Q, N), or (B, M, N, Q) for a table that fits.

    Then ``to_points`` is the gradient of the points, (B, M, N, 2), for each head.
    """
    bias = layout.bias
    if bias == "none":
        return ()
    if not isinstance(bias, TableBias):
        gradient = gradient.sum(axis=0, keepdims=True) if bias == "shared" else gradient
        return (gradient.astype(bias_arrays[0].dtype),)
    points, table, first = bias_arrays
    to_first = np.zeros(first.shape, jax.dtypes.float0)
    if to_points is not None:
        to_points = to_points.reshape(*points.shape[:2], -1, *points.shape[2:]).sum(axis=2)
        entries = math.prod(bias.table_shape)
        (to_table,) = kernel_call(
            functools.partial(_table_kernel, layout),
            [(points, True), (first, False), (gradient, True)],
            [Result((points.shape[0], layout.num_heads, entries), gradient.dtype)],
            grid=(pl.cdiv(entries, _ENTRIES), layout.num_heads),
            name="deformable_attention_backward_table",
        )
        to_table = to_table.sum(axis=0).reshape(table.shape)
        return to_points.astype(points.dtype), to_table.astype(table.dtype), to_first
    tile = Tile((first[0], first[1]), bias.tile_shape)

    def look_up(points, table):
        return table_position_bias(table, points, map_shape=bias.map_shape, tile=tile, query_grid=bias.query_grid)

    _, pull_back = jax.vjp(look_up, points, table)
    return *pull_back(gradient.astype(points.dtype)), to_first


_attention.defvjp(_attention_forward, _attention_backward)


class _Program(NamedTuple):
    """Which example and head a program computes, with the layout of the call."""

    layout: Layout
    example: jax.Array
    head: jax.Array


def _load_rows(ref, program, rows, count):
    """Channels (P, D) of the program's head and example, at rows (P, 1), zero beyond ``count`` rows."""
    index, mask = channels(program.head, program.layout.width)
    inside = jnp.broadcast_to(rows < count, (rows.shape[0], index.shape[1]))
    return load(ref, (program.example, clamp(rows, count), index), inside if mask is None else inside & mask)


def _store_rows(ref, program, rows, count, values, *leading):
    """Writes channels (P, D) of the program's head and example, at rows (P, 1) below ``count``."""
    index, mask = channels(program.head, program.layout.width)
    inside = jnp.broadcast_to(rows < count, values.shape)
    store(ref, (program.example, *leading, rows, index), values, inside if mask is None else inside & mask)


def _pair_bias(program, bias_refs, queries, keys):
    """Bias of each pair, and its derivatives (y, x) for the key's position if it has one.

    The indices ``queries`` and ``keys`` broadcast together. Pairs that do not exist have any bias.
    """
    layout = program.layout
    inside = (queries < layout.queries) & (keys < layout.keys)
    if layout.bias == "none":
        return 0.0, ()
    if isinstance(layout.bias, TableBias):
        return _look_up(program, bias_refs, queries, keys)
    example = program.example if layout.bias == "array" else jnp.zeros_like(program.example)
    index = (example, program.head, clamp(queries, layout.queries), clamp(keys, layout.keys))
    return load(bias_refs[0], index, inside), ()


def _look_up(program, bias_refs, queries, keys):
    """Bilinear samples of the table, which is zero outside, and their derivatives. Pairs that do not exist have any value.

    The table has a border of zeros, so that nothing is masked: a position far outside becomes one that has only zeros around it.
    """
    points_ref, table_ref, first_ref = bias_refs
    bias = program.layout.bias
    group, keys = divide(program.head, bias.heads_per_group)[0], clamp(keys, program.layout.keys)
    lines = divide(queries, bias.tile_shape[1])
    index, fractions = 0, []
    for axis in (0, 1):
        point = load(points_ref, (program.example, group, keys, jnp.full_like(keys, axis)))
        position = bias.position((lines[axis] + first_ref[axis]).astype(point.dtype), point, axis)
        lower = jnp.floor(position)
        fractions.append(position - lower)
        lower = jnp.clip(lower, -_BORDER, bias.table_shape[axis]).astype(jnp.int32) + _BORDER
        index = index * (bias.table_shape[1] + 2 * _BORDER) + lower
    width, (y, x) = bias.table_shape[1] + 2 * _BORDER, fractions
    head = jnp.full_like(index, program.head)
    entries = [[load(table_ref, (head, index + row + column)) for column in (0, 1)] for row in (0, width)]
    upper, lower = (left * (1 - x) + right * x for left, right in entries)
    slope_y = lower - upper
    slope_x = (entries[0][1] - entries[0][0]) * (1 - y) + (entries[1][1] - entries[1][0]) * y
    return upper * (1 - y) + lower * y, (-slope_y, -slope_x)


def _forward_kernel(layout, q_ref, k_ref, v_ref, *refs):
    *bias_refs, out_ref, sums_ref = refs
    program = _Program(layout, pl.program_id(2), pl.program_id(1))
    queries = pl.program_id(0) * _QUERIES + lax.broadcasted_iota(jnp.int32, (_QUERIES, 1), 0)
    query = _load_rows(q_ref, program, queries, layout.queries)

    def step(index, carry):
        maximum, total, result = carry
        keys = index * layout.key_block + lax.iota(jnp.int32, layout.key_block)
        key, value = (_load_rows(ref, program, keys[:, None], layout.keys) for ref in (k_ref, v_ref))
        bias, _ = _pair_bias(program, bias_refs, queries, keys[None])
        logits = dot(query, key, 1, 1) * layout.scale + bias
        logits = jnp.where(keys[None] < layout.keys, logits, -jnp.inf)
        larger = jnp.maximum(maximum, logits.max(axis=1))
        weights = jnp.exp(logits - larger[:, None])
        shrink = jnp.exp(maximum - larger)
        result = result * shrink[:, None] + dot(weights.astype(value.dtype), value, 1, 0)
        return larger, total * shrink + weights.sum(axis=1), result

    dtype = sums_ref.dtype
    start = jnp.full(_QUERIES, _LOWEST, dtype), jnp.zeros(_QUERIES, dtype), jnp.zeros(query.shape, dtype)
    maximum, total, result = loop(layout.key_blocks, step, start)
    _store_rows(out_ref, program, queries, layout.queries, result / total[:, None])
    sums = (maximum + jnp.log(total))[:, None]
    store(sums_ref, (program.example, program.head, queries), sums, queries < layout.queries)


def _load_sums(ref, program, queries):
    """One number for each query, zero for those that do not exist."""
    count = program.layout.queries
    return load(ref, (program.example, program.head, clamp(queries, count)), queries < count)


def _query_kernel(layout, q_ref, k_ref, v_ref, *refs):
    results = 1 if layout.bias == "none" else 2
    *bias_refs, gradient_ref, sums_ref, projections_ref = refs[:-results]
    to_query_ref, *to_bias_ref = refs[-results:]
    program = _Program(layout, pl.program_id(2), pl.program_id(1))
    queries = pl.program_id(0) * _QUERIES + lax.broadcasted_iota(jnp.int32, (_QUERIES, 1), 0)
    query, gradient = (_load_rows(ref, program, queries, layout.queries) for ref in (q_ref, gradient_ref))
    sums, projections = (_load_sums(ref, program, queries) for ref in (sums_ref, projections_ref))

    def step(index, to_query):
        keys = index * layout.key_block + lax.iota(jnp.int32, layout.key_block)
        key, value = (_load_rows(ref, program, keys[:, None], layout.keys) for ref in (k_ref, v_ref))
        bias, _ = _pair_bias(program, bias_refs, queries, keys[None])
        logits = dot(query, key, 1, 1) * layout.scale + bias
        inside = (queries < layout.queries) & (keys[None] < layout.keys)
        weights = jnp.where(inside, jnp.exp(logits - sums), 0)
        to_logits = weights * (dot(gradient, value, 1, 1) - projections)
        if to_bias_ref:
            pair = (keys[None], queries) if layout.has_fitting_table else (queries, keys[None])
            store(to_bias_ref[0], (program.example, program.head, *pair), to_logits, inside)
        return to_query + dot((to_logits * layout.scale).astype(key.dtype), key, 1, 0)

    to_query = loop(layout.key_blocks, step, jnp.zeros(query.shape, sums_ref.dtype))
    _store_rows(to_query_ref, program, queries, layout.queries, to_query)


def _key_kernel(layout, parts, q_ref, k_ref, v_ref, *refs):
    results = 3 if layout.has_fitting_table else 2
    *bias_refs, gradient_ref, sums_ref, projections_ref = refs[:-results]
    to_key_ref, to_value_ref, *to_points_ref = refs[-results:]
    program = _Program(layout, pl.program_id(2), pl.program_id(1))
    block, part = divide(pl.program_id(0), parts)
    keys = block * layout.key_block + lax.broadcasted_iota(jnp.int32, (layout.key_block, 1), 0)
    key, value = (_load_rows(ref, program, keys, layout.keys) for ref in (k_ref, v_ref))
    count = pl.cdiv(pl.cdiv(layout.queries, _STEP), parts)

    def step(index, carry):
        to_key, to_value, *to_points = carry
        queries = (part * count + index) * _STEP + lax.iota(jnp.int32, _STEP)
        query, gradient = (_load_rows(ref, program, queries[:, None], layout.queries) for ref in (q_ref, gradient_ref))
        sums, projections = (_load_sums(ref, program, queries[None]) for ref in (sums_ref, projections_ref))
        bias, slopes = _pair_bias(program, bias_refs, queries[None], keys)
        logits = dot(key, query, 1, 1) * layout.scale + bias
        inside = (queries[None] < layout.queries) & (keys < layout.keys)
        weights = jnp.where(inside, jnp.exp(logits - sums), 0)
        to_value = to_value + dot(weights.astype(value.dtype), gradient, 1, 0)
        to_logits = weights * (dot(value, gradient, 1, 1) - projections)
        to_key = to_key + dot((to_logits * layout.scale).astype(key.dtype), query, 1, 0)
        pairs = zip(to_points, slopes, strict=True) if to_points else ()
        return to_key, to_value, *(total + (to_logits * slope).sum(axis=1) for total, slope in pairs)

    zeros = jnp.zeros(key.shape, sums_ref.dtype)
    start = (zeros, zeros) + (jnp.zeros(layout.key_block, sums_ref.dtype),) * (2 * len(to_points_ref))
    to_key, to_value, *to_points = loop(count, step, start)
    _store_rows(to_key_ref, program, keys, layout.keys, to_key, part)
    _store_rows(to_value_ref, program, keys, layout.keys, to_value, part)
    for axis, total in enumerate(to_points):
        index = (program.example, part, program.head, keys, jnp.full_like(keys, axis))
        store(to_points_ref[0], index, total[:, None], keys < layout.keys)


def _table_kernel(layout, points_ref, first_ref, gradient_ref, to_table_ref):
    """Gradient of a block of entries of a table that fits, for one head and example."""
    bias, example, head = layout.bias, pl.program_id(2), pl.program_id(1)
    entry = pl.program_id(0) * _ENTRIES + lax.iota(jnp.int32, _ENTRIES)
    group = divide(head, bias.heads_per_group)[0]
    lines = divide(entry, bias.table_shape[1])
    firsts = first_ref[0], first_ref[1]

    def step(key, total):
        neighbors = []  # of each axis: query's line in the tile, whether it is there, and weight
        for axis in (0, 1):
            point = points_ref[example, group, key, axis]
            position = (
                lines[axis].astype(point.dtype) - (bias.map_shape[axis] - 1) + point - firsts[axis].astype(point.dtype)
            )
            lower = jnp.floor(position)
            fraction, last = position - lower, bias.tile_shape[axis] - 1
            there = [(line >= 0) & (line <= last) for line in (lower, lower + 1)]
            indices = [jnp.where(there[i], lower + i, 0).astype(jnp.int32) for i in (0, 1)]
            neighbors.append(list(zip(indices, there, (1 - fraction, fraction), strict=True)))
        for row, in_rows, row_weight in neighbors[0]:
            for column, in_columns, column_weight in neighbors[1]:
                index = (example, head, jnp.full_like(row, key), row * bias.tile_shape[1] + column)
                total = total + load(gradient_ref, index, in_rows & in_columns) * (row_weight * column_weight)
        return total

    total = loop(layout.keys, step, jnp.zeros(_ENTRIES, gradient_ref.dtype))
    index = (example, jnp.full_like(entry, head), entry)
    store(to_table_ref, index, total, entry < math.prod(bias.table_shape))
