"""Maps of several sizes in one array.

Each example fills the top left of a static map (H, W). Its size is an argument of the compiled program: ``sizes``, int32 (B, 2),
(height, width) in pixels. An op with ``sizes`` gives each example the result that it has by itself. What lies beyond the size
may be anything before the op, and is anything after it. Therefore one program serves all sizes up to (H, W).

A size enters an op in three ways: zeros beyond it where a convolution reads (``clear``), the size that remains after a
convolution (``convolved``), and formulas that contain the size of the map (positions, windows, means).
"""

import jax
import jax.numpy as jnp


def inside(map_shape: tuple[int, int], sizes: jax.Array) -> jax.Array:
    """Return bool (B, H, W): True for the pixels of each example.

    Args:
      map_shape: (H, W) of the static map.
      sizes: int (B, 2), (height, width) of each example.
    """
    rows, columns = (
        jnp.arange(side).reshape(1, -1) < sizes[:, axis].reshape(-1, 1) for axis, side in enumerate(map_shape)
    )
    return rows[:, :, None] & columns[:, None, :]


def clear(x: jax.Array, sizes: jax.Array | None) -> jax.Array:
    """Return x (B, H, W, C) with zeros beyond the size of each example; x itself if ``sizes`` is None.

    Values beyond the size, also NaN, change neither the result nor a gradient.
    """
    if sizes is None:
        return x
    return jnp.where(inside((x.shape[1], x.shape[2]), sizes)[..., None], x, jnp.zeros((), x.dtype))


def convolved(sizes: jax.Array | None, *, kernel_size: int, stride: int = 1, padding: int = 0) -> jax.Array | None:
    """Return the sizes after a convolution with a square kernel, (size + 2 * padding - kernel) // stride + 1; None for None."""
    if sizes is None:
        return None
    return (sizes + 2 * padding - kernel_size) // stride + 1
