"""Depthwise convolution as a sum of shifted products, with its backward pass."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from dat_jax.ops import dispatch
from dat_jax.ops.cpu.sums import sum_over_rows
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
    return _convolve_strided(x, kernel, stride, padding)


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _convolve_strided(x, kernel, stride, padding):
    """The sum of the K * K taps, each of which reads every ``stride``-th pixel."""
    size, x = kernel.shape[0], _pad(x, padding)
    last_row, last_column = (side - size for side in x.shape[1:3])
    return sum(
        x[:, dy : dy + last_row + 1 : stride, dx : dx + last_column + 1 : stride] * kernel[dy, dx][None, None]
        for dy in range(size)
        for dx in range(size)
    )


def _strided_forward(x, kernel, stride, padding):
    return _convolve_strided(x, kernel, stride, padding), (x, kernel)


def _strided_backward(stride, padding, residuals, gradient):
    """Both gradients work on cells of stride * stride pixels. A window covers n x n cells, n = ceil(K / stride).

    For all pixels of a cell at once, the gradient of the input is a sum of n * n shifted products, and that of the kernel one
    sum over the positions for each of the n * n cells: elementwise expressions, which XLA vectorizes. For a 7 x 7 kernel with
    stride 4 on (8, 28, 28, 128), both take 1 ms, and 25 ms with gradients that JAX derives from stacked windows (2 CPU cores).
    """
    x, kernel = residuals
    (batch, height, width, channels), (_, rows, columns, _) = x.shape, gradient.shape
    size = kernel.shape[0]
    n = -(-size // stride)
    cells = [(a, b) for a in range(n) for b in range(n)]

    weights = jnp.pad(kernel[:, :, 0], ((0, n * stride - size), (0, n * stride - size), (0, 0)))
    weights = weights.reshape(n, stride, n, stride, channels)
    around = _pad(gradient, n - 1)
    to_input = sum(
        around[:, n - 1 - a :, n - 1 - b :][:, : rows + n - 1, None, : columns + n - 1, None]
        * weights[a, :, b][None, None, :, None]
        for a, b in cells
    )
    to_input = to_input.reshape(batch, (rows + n - 1) * stride, -1, channels)  # pyright: ignore[reportAttributeAccessIssue]
    to_input = _fit(to_input, height + padding, width + padding)[:, padding:, padding:]

    maps = _fit(_pad(x, padding), (rows + n - 1) * stride, (columns + n - 1) * stride)
    maps = maps.reshape(batch, rows + n - 1, stride, columns + n - 1, stride, channels)

    def multiply(cell):  # (2,): row and column of a cell in its window -> (B, Hk, stride, Wk, stride, C)
        pixels = lax.dynamic_slice(
            maps, (0, cell[0], 0, cell[1], 0, 0), (batch, rows, stride, columns, stride, channels)
        )
        return pixels * gradient[:, :, None, :, None]

    def sum_slices(cell):
        products = multiply(cell)
        return sum_over_rows(sum_over_rows(products.reshape(1, -1, *products.shape[2:]))[0])

    if dispatch.batch_split()[0] is None:
        # A loop, so that the gradient is stored. Otherwise XLA fuses its computation into the sum of each cell.
        to_kernel = lax.map(sum_slices, jnp.asarray(cells))
    else:  # the devices would exchange slices, and add their sums in every iteration
        to_kernel = jnp.stack([multiply(cell).sum(axis=(0, 1, 3)) for cell in cells])
    to_kernel = to_kernel.reshape(n, n, stride, stride, channels).swapaxes(1, 2)
    to_kernel = to_kernel.reshape(n * stride, n * stride, 1, channels)[:size, :size]
    return to_input, to_kernel.astype(kernel.dtype)


_convolve_strided.defvjp(_strided_forward, _strided_backward)


def _fit(x, height, width):
    """Cuts the map at the bottom and on the right, or pads it with zeros, to the given size."""
    x = x[:, :height, :width]
    return jnp.pad(x, ((0, 0), (0, height - x.shape[1]), (0, width - x.shape[2]), (0, 0)))
