"""Depthwise convolution."""

import jax
from jax import lax

from dat_jax.ops import dispatch
from dat_jax.ops.calls import tunable
from dat_jax.ops.cpu import depthwise as cpu_depthwise


@tunable("depthwise_conv", batched=("x",))
def depthwise_conv(
    x: jax.Array, kernel: jax.Array, *, stride: int = 1, padding: int = 0, implementation: str = "auto"
) -> jax.Array:
    """Convolves every channel with its own kernel (cross-correlation, zero padding).

    Args:
      x: (B, H, W, C).
      kernel: (K, K, 1, C), of the dtype of ``x``.
      stride: step along both axes, in pixels.
      padding: number of zeros added on each of the four sides.
      implementation: "conv" is ``lax.conv_general_dilated``; "shifts" adds K * K shifted products (for CPUs). See
        ``dispatch``.

    Returns:
      (B, (H + 2 * padding - K) // stride + 1, (W + 2 * padding - K) // stride + 1, C).

    Raises:
      ValueError: the shapes do not fit, or the implementation is unknown.
    """
    size, channels = kernel.shape[0], x.shape[-1]
    if kernel.shape != (size, size, 1, channels):
        raise ValueError(f"depthwise_conv expected a kernel (K, K, 1, {channels}), got {kernel.shape}.")
    if min(x.shape[1:3]) + 2 * padding < size:
        raise ValueError(f"A {size} x {size} kernel does not fit into a padded map of {x.shape[1:3]} + {2 * padding}.")
    if dispatch.choose("depthwise_conv", implementation, map_shape=x.shape[1:3]) == "shifts":
        return cpu_depthwise.depthwise_conv(x, kernel, stride=stride, padding=padding)
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=((padding, padding), (padding, padding)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=channels,
    )
