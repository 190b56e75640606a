"""What the kernels of ``attention`` add to the logits, and how its gradient leaves them.

A kind of bias says which arrays a kernel reads for it (``operands``), how the bias (keys, queries) of a span and head is
got from them (``load``), which arrays its gradient makes (``results``) and how they are begun and added to (``start``,
``add_gradient``). ``flops`` are those of loading it for all heads of an example.
"""

import dataclasses
import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from dat_jax.ops.pallas.call import Result, dot


@dataclasses.dataclass(frozen=True)
class SharedBias:
    """An array (kinds, M, keys of a span, queries of a span), the same for every example."""

    def operands(self, bias):
        """(array, whether its first axis is the batch) of each."""
        return [(bias, False)]

    def flops(self, operands):
        """Of loading it for all heads of an example."""
        return 0

    def load(self, refs, span, head):
        """(keys, queries) of a span and head."""
        return refs[0][span.bias, head]

    def results(self, operands):
        """Of the gradient."""
        return [Result(operands[0][0].shape, operands[0][0].dtype, batched=False)]

    def start(self, refs):
        """Before the first span of an example."""

        @pl.when(pl.program_id(0) == 0)
        def _():
            refs[0][...] = jnp.zeros_like(refs[0])

    def add_gradient(self, refs, results, span, head, gradient):
        """``gradient`` is (keys, queries)."""
        results[0][span.bias, head] += gradient


@dataclasses.dataclass(frozen=True)
class BatchedBias:
    """An array (B, M, keys, queries); there is one span."""

    def operands(self, bias):
        """(array, whether its first axis is the batch) of each."""
        return [(bias, True)]

    def flops(self, operands):
        """Of loading it for all heads of an example."""
        return 0

    def load(self, refs, span, head):
        """(keys, queries) of a span and head."""
        return refs[0][0, head]

    def results(self, operands):
        """Of the gradient."""
        return [Result(operands[0][0].shape, operands[0][0].dtype, batched=True)]

    def start(self, refs):
        """Before the first span of an example."""

    def add_gradient(self, refs, results, span, head, gradient):
        """``gradient`` is (keys, queries)."""
        results[0][0, head] = gradient


@dataclasses.dataclass(frozen=True)
class NoBias:
    """None."""

    def operands(self):
        """(array, whether its first axis is the batch) of each."""
        return []

    def flops(self, operands):
        """Of loading it for all heads of an example."""
        return 0

    def load(self, refs, span, head):
        """(keys, queries) of a span and head."""
        return 0.0

    def results(self, operands):
        """Of the gradient."""
        return []

    def start(self, refs):
        """Before the first span of an example."""

    def add_gradient(self, refs, results, span, head, gradient):
        """``gradient`` is (keys, queries)."""


