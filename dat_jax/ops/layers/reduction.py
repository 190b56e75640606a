"""Sums over all axes but the channels, which the gradients of biases, scales and depthwise kernels are."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from dat_jax.ops import dispatch

_MAX_TERMS = 8  # of one sum that is written out


def sum_over_positions(x: jax.Array) -> jax.Array:
    """(..., C) -> (C,), float32 or better.

    XLA's CPU backend runs a reduction over the outer axes without vector instructions, and fuses what makes its operand
    into that loop. Adding slices of an axis, eight at a time, is elementwise: the gradient of a 3 x 3 depthwise kernel on
    (8, 56, 56, 256) takes 16 ms that way and 84 ms with ``sum`` (2 CPU cores).
    """
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if x.ndim == 4:
        x = sum_over_rows(x)
    return x.sum(axis=tuple(range(x.ndim - 1)))


def sum_over_rows(x: jax.Array) -> jax.Array:
    """(B, H, ...) -> (B, ...); written out on CPU, see ``sum_over_positions``."""
    if dispatch.target_platform() != "cpu":
        return x.sum(axis=1)
    while x.shape[1] > 1:
        x = _add_slices(x)
    return x[:, 0]


def sum_over_axes(x: jax.Array, axes: Sequence[int]) -> jax.Array:
    """x.sum(axes, keepdims=True) of leading axes.

    On CPU as a product with ones: the library that XLA gives such a sum to takes 21 ms for (8, 8, 196, 196), this 2.5.
    """
    if dispatch.target_platform() != "cpu" or not axes:
        return x.sum(axis=tuple(axes), keepdims=True)
    for axis in axes:
        summed = jnp.tensordot(jnp.ones(x.shape[axis], x.dtype), x, axes=(0, axis), precision="highest")
        x = jnp.expand_dims(summed, axis)
    return x


def _add_slices(x):
    """(B, H, ...) -> (B, H / n, ...): the sum of the n parts that the rows are split into."""
    terms = max((n for n in range(2, _MAX_TERMS + 1) if x.shape[1] % n == 0), default=0)
    if not terms:  # rows that do not divide: the last ones are added to the first ones
        half = x.shape[1] // 2
        return jnp.concatenate([x[:, :half] + x[:, half : 2 * half], x[:, 2 * half :]], axis=1)
    rows = x.shape[1] // terms
    return sum(x[:, part * rows : (part + 1) * rows] for part in range(terms))
