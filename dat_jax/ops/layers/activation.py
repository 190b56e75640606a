"""GELU, and the linear layer after it, with backward passes that keep the input alone."""

import math

import jax
import jax.numpy as jnp

from dat_jax.ops import recompute
from dat_jax.ops.layers import linear, reduction


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """The exact GELU, x * Phi(x), of any shape and in the dtype of ``x``; computed in float32 or better.

    Its backward pass computes everything again from x: what JAX's own derivative keeps is five arrays of this size.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (wide * _normal_cdf(wide)).astype(x.dtype)


def _normal_cdf(x):
    return 0.5 + 0.5 * jax.lax.erf(x * math.sqrt(0.5))


def _gelu_forward(x):
    return gelu(x), x


def _gelu_backward(x, gradient):
    return (_gelu_derivative(recompute.barrier(x), gradient),)


def _gelu_derivative(x, gradient):
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    density = jnp.exp(-0.5 * wide * wide) * (1 / math.sqrt(2 * math.pi))
    return (gradient.astype(wide.dtype) * (_normal_cdf(wide) + wide * density)).astype(x.dtype)


gelu.defvjp(_gelu_forward, _gelu_backward)


@jax.custom_vjp
def gelu_linear(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """gelu(x) @ kernel + bias, keeping x but not gelu(x) for the backward pass.

    Args:
      x: (..., C).
      kernel: (C, features). bias: (features,). All of one dtype.

    Returns:
      (..., features).
    """
    return linear.linear(gelu(x), kernel, bias)


def _gelu_linear_forward(x, kernel, bias):
    return gelu_linear(x, kernel, bias), (x, kernel)


def _gelu_linear_backward(residuals, gradient):
    x, kernel = recompute.barrier(residuals[0]), residuals[1]
    to_kernel = linear.kernel_gradient(gelu(x), gradient)
    to_x = _gelu_derivative(x, gradient @ kernel.T)
    return to_x, to_kernel, reduction.sum_over_positions(gradient).astype(gradient.dtype)


gelu_linear.defvjp(_gelu_linear_forward, _gelu_linear_backward)
