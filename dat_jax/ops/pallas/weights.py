"""Bilinear weights of the pixels of a map at points, computed inside a kernel."""

import jax.numpy as jnp
from jax import lax


def _lines(points_ref, group, map_shape):
    """For rows, then for columns: distance of every pixel's line to the line below each point, and the point's fraction."""
    height, width = map_shape
    keys = points_ref.shape[1]
    pixel = lax.broadcasted_iota(jnp.int32, (keys, height * width), 1).astype(jnp.float32)
    row = jnp.floor((pixel + 0.5) / width)  # exact; integer division is slow
    for axis, line in ((0, row), (1, pixel - row * width)):
        position = points_ref[0, :, 2 * group + axis : 2 * group + axis + 1]  # (N, 1)
        lower = jnp.floor(position)
        yield line.astype(position.dtype) - lower, position - lower


def _hat(distance, fraction):
    zero = 0 * fraction  # NaN if the position is NaN
    return jnp.where(distance == 0, 1 - fraction, zero) + jnp.where(distance == 1, fraction, zero)


def load_weights(points_ref, group: int, map_shape: tuple[int, int]):
    """(N, H * W): the product of ``grid_sample.linear_weights`` of rows and columns, for the points of a group.

    Args:
      points_ref: a block (1, N, 2 * G), (y, x) group by group, in pixels, float32 or better.
      group: index of the group.
      map_shape: (H, W).
    """
    rows, columns = (_hat(*line) for line in _lines(points_ref, group, map_shape))
    return rows * columns


def add_point_gradient(result_ref, points_ref, group: int, map_shape: tuple[int, int], gradient) -> None:
    """Adds the gradient of a group's points, from the gradient (N, H * W) of the weights, to a block (1, N, 2 * G).

    On a pixel center the derivative is the one to the right, as in the other implementations.
    """
    lines = list(_lines(points_ref, group, map_shape))
    hats = [_hat(*line) for line in lines]
    for axis, (distance, _) in enumerate(lines):
        slope = (distance == 1).astype(gradient.dtype) - (distance == 0).astype(gradient.dtype)
        at = slice(2 * group + axis, 2 * group + axis + 1)
        result_ref[0, :, at] += (gradient * slope * hats[1 - axis]).sum(axis=1, keepdims=True)
