"""Biases that the kernels of ``attention`` add to the logits, and their gradients.

A class of biases has these methods:

* ``operands``: the arrays that a kernel reads.
* ``load``: the bias (keys, queries) of a span and head, from these arrays.
* ``results``: the arrays of the gradient.
* ``start`` and ``add_gradient``: initialize these arrays and add to them.
* ``flops``: FLOPs for loading the bias of all heads of an example.
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
        """For each array (array, whether its first axis is the batch)."""
        return [(bias, False)]

    def flops(self, operands):
        """FLOPs for loading the bias of all heads of an example."""
        return 0

    def load(self, refs, span, head):
        """Bias (keys, queries) of a span and head."""
        return refs[0][span.bias, head]

    def results(self, operands):
        """Arrays of the gradient."""
        return [Result(operands[0][0].shape, operands[0][0].dtype, batched=False)]

    def start(self, refs):
        """Initializes the gradient, before the first span of an example."""

        @pl.when(pl.program_id(0) == 0)
        def _():
            refs[0][...] = jnp.zeros_like(refs[0])

    def add_gradient(self, refs, results, span, head, gradient):
        """Adds the gradient (keys, queries) of a span and head."""
        results[0][span.bias, head] += gradient


@dataclasses.dataclass(frozen=True)
class BatchedBias:
    """An array (B, M, keys, queries); there is one span."""

    def operands(self, bias):
        """For each array (array, whether its first axis is the batch)."""
        return [(bias, True)]

    def flops(self, operands):
        """FLOPs for loading the bias of all heads of an example."""
        return 0

    def load(self, refs, span, head):
        """Bias (keys, queries) of a span and head."""
        return refs[0][0, head]

    def results(self, operands):
        """Arrays of the gradient."""
        return [Result(operands[0][0].shape, operands[0][0].dtype, batched=True)]

    def start(self, refs):
        """Initializes the gradient, before the first span of an example."""

    def add_gradient(self, refs, results, span, head, gradient):
        """Adds the gradient (keys, queries) of a span and head."""
        results[0][0, head] = gradient


@dataclasses.dataclass(frozen=True)
class NoBias:
    """No bias."""

    def operands(self):
        """For each array (array, whether its first axis is the batch)."""
        return []

    def flops(self, operands):
        """FLOPs for loading the bias of all heads of an example."""
        return 0

    def load(self, refs, span, head):
        """Bias (keys, queries) of a span and head."""
        return 0.0

    def results(self, operands):
        """Arrays of the gradient."""
        return []

    def start(self, refs):
        """Initializes the gradient, before the first span of an example."""

    def add_gradient(self, refs, results, span, head, gradient):
        """Adds the gradient (keys, queries) of a span and head."""


@dataclasses.dataclass(frozen=True)
class TableBias:
    """Bilinear samples of a table of relative displacements, for keys inside the map.

    A key at column x blends two shifted copies of the table's columns: a product of hat weights with ``matrix``, (M, W + 1, L),
    see ``deformable.shift_columns``. The lanes of the product are rows of W numbers, one for each row of the table. A key at row
    y needs H of these rows, from a first row that depends on y, blended with the next row. Each key (a sublane) has its own
    first row: the lanes are shifted by 1, 2, 4, ... rows, in each step for the keys whose first row has that bit set.

    ``points`` is (B, N, 2 * G), (y, x) group by group, in pixels, with 0 <= y <= H - 1 and 0 <= x <= W - 1. On a pixel center the
    derivative is the one to the left, which is to the right in the table, as in the other implementations.

    Attributes:
      map_shape: (H, W).
      heads_per_group: M / G.
    """

    map_shape: tuple[int, int]
    heads_per_group: int

    def operands(self, points, matrix):
        """For each array (array, whether its first axis is the batch)."""
        return [(points, True), (matrix, False)]

    def flops(self, operands):
        """FLOPs for loading the bias of all heads of an example."""
        return 2 * operands[0][0].shape[1] * math.prod(operands[1][0].shape)

    def _position(self, ref, head, axis):
        at = 2 * (head // self.heads_per_group) + axis
        return ref[0, :, at : at + 1]  # (N, 1)

    def _row_shifts(self, refs, head):
        """Shifts [(number of lanes, mask of the keys (N, 1))], largest first, and the fraction of each key (N, 1)."""
        y = self._position(refs[0], head, 0)
        lower = jnp.ceil(y) - 1
        rest = self.map_shape[0] - 2 - lower
        shifts = []
        for bit in reversed(range(shift_bits(self.map_shape[0]))):
            is_shifted = rest >= 2**bit
            rest = jnp.where(is_shifted, rest - 2**bit, rest)
            shifts.append((2**bit * self.map_shape[1], is_shifted))
        return shifts, y - lower

    def _column_weights(self, refs, head):
        """Weights (N, W + 1) of the columns -1 to W - 1, and their derivatives with respect to x."""
        x = self._position(refs[0], head, 1)
        lower = jnp.ceil(x) - 1
        column = lax.broadcasted_iota(jnp.int32, (x.shape[0], self.map_shape[1] + 1), 1).astype(x.dtype) - 1
        left, right = column == lower, column == lower + 1
        fraction = x - lower
        zero = 0 * fraction  # NaN if the position is NaN
        weights = jnp.where(left, 1 - fraction, zero) + jnp.where(right, fraction, zero)
        return weights, right.astype(x.dtype) - left.astype(x.dtype)

    def load(self, refs, span, head):
        """Bias (keys, queries) of a span and head."""
        weights, _ = self._column_weights(refs, head)
        shifts, fraction = self._row_shifts(refs, head)
        lines = dot(weights, refs[1][head], 1, 0, precision=lax.Precision.HIGHEST)  # (N, L)
        width = self.map_shape[1]
        lines = lines[:, width:] * (1 - fraction) + lines[:, :-width] * fraction
        for lanes, is_shifted in shifts:
            lines = jnp.where(is_shifted, lines[:, lanes:], lines[:, :-lanes])
        return lines

    def results(self, operands):
        """Arrays of the gradient."""
        points, matrix = (x.shape for x, _ in operands)
        dtype = operands[1][0].dtype
        return [Result(points, dtype, batched=True), Result(matrix, dtype, batched=False)]

    def start(self, refs):
        """Initializes the gradient, before the first span of an example."""
        refs[0][...] = jnp.zeros_like(refs[0])

        @pl.when(pl.program_id(0) == 0)
        def _():
            refs[1][...] = jnp.zeros_like(refs[1])

    def add_gradient(self, refs, results, span, head, gradient):
        """Adds the gradient (keys, queries) of a span and head."""
        highest = lax.Precision.HIGHEST
        weights, slopes = self._column_weights(refs, head)
        shifts, fraction = self._row_shifts(refs, head)
        keys, width = gradient.shape[0], self.map_shape[1]
        for lanes, is_shifted in reversed(shifts):
            zeros = jnp.zeros((keys, lanes), gradient.dtype)
            before, after = jnp.concatenate([zeros, gradient], 1), jnp.concatenate([gradient, zeros], 1)
            gradient = jnp.where(is_shifted, before, after)
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
    """Number of bits of the largest shift, H - 1 rows."""
    return (height - 1).bit_length()
