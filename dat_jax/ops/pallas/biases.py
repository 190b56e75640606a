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
from dat_jax.ops.pallas.weights import add_point_gradient, load_weights


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
class SampledBias:
    """Bilinear samples, at each key's point, of a map of biases: weights (keys, H * W) times a matrix of each head.

    ``matrix`` is (M, H * W, queries), its row p being the bias of every query for a key that sits on pixel p exactly.
    ``points`` is (B, N, 2 * G), (y, x) of group after group, in pixels. See ``hat_weights``.
    """

    map_shape: tuple[int, int]
    heads_per_group: int

    def operands(self, points, matrix):
        """(array, whether its first axis is the batch) of each."""
        return [(points, True), (matrix, False)]

    def flops(self, operands):
        """Of loading it for all heads of an example."""
        return 2 * operands[0][0].shape[1] * math.prod(operands[1][0].shape)

    def load(self, refs, span, head):
        """(keys, queries) of a span and head."""
        weights = load_weights(refs[0], head // self.heads_per_group, self.map_shape)
        return dot(weights, refs[1][head], 1, 0, precision=lax.Precision.HIGHEST)

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
        group = head // self.heads_per_group
        highest = lax.Precision.HIGHEST
        weights = load_weights(refs[0], group, self.map_shape)
        results[1][head] += dot(weights, gradient, 0, 0, precision=highest)
        to_weights = dot(gradient, refs[1][head], 1, 1, precision=highest)
        add_point_gradient(results[0], refs[0], group, self.map_shape, to_weights)
