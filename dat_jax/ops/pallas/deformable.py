"""Deformable attention by the kernels of ``attention``."""

import jax
import jax.numpy as jnp

from dat_jax.ops.pallas import attention
from dat_jax.ops.pallas.biases import BatchedBias, NoBias, SampledBias

# Largest map whose biases are sampled in the kernel: its matrix has a row for each pixel and a column for each query.
MAX_SAMPLED_PIXELS = 1024


def deformable_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    num_heads: int,
    bias: jax.Array | None = None,
    points: jax.Array | None = None,
    table: jax.Array | None = None,
) -> jax.Array:
    """Attention of every pixel to the N sampled keys.

    Args:
      query: (B, H, W, C).
      key, value: (B, N, C).
      num_heads: M.
      bias: (B, M, N, H * W), or none; or else points and table:
      points: (B, G, N, 2), (y, x) in pixels, all inside the map.
      table: (M, 2 * H - 1, 2 * W - 1).

    Returns:
      (B, H, W, C).
    """
    batch, height, width, channels = query.shape
    layout = attention.Layout(num_heads, channels, (attention.Span(0, height * width, 0, key.shape[1]),))
    arrays = (query.reshape(batch, height * width, channels), key, value)
    if table is not None:
        groups = points.shape[1]
        matrix = shifted_tables(table.astype(points.dtype), (height, width))
        flat = points.swapaxes(1, 2).reshape(batch, -1, 2 * groups)
        kind, bias_arrays = SampledBias((height + 1, width + 1), num_heads // groups), (flat, matrix)
    elif bias is not None:
        kind, bias_arrays = BatchedBias(), (bias,)
    else:
        kind, bias_arrays = NoBias(), ()
    return attention.attention(layout, kind, arrays, bias_arrays).reshape(query.shape)


def shifted_tables(table: jax.Array, map_shape: tuple[int, int]) -> jax.Array:
    """The bias of every query for a key on a pixel, for each pixel of a map with one line more below and to the right.

    A bias is bilinear between these, so that hat weights of the pixels blend it exactly, with its derivative even on the
    last line of the map.

    Args:
      table: (M, 2 * H - 1, 2 * W - 1).
      map_shape: (H, W).

    Returns:
      (M, (H + 1) * (W + 1), H * W), zero where the table ends.
    """
    height, width = map_shape
    padded = jnp.pad(table, ((0, 0), (1, 0), (1, 0)))
    shifted = jnp.stack([padded[..., width - x : 2 * width - x] for x in range(width + 1)], axis=1)
    # Rows and columns of the table in one axis, along the lanes: with 14 columns there a tile would be almost empty, and
    # stacks of shifted rows moved 440 MB (map of 14 x 14, 8 heads, forward and gradient, compiled for a v5e).
    shifted = shifted.reshape(table.shape[0], width + 1, 2 * height * width)  # (M, x, (row, j))
    first = [(height - y) * width for y in range(height + 1)]
    shifted = jnp.stack([shifted[..., start : start + height * width] for start in first], axis=1)
    return shifted.reshape(table.shape[0], (height + 1) * (width + 1), height * width)
