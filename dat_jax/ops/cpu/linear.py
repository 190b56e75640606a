"""The linear layer with a backward pass in an order that suits XLA's CPU backend."""

import jax

from dat_jax.ops.layers.reduction import sum_outer_products


def _product(x, kernel, bias):
    return x @ kernel + bias.reshape((1,) * (x.ndim - 1) + (-1,))


@jax.custom_vjp
def linear(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """x @ kernel + bias, see ``ops.layers.linear``."""
    return _product(x, kernel, bias)


def _forward(x, kernel, bias):
    return _product(x, kernel, bias), (x, kernel)


def _backward(residuals, gradient):
    x, kernel = residuals
    # A plain sum: XLA would fuse the computation of the gradient into a sum of slices (``cpu.sums``).
    to_bias = gradient.sum(axis=tuple(range(gradient.ndim - 1)))
    return gradient @ kernel.T, sum_outer_products(x, gradient), to_bias


linear.defvjp(_forward, _backward)
