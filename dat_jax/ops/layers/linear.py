"""The linear layer."""

import jax

from dat_jax.ops import dispatch
from dat_jax.ops.cpu import linear as cpu_linear


def linear(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """x @ kernel + bias over the last axis.

    Args:
      x: (..., C).
      kernel: (C, features), of the dtype of ``x``.
      bias: (features,), of the dtype of ``x``.

    Returns:
      (..., features).
    """
    if dispatch.uses_cpu_algorithms():
        return cpu_linear.linear(x, kernel, bias)
    return x @ kernel + bias.reshape((1,) * (x.ndim - 1) + (-1,))
