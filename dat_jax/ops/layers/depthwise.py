"""Depthwise convolution."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from dat_jax.ops import dispatch
from dat_jax.ops.layers import reduction


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
    if stride == 1 and padding < kernel.shape[0]:
        return _stride_one(x, kernel, padding)
    # The windows overlap, so that together they are larger than x: they are stacked again in the backward pass.
    return jax.checkpoint(_sum_over_windows, static_argnums=(2, 3))(x, kernel, stride, padding)


def _sum_over_windows(x, kernel, stride, padding):
    """With a stride there are few windows: these are stacked, so that the program grows with their number along a side,
    not with the K * K taps.
    """
    size = kernel.shape[0]
    x = _pad(x, padding)
    rows, columns = (range(0, side - size + 1, stride) for side in x.shape[1:3])
    x = jnp.stack([x[:, row : row + size] for row in rows], axis=1)  # (B, Hk, K, W, C)
    x = jnp.stack([x[:, :, :, column : column + size] for column in columns], axis=2)  # (B, Hk, Wk, K, K, C)
    return (x * kernel[None, None, None, :, :, 0]).sum(axis=(3, 4))


def _sum_of_taps(x, kernel, padding):
    taps = _taps(x, kernel.shape[0], padding)
    return sum(tap * weight[None, None] for tap, weight in zip(taps, kernel.reshape(-1, 1, x.shape[-1]), strict=True))


def _taps(x, size, padding):
    """What each of the size * size kernel positions is multiplied with, each of the shape of the output; stride 1."""
    x = _pad(x, padding)
    height, width = (side - size + 1 for side in x.shape[1:3])
    return [x[:, dy : dy + height, dx : dx + width] for dy in range(size) for dx in range(size)]


def _pad(x, padding):
    return jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _stride_one(x, kernel, padding):
    return _sum_of_taps(x, kernel, padding)


def _stride_one_forward(x, kernel, padding):
    return _sum_of_taps(x, kernel, padding), (x, kernel)


def _stride_one_backward(padding, residuals, gradient):
    """The gradient of the input is a convolution with the turned kernel, that of the kernel a sum for each tap."""
    x, kernel = residuals
    size = kernel.shape[0]
    to_input = _sum_of_taps(gradient, kernel[::-1, ::-1], size - 1 - padding)
    to_kernel = jnp.stack([reduction.sum_over_positions(tap * gradient) for tap in _taps(x, size, padding)])
    return to_input, to_kernel.reshape(kernel.shape).astype(kernel.dtype)


_stride_one.defvjp(_stride_one_forward, _stride_one_backward)
