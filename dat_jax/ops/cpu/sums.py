"""Sums over outer axes, written so that XLA's CPU backend vectorizes them."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

_MAX_TERMS = 8  # slices that are added in one expression


def sum_over_rows(x: jax.Array) -> jax.Array:
    """(B, H, ...) -> (B, ...), by adding slices until one row is left.

    XLA's CPU backend runs a reduction over outer axes without vector instructions, and fuses the computation of its operand
    into that loop. Adding slices of an axis is elementwise: the gradient of a 3 x 3 depthwise kernel on (8, 56, 56, 256)
    takes 16 ms this way and 84 ms with ``sum`` (2 CPU cores).
    """
    while x.shape[1] > 1:
        x = _add_slices(x)
    return x[:, 0]


def sum_over_axes(x: jax.Array, axes: Sequence[int]) -> jax.Array:
    """``x.sum(axes, keepdims=True)`` of leading axes, as a product with ones.

    XLA calls a library for such a sum, which takes 21 ms for (8, 8, 196, 196); the product takes 2.5 ms.
    """
    for axis in axes:
        summed = jnp.tensordot(jnp.ones(x.shape[axis], x.dtype), x, axes=(0, axis), precision="highest")
        x = jnp.expand_dims(summed, axis)
    return x


def _add_slices(x: jax.Array) -> jax.Array:
    """(B, H, ...) -> (B, H / n, ...): the sum of n equal parts of the rows."""
    terms = max((n for n in range(2, _MAX_TERMS + 1) if x.shape[1] % n == 0), default=0)
    if not terms:  # no small divisor: add the second half to the first, an odd row stays
        half = x.shape[1] // 2
        return jnp.concatenate([x[:, :half] + x[:, half : 2 * half], x[:, 2 * half :]], axis=1)
    rows = x.shape[1] // terms
    parts = (x[:, part * rows : (part + 1) * rows] for part in range(terms))
    return sum(parts)  # pyright: ignore[reportReturnType] (there are at least two terms)
