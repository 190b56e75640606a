"""Depthwise convolution."""

import jax
import jax.numpy as jnp
from jax import lax

from dat_jax.ops import dispatch


def depthwise_conv(
    x: jax.Array, kernel: jax.Array, *, stride: int = 1, padding: int = 0, implementation: str = "auto"
) -> jax.Array:
    """Convolves every channel with its own kernel (cross-correlation, zero padding).

    Args:
      x: (B, H, W, C).
      kernel: (K, K, 1, C), of the dtype of ``x``.
      stride: of both axes.
      padding: zeros added on each of the four sides.
      implementation: "conv" is ``lax.conv_general_dilated``; "shifts" adds K * K shifted products. See ``dispatch``.

    Returns:
      (B, (H + 2 * padding - K) // stride + 1, likewise for W, C).

    Raises:
      ValueError: the shapes do not fit, or the implementation is unknown.
    """
    size, channels = kernel.shape[0], x.shape[-1]
    if kernel.shape != (size, size, 1, channels):
        raise ValueError(f"depthwise_conv wants a kernel (K, K, 1, {channels}), got {kernel.shape}.")
    if min(x.shape[1:3]) + 2 * padding < size:
        raise ValueError(f"A {size} x {size} kernel does not fit into a padded map of {x.shape[1:3]} + {2 * padding}.")
    if dispatch.choose("depthwise_conv", implementation, map_shape=x.shape[1:3]) == "conv":
        return lax.conv_general_dilated(
            x,
            kernel,
            window_strides=(stride, stride),
            padding=((padding, padding), (padding, padding)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=channels,
        )
    return _shifted_products(x, kernel, stride, padding)


def _shifted_products(x, kernel, stride, padding):
    size = kernel.shape[0]
    x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    height, width = ((side - size) // stride + 1 for side in x.shape[1:3])
    total = 0.0
    for dy in range(size):
        for dx in range(size):
            rows = slice(dy, dy + (height - 1) * stride + 1, stride)
            columns = slice(dx, dx + (width - 1) * stride + 1, stride)
            total = total + x[:, rows, columns] * kernel[dy, dx][None, None]
    return total
