"""Position bias of one row of queries, from a table of any size, inside a kernel.

The query at row i and column j of a map samples the table at row s_y * i + a and column s_x * j + b. The steps s are constant,
and (a, b) is the offset of the key, see ``ops.attention.position_bias``. This is computed without a gather:

* Rows: all keys (N) have one row of the table each, a product of hat weights (N, T) with the table (T, lanes).
* Columns: the row of each key is shifted left by floor(b), in steps of 1, 2, 4, ... lanes, each for the keys whose shift has that
  bit. Then a query needs the same three neighboring columns for all keys, floor(s_x * j) and the next two. A product with a
  constant matrix, of ones and minus ones, gives the first of them and the two differences.
* This product is exact in three passes of the matrix unit: each number is split into three bfloat16 numbers, and the matrix is a
  bfloat16 matrix. A product of float32 matrices in full precision takes six passes.
* The position between these columns is g = s_x * j - floor(s_x * j) + b - floor(b), in [0, 2). The bias is
  first + min(g, 1) * difference1 + max(g - 1, 0) * difference2.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dat_jax.ops.pallas.call import dot, stored_bytes

_LANES = 128
_HALF_LANES = 64
_HIGHEST = lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class Lookup:
    """The static arguments of a lookup.

    Attributes:
      groups: G, groups of heads with the same keys.
      heads: M.
      table_shape: (T, U), rows and columns of the table.
      columns: W, columns of the map.
      row_step: rows of the table from one row of queries to the next.
      column_step: (numerator, denominator) of the columns of the table from one column of queries to the next.
      inside: whether all samples are in the table, up to rounding.
    """

    groups: int
    heads: int
    table_shape: tuple[int, int]
    columns: int
    row_step: float
    column_step: tuple[int, int]
    inside: bool

    @property
    def heads_per_group(self) -> int:
        """M / G."""
        return self.heads // self.groups

    @property
    def window(self) -> int:
        """Columns of the table that the queries of a row read."""
        return self._floors[-1] + 3

    @property
    def _floors(self) -> list[int]:
        numerator, denominator = self.column_step
        return [column * numerator // denominator for column in range(self.columns)]

    @property
    def first_columns(self) -> tuple[int, int]:
        """Smallest and largest first column of a window; beyond them it has no column of the table."""
        columns = self.table_shape[1]
        return (-1, (columns - 1) // 2) if self.inside else (-self.window, columns)

    @property
    def lanes(self) -> int:
        """Lanes of a head: zeros, the columns of the table, and zeros that the last window reads."""
        first, last = self.first_columns
        return math.ceil(max(self.table_shape[1] - first, last - first + self.window) / _LANES) * _LANES

    @property
    def padded_columns(self) -> int:
        """W in whole registers."""
        return math.ceil(self.columns / _LANES) * _LANES

    @property
    def matrix_rows(self) -> int:
        """Rows of the constant matrix: the columns of a window, in whole halves of registers."""
        return math.ceil(self.window / _HALF_LANES) * _HALF_LANES

    @property
    def shifts(self) -> list[int]:
        """Powers of two whose sums are the shifts of all keys, largest first."""
        first, last = self.first_columns
        return [2**bit for bit in reversed(range((last - first).bit_length()))]

    def pad_table(self, table: jax.Array) -> jax.Array:
        """(M, T, U) -> (G, T, M / G * lanes), the heads of a group side by side."""
        before = -self.first_columns[0]
        padded = jnp.pad(table, ((0, 0), (0, 0), (before, self.lanes - self.table_shape[1] - before)))
        grouped = padded.reshape(self.groups, self.heads_per_group, self.table_shape[0], self.lanes)
        return grouped.swapaxes(1, 2).reshape(self.groups, self.table_shape[0], -1)

    def constants(self, dtype) -> tuple[np.ndarray, np.ndarray]:
        """The constant matrix, and the fractions of the queries (1, W).

        The matrix is three copies, one below the other, of a matrix (matrix rows, 3 * padded columns). Its columns give first
        columns, differences to the next, and differences to the one after it.
        """
        numerator, denominator = self.column_step
        floors = np.asarray(self._floors)
        lane = np.arange(self.matrix_rows)[:, None]
        first, second, third = (np.zeros((self.matrix_rows, self.padded_columns)) for _ in range(3))
        for shift, one_hot in enumerate((first, second, third)):
            one_hot[:, : self.columns] = lane == floors + shift
        matrix = np.concatenate([first, second - first, third - second], axis=1)
        fractions = (np.arange(self.columns) * numerator - floors * denominator) / denominator
        matrix = np.tile(matrix, (3, 1)).astype(jnp.bfloat16 if dtype == jnp.float32 else dtype)
        return matrix, fractions[None].astype(dtype)

    def flops(self, keys: int) -> int:
        """FLOPs of a row of queries."""
        rows = self.table_shape[0] * self.lanes
        return 2 * keys * self.heads * (rows + 9 * self.matrix_rows * self.padded_columns)

    def work_bytes(self, keys: int, dtype: Any) -> int:
        """Memory for the lookup of a group, and its gradient."""
        arrays = (
            ((keys, 3 * self.padded_columns), 4),
            ((keys, self.columns), 4),
            ((keys, self.heads_per_group * self.lanes), 4),
            ((keys, self.table_shape[0]), 3),
        )
        return sum(count * stored_bytes(shape, dtype) for shape, count in arrays)


def _split(x):
    """Three arrays whose sum is x: bfloat16 numbers of a float32 array. Other arrays are followed by zeros."""
    if x.dtype != jnp.float32:
        return [x, jnp.zeros_like(x), jnp.zeros_like(x)]
    parts = []
    for _ in range(2):
        # Cleared bits instead of a conversion, which the compiler may leave out if another one follows.
        part = lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.int32) & ~0xFFFF, jnp.float32)
        parts.append(part.astype(jnp.bfloat16))
        x = x - part
    return [*parts, x.astype(jnp.bfloat16)]


def _precision(dtype):
    return None if dtype == jnp.bfloat16 else _HIGHEST


class RowOfQueries:
    """Bias of a row of queries, and its gradient; a new object for each row, inside a kernel.

    Args:
      lookup: the static arguments.
      refs: offsets (1, N, 2 * G), (a, b) group by group; the table (G, T, M / G * lanes); the constants.
      row: index of the row of queries.
    """

    def __init__(self, lookup: Lookup, refs, row):
        self._lookup, self._row = lookup, row
        self._offsets, self._table, self._matrix, self._fractions = refs
        self._groups: dict[int, Any] = {}
        self._parts: dict[int, Any] = {}
        self._to_lines: list[Any] = []

    def _offset(self, group, axis):
        at = 2 * group + axis
        return self._offsets[0, :, at : at + 1]  # (N, 1)

    def _row_weights(self, group):
        """Hat weights (N, T) of the rows of the table, and their derivatives."""
        offset = self._offset(group, 0)
        position = offset + self._row.astype(offset.dtype) * self._lookup.row_step
        lower = jnp.floor(position)
        fraction = position - lower
        row = lax.broadcasted_iota(jnp.int32, (offset.shape[0], self._lookup.table_shape[0]), 1).astype(offset.dtype)
        before, after = row == lower, row == lower + 1
        zero = 0 * fraction  # NaN if the position is NaN
        weights = jnp.where(before, 1 - fraction, zero) + jnp.where(after, fraction, zero)
        return weights, after.astype(offset.dtype) - before.astype(offset.dtype)

    def _shifts(self, group):
        """[(number of lanes, mask of the keys (N, 1))]."""
        first, last = self._lookup.first_columns
        rest = jnp.clip(jnp.floor(self._offset(group, 1)), first, last) - first
        shifts = []
        for lanes in self._lookup.shifts:
            is_shifted = rest >= lanes
            rest = jnp.where(is_shifted, rest - lanes, rest)
            shifts.append((lanes, is_shifted))
        return shifts

    def _positions(self, group):
        """g of every key and query, (N, W)."""
        offset = self._offset(group, 1)
        return self._fractions[...] + (offset - jnp.floor(offset))

    def _load_group(self, group):
        """Shifted rows of the table (N, M / G * lanes), and positions; computed once for all heads of the group."""
        if group not in self._groups:
            lines = dot(self._row_weights(group)[0], self._table[group], 1, 0, precision=_HIGHEST)
            for lanes, is_shifted in self._shifts(group):
                rolled = jnp.concatenate([lines[:, lanes:], lines[:, :lanes]], axis=1)
                lines = jnp.where(is_shifted, rolled, lines)
            self._groups = {group: (lines, self._positions(group))}
        return self._groups[group]

    def _load_parts(self, head):
        """First column and the two differences, (N, W) each, and positions; kept until another head is processed."""
        if head in self._parts:
            return self._parts[head]
        group, index = divmod(head, self._lookup.heads_per_group)
        lines, positions = self._load_group(group)
        first = index * self._lookup.lanes
        split = jnp.concatenate(_split(lines[:, first : first + self._lookup.matrix_rows]), axis=1)
        parts = dot(split, self._matrix[...], 1, 0, precision=_precision(split.dtype))
        padded = self._lookup.padded_columns
        parts = [parts[:, part * padded : part * padded + self._lookup.columns] for part in range(3)]
        self._parts = {head: (parts, positions)}
        return self._parts[head]

    def load(self, head: int):
        """Bias (N, W) of a head."""
        (first, difference1, difference2), position = self._load_parts(head)
        return first + jnp.minimum(position, 1) * difference1 + jnp.maximum(position - 1, 0) * difference2

    def add_gradient(self, results, head: int, gradient) -> None:
        """Adds the gradient (N, W) of a head to the references of the gradients of offsets and table.

        Heads must be processed in order. On a column of the table the derivative is the one to the right, as in the other
        implementations.
        """
        lookup, (to_offsets, to_table) = self._lookup, results
        group, index = divmod(head, lookup.heads_per_group)
        (_, difference1, difference2), position = self._load_parts(head)
        slope = jnp.where(position < 1, difference1, difference2)
        at = 2 * group
        to_offsets[0, :, at + 1 : at + 2] += (gradient * slope).sum(axis=1, keepdims=True)
        parts = (gradient, gradient * jnp.minimum(position, 1), gradient * jnp.maximum(position - 1, 0))
        padding = lookup.padded_columns - lookup.columns
        if padding:
            zeros = jnp.zeros((gradient.shape[0], padding), gradient.dtype)
            parts = [jnp.concatenate([part, zeros], axis=1) for part in parts]
        matrix = self._matrix[: lookup.matrix_rows]
        split = _split(jnp.concatenate(parts, axis=1))
        self._to_lines.append(
            sum(dot(x, matrix, 1, 1, precision=_precision(x.dtype)) for x in split)
        )  # (N, matrix rows)
        padding = lookup.lanes - lookup.matrix_rows
        if padding:
            self._to_lines.append(jnp.zeros((gradient.shape[0], padding), gradient.dtype))
        if index < lookup.heads_per_group - 1:
            return
        to_lines, self._to_lines = jnp.concatenate(self._to_lines, axis=1), []
        for lanes, is_shifted in reversed(self._shifts(group)):
            rolled = jnp.concatenate([to_lines[:, -lanes:], to_lines[:, :-lanes]], axis=1)
            to_lines = jnp.where(is_shifted, rolled, to_lines)
        weights, slopes = self._row_weights(group)
        to_table[group] += dot(weights, to_lines, 0, 0, precision=_HIGHEST)
        to_weights = dot(to_lines, self._table[group], 1, 1, precision=_HIGHEST)
        to_offsets[0, :, at : at + 1] += (to_weights * slopes).sum(axis=1, keepdims=True)


@functools.lru_cache
def make_lookup(
    table_shape: tuple[int, ...], *, groups: int, map_shape: tuple[int, int], query_grid: str, inside: bool
) -> Lookup:
    """The lookup in a table (M, 2 * H0 - 1, 2 * W0 - 1) for a map of (H, W); see ``ops.attention.position_bias``."""
    heads, *sides = table_shape
    steps = []
    for side, size in zip(sides, map_shape, strict=True):
        center, intervals = (side - 1) // 2, size if query_grid == "centers" else size - 1
        steps.append((center, intervals) if intervals else (1, 1))
    rows, columns = sides
    return Lookup(groups, heads, (rows, columns), map_shape[1], steps[0][0] / steps[0][1], steps[1], inside)


def table_offsets(points: jax.Array, lookup: Lookup, *, query_grid: str) -> jax.Array:
    """Points (B, G, N, 2) -> (B, N, 2 * G): row and column of the table for each key and the query at (0, 0)."""
    batch, groups, keys, _ = points.shape
    steps = np.asarray([lookup.row_step, lookup.column_step[0] / lookup.column_step[1]])
    centers = np.asarray([(side - 1) // 2 for side in lookup.table_shape])
    if query_grid == "centers":
        first, scale = centers + 0.5 * steps, np.ones(2)
    else:
        first, scale = centers, steps
    first, scale = (jnp.asarray(x.reshape(1, 1, 1, 2), points.dtype) for x in (first, scale))
    return (first - points * scale).swapaxes(1, 2).reshape(batch, keys, 2 * groups)
