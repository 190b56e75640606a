"""The MLP of DAT++: linear, a depthwise 3 x 3 convolution added, GELU, linear."""

import jax
import jax.numpy as jnp

from dat_jax.ops import dispatch
from dat_jax.ops.layers import activation, depthwise
from dat_jax.ops.pallas import mlp as kernels


def chooses_kernel(shape: tuple[int, ...], hidden: int, implementation: str) -> bool:
    """Whether ``conv_mlp`` of x (B, H, W, C) is to be a kernel: where it is asked for and its weights fit in VMEM."""
    fits = shape[-1] * hidden <= kernels.MAX_WEIGHTS
    return fits and dispatch.choose("conv_mlp", implementation, map_shape=tuple(shape[1:3])) == "pallas"


def conv_mlp(
    x: jax.Array,
    kernel1: jax.Array,
    bias1: jax.Array,
    taps: jax.Array,
    taps_bias: jax.Array,
    kernel2: jax.Array,
    bias2: jax.Array,
    *,
    implementation: str = "auto",
) -> jax.Array:
    """gelu(h + convolution(h)) kernel2 + bias2 with h = x kernel1 + bias1, and the exact GELU.

    Args:
      x: (B, H, W, C); the result is of its dtype.
      kernel1, bias1: (C, E), (E,).
      taps, taps_bias: (3, 3, 1, E), (E,), of the convolution.
      kernel2, bias2: (E, C), (C,).
      implementation: "products", op by op, each in the dtype of ``x``; "pallas" is a kernel for TPUs, which rounds to it
        only what it multiplies with the two kernels. See ``dispatch``.

    Returns:
      (B, H, W, C).

    Source: DAT++ (2309.01430), section 3.3.
    """
    if dispatch.choose("conv_mlp", implementation, map_shape=x.shape[1:3]) == "pallas":
        wide = jnp.promote_types(x.dtype, jnp.float32)
        rows = (y.reshape(-1, y.shape[-1]).astype(wide) for y in (bias1, taps, taps_bias, bias2))
        bias1, taps, taps_bias, bias2 = rows
        parameters = kernels.Parameters(kernel1.astype(x.dtype), bias1, taps, taps_bias, kernel2.astype(x.dtype), bias2)
        return kernels.conv_mlp(x, parameters)
    kernel1, bias1, taps, taps_bias, kernel2, bias2 = (
        y.astype(x.dtype) for y in (kernel1, bias1, taps, taps_bias, kernel2, bias2)
    )
    x = x @ kernel1 + bias1.reshape(1, 1, 1, -1)
    convolved = depthwise.depthwise_conv(
        x, taps, padding=1, implementation="plain" if implementation == "plain" else "auto"
    )
    return activation.gelu_linear(x + (convolved + taps_bias.reshape(1, 1, 1, -1)), kernel2, bias2)
