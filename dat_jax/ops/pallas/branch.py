"""Residual branches inside kernels: x + factor * f(LayerNorm(x)), so that the normalized map and the branch stay on the chip."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dat_jax.ops.layers.normalization import EPSILON
from dat_jax.ops.pallas.call import Result


class Branch(NamedTuple):
    """The arrays of a residual branch around the function of a kernel, float32 or better.

    Attributes:
      factors: (B, 1, 1), the factor of each example's branch; its gradient is zero.
      scale: (1, C), scale of LayerNorm.
      bias: (1, C), bias of LayerNorm.
    """

    factors: jax.Array
    scale: jax.Array
    bias: jax.Array

    @classmethod
    def make(cls, factors: jax.Array, scale: jax.Array, bias: jax.Array, dtype) -> "Branch":
        """Branch of factors (B,), scale (C,) and bias (C,), converted to ``dtype``."""
        rows = (scale.reshape(1, -1).astype(dtype), bias.reshape(1, -1).astype(dtype))
        return cls(factors.reshape(-1, 1, 1).astype(dtype), *rows)

    def operands(self) -> list[tuple[jax.Array, bool]]:
        """The arrays, each with a flag that its first axis is the batch."""
        return [(self.factors, True), (self.scale, False), (self.bias, False)]

    def results(self) -> list[Result]:
        """The gradients of scale and bias, which the kernel sums over the batch."""
        return [Result(x.shape, x.dtype, batched=False) for x in (self.scale, self.bias)]


def _standardize(x):
    """(x - mean) / deviation over the last axis, and 1 / deviation, in float32 or better."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    centered = wide - wide.mean(axis=-1, keepdims=True)
    inverse = lax.rsqrt(jnp.square(centered).mean(axis=-1, keepdims=True) + EPSILON)
    return centered * inverse, inverse


def normalize(x: jax.Array, scale_ref, bias_ref) -> jax.Array:
    """LayerNorm of (P, C) in a kernel, of the dtype of ``x``. The parameters are (1, C)."""
    return (_standardize(x)[0] * scale_ref[...] + bias_ref[...]).astype(x.dtype)


def normalize_backward(x: jax.Array, gradient: jax.Array, scale_ref, to_scale_ref, to_bias_ref) -> jax.Array:
    """Gradient (P, C) with respect to the input of ``normalize``. Gradients of its parameters are added to two references.

    Args:
      x: (P, C), the input of LayerNorm.
      gradient: (P, C) with respect to its output, float32 or better.
      scale_ref: (1, C).
      to_scale_ref: (1, C), to which the gradient of the scale is added.
      to_bias_ref: (1, C), to which the gradient of the bias is added.
    """
    standardized, inverse = _standardize(x)
    to_scale_ref[...] += (gradient * standardized).sum(axis=0, keepdims=True)
    to_bias_ref[...] += gradient.sum(axis=0, keepdims=True)
    scaled = gradient * scale_ref[...]
    projection = (scaled * standardized).mean(axis=-1, keepdims=True)
    return inverse * (scaled - scaled.mean(axis=-1, keepdims=True) - standardized * projection)
