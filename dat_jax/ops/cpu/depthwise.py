"""Depthwise convolution as a sum of shifted products, with its backward pass."""

import functools

import jax
import jax.numpy as jnp

from dat_jax.ops.layers.reduction import sum_over_positions


def depthwise_conv(x: jax.Array, kernel: jax.Array, *, stride: int, padding: int) -> jax.Array:
    """See ``ops.layers.depthwise``.

    Args:
      x: (B, H, W, C).
      kernel: (K, K, 1, C), of the dtype of ``x``.
      stride: step along both axes, in pixels.
      padding: number of zeros added on each of the four sides.

    Returns:
      (B, (H + 2 * padding - K) // stride + 1, (W + 2 * padding - K) // stride + 1, C).
    """
    if stride == 1 and padding < kernel.shape[0]:
        return _convolve_stride_one(x, kernel, padding)
    # The windows overlap, so that together they are larger than x: the backward pass stacks them again.
    return jax.checkpoint(_sum_over_windows, static_argnums=(2, 3))(x, kernel, stride, padding)


def _sum_over_windows(x, kernel, stride, padding):
    """Multiplies stacked windows. With a stride there are few, and the program grows with their number along a side instead
    of with the K * K taps.
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
    """The size * size shifted copies of ``x``, one per kernel position, each of the shape of the output; stride 1."""
    x = _pad(x, padding)
    height, width = (side - size + 1 for side in x.shape[1:3])
    return [x[:, dy : dy + height, dx : dx + width] for dy in range(size) for dx in range(size)]


def _pad(x, padding):
    return jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolve_stride_one(x, kernel, padding):
    return _sum_of_taps(x, kernel, padding)


def _forward(x, kernel, padding):
    return _sum_of_taps(x, kernel, padding), (x, kernel)


def _backward(padding, residuals, gradient):
    """The gradient of the input is a convolution with the rotated kernel, that of the kernel is one sum per tap."""
    x, kernel = residuals
    size = kernel.shape[0]
    to_input = _sum_of_taps(gradient, kernel[::-1, ::-1], size - 1 - padding)
    to_kernel = jnp.stack([sum_over_positions(tap * gradient) for tap in _taps(x, size, padding)])
    return to_input, to_kernel.reshape(kernel.shape).astype(kernel.dtype)


_convolve_stride_one.defvjp(_forward, _backward)