@dataclasses.dataclass(frozen=True)
class TableBias:
    """Bilinear samples of a table of relative displacements, for keys inside the map.

    A key at column x blends two columns of shifts of the table: a product of hat weights with ``matrix``, (M, W + 1, L), see
    ``deformable.shift_columns``; its lanes are rows of W, one for each row of the table. A key at row y takes H of these, from
    the row that y says, blended with the next. Each key (a sublane) has its own: the lanes are moved by 1, 2, 4, ... rows,
    in each step those of the keys whose number has that bit.

    ``points`` is (B, N, 2 * G), (y, x) of group after group, in pixels, 0 <= y <= H - 1 and 0 <= x <= W - 1. On a pixel the
    derivative is that to the left, which is to the right in the table, as elsewhere.
    """

    map_shape: tuple[int, int]
    heads_per_group: int

    def operands(self, points, matrix):
        """(array, whether its first axis is the batch) of each."""
        return [(points, True), (matrix, False)]

    def flops(self, operands):
        """Of loading it for all heads of an example."""
        return 2 * operands[0][0].shape[1] * math.prod(operands[1][0].shape)

    def _position(self, ref, head, axis):
        at = 2 * (head // self.heads_per_group) + axis
        return ref[0, :, at : at + 1]  # (N, 1)

    def _rows(self, refs, head):
        """For each key: how many rows its lanes move as numbers (N, 1) that say yes or no, largest first; its fraction."""
        y = self._position(refs[0], head, 0)
        lower = jnp.ceil(y) - 1
        rest = self.map_shape[0] - 2 - lower
        moves = []
        for bit in reversed(range(shift_bits(self.map_shape[0]))):
            moved = rest >= 2**bit
            rest = jnp.where(moved, rest - 2**bit, rest)
            moves.append((2**bit * self.map_shape[1], moved))
        return moves, y - lower

    def _column_weights(self, refs, head):
        """(N, W + 1), of the columns from -1 on, and their derivative by x."""
        x = self._position(refs[0], head, 1)
        lower = jnp.ceil(x) - 1
        column = lax.broadcasted_iota(jnp.int32, (x.shape[0], self.map_shape[1] + 1), 1).astype(x.dtype) - 1
        left, right = column == lower, column == lower + 1
        fraction = x - lower
        zero = 0 * fraction  # NaN for a position that is
        weights = jnp.where(left, 1 - fraction, zero) + jnp.where(right, fraction, zero)
        return weights, right.astype(x.dtype) - left.astype(x.dtype)

    def load(self, refs, span, head):
        """(keys, queries) of a span and head."""
        weights, _ = self._column_weights(refs, head)
        moves, fraction = self._rows(refs, head)
        lines = dot(weights, refs[1][head], 1, 0, precision=lax.Precision.HIGHEST)  # (N, L)
        width = self.map_shape[1]
        lines = lines[:, width:] * (1 - fraction) + lines[:, :-width] * fraction
        for lanes, moved in moves:
            lines = jnp.where(moved, lines[:, lanes:], lines[:, :-lanes])
        return lines

    def results(self, operands):
        """Of the gradient."""
        points, matrix = (x.shape for x, _ in operands)
        dtype = operands[1][0].dtype
        return [Result(points, dtype, batched=True), Result(matrix, dtype, batched=False)]

    def start(self, refs):
        """Before the first span of an example."""
        refs[0][...] = jnp.zeros_like(refs[0])

        @pl.when(pl.program_id(0) == 0)
        def _():
            refs[1][...] = jnp.zeros_like(refs[1])

    def add_gradient(self, refs, results, span, head, gradient):
        """``gradient`` is (keys, queries)."""
        highest = lax.Precision.HIGHEST
        weights, slopes = self._column_weights(refs, head)
        moves, fraction = self._rows(refs, head)
        keys, width = gradient.shape[0], self.map_shape[1]
        for lanes, moved in reversed(moves):
            zeros = jnp.zeros((keys, lanes), gradient.dtype)
            before, after = jnp.concatenate([zeros, gradient], 1), jnp.concatenate([gradient, zeros], 1)
            gradient = jnp.where(moved, before, after)
        lines = dot(weights, refs[1][head], 1, 0, precision=highest)
        to_fraction = (gradient * (lines[:, :-width] - lines[:, width:])).sum(axis=1, keepdims=True)
        zeros = jnp.zeros((keys, width), gradient.dtype)
        upper, lower = gradient * (1 - fraction), gradient * fraction
        to_lines = jnp.concatenate([zeros, upper], 1) + jnp.concatenate([lower, zeros], 1)
        results[1][head] += dot(weights, to_lines, 0, 0, precision=highest)
        to_weights = dot(to_lines, refs[1][head], 1, 1, precision=highest)  # (N, W + 1)
        at = 2 * (head // self.heads_per_group)
        results[0][0, :, at : at + 1] += to_fraction
        results[0][0, :, at + 1 : at + 2] += (to_weights * slopes).sum(axis=1, keepdims=True)


def shift_bits(height: int) -> int:
    """Of the largest number of rows that lanes move, H - 1."""
    return (height - 1).bit_length()
