"""The exact GELU, alone or followed by a linear layer. Both keep only their inputs for the backward pass."""

import math

import jax
import jax.numpy as jnp

from dat_jax.ops import dispatch, memory
from dat_jax.ops.layers.linear import linear
from dat_jax.ops.layers.reduction import sum_outer_products, sum_over_positions


def gelu(x: jax.Array) -> jax.Array:
    """The exact GELU, x * Phi(x), of any shape.

    Its backward pass recomputes everything from ``x``: JAX's own derivative stores five arrays of this size.

    Args:
      x: any shape.

    Returns:
      The shape and dtype of ``x``; computed in float32 or better.

    Source: Gaussian Error Linear Units (1606.08415).
    """
    return _gelu(x) if dispatch.uses_custom_gradients() else _compute_gelu(x)


def _compute_gelu(x):
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (wide * _normal_cdf(wide)).astype(x.dtype)


_gelu = jax.custom_vjp(_compute_gelu)


def _normal_cdf(x):
    return 0.5 + 0.5 * jax.lax.erf(x * math.sqrt(0.5))


def _gelu_forward(x):
    return _compute_gelu(x), x


def _gelu_backward(x, gradient):
    return (_gelu_derivative(memory.recompute_from(x), gradient),)


def _gelu_derivative(x, gradient):
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    density = jnp.exp(-0.5 * wide * wide) * (1 / math.sqrt(2 * math.pi))
    return (gradient.astype(wide.dtype) * (_normal_cdf(wide) + wide * density)).astype(x.dtype)


_gelu.defvjp(_gelu_forward, _gelu_backward)


def gelu_linear(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """gelu(x) @ kernel + bias; ``x`` is stored for the backward pass, gelu(x) is not.

    Args:
      x: (..., C).
      kernel: (C, features), of the dtype of ``x``.
      bias: (features,), of the dtype of ``x``.

    Returns:
      (..., features).
    """
    return _gelu_linear(x, kernel, bias) if dispatch.uses_custom_gradients() else _compute_gelu_linear(x, kernel, bias)


def _compute_gelu_linear(x, kernel, bias):
    return linear(gelu(x), kernel, bias)


_gelu_linear = jax.custom_vjp(_compute_gelu_linear)


def _gelu_linear_forward(x, kernel, bias):
    return _compute_gelu_linear(x, kernel, bias), (x, kernel)


def _gelu_linear_backward(residuals, gradient):
    x, kernel = memory.recompute_from(residuals[0]), residuals[1]
    to_kernel = sum_outer_products(gelu(x), gradient)
    to_x = _gelu_derivative(x, gradient @ kernel.T)
    return to_x, to_kernel, sum_over_positions(gradient).astype(gradient.dtype)


_gelu_linear.defvjp(_gelu_linear_forward, _gelu_linear_backward)
