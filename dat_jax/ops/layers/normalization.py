"""LayerNorm over channels. For the backward pass it keeps its input and two numbers per position."""

import functools

import jax
import jax.numpy as jnp

from dat_jax.ops import dispatch, memory
from dat_jax.ops.layers.reduction import sum_over_positions

EPSILON = 1e-5  # of the published models


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float = EPSILON) -> jax.Array:
    """(x - mean) / sqrt(variance + epsilon) * scale + bias over the last axis.

    Args:
      x: (..., C).
      scale: (C,), float32 or better.
      bias: (C,), float32 or better.
      epsilon: added to the (biased) variance.

    Returns:
      The shape and dtype of ``x``; statistics and arithmetic are float32 or better.

    Source: Layer Normalization (1607.06450).
    """
    if dispatch.uses_custom_gradients():
        return memory.store_on_cpu(_layer_norm(x, scale, bias, epsilon))
    return _normalize(x, scale, bias, epsilon)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _layer_norm(x, scale, bias, epsilon):
    return _normalize(x, scale, bias, epsilon)[0]


def _normalize(x, scale, bias, epsilon):
    wide = x.astype(jnp.promote_types(x.dtype, scale.dtype))
    mean = wide.mean(axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.square(wide - mean).mean(axis=-1, keepdims=True) + epsilon)
    out = (wide - mean) * inverse * _as_row(scale, x.ndim) + _as_row(bias, x.ndim)
    return out.astype(x.dtype), mean, inverse


def _as_row(vector, ndim):
    return vector.reshape((1,) * (ndim - 1) + (-1,))


def _forward(x, scale, bias, epsilon):
    out, mean, inverse = _normalize(x, scale, bias, epsilon)
    return out, (x, scale, mean, inverse)


def _backward(_, residuals, gradient):
    x, scale, mean, inverse = memory.recompute_from(residuals)
    normalized = (x.astype(mean.dtype) - mean) * inverse
    gradient = gradient.astype(mean.dtype)
    scaled = gradient * _as_row(scale, x.ndim)
    projection = (scaled * normalized).mean(axis=-1, keepdims=True)
    to_x = inverse * (scaled - scaled.mean(axis=-1, keepdims=True) - normalized * projection)
    to_scale = sum_over_positions(gradient * normalized)
    return (
        to_x.astype(x.dtype),
        to_scale.astype(scale.dtype),
        sum_over_positions(gradient).astype(scale.dtype),
    )


_layer_norm.defvjp(_forward, _backward)
