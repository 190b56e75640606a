"""Window attention (Swin): attention inside windows that tile the map, optionally shifted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from dat_jax.ops.attention.multi_head import multi_head_attention


def window_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    table: jax.Array,
    *,
    window_size: int,
    num_heads: int,
    shifted: bool = False,
    sizes: jax.Array | None = None,
) -> jax.Array:
    """Attention within windows of w x w, with a learned bias by relative position.

    Args:
      query: (B, H, W, C), H and W multiples of w.
      key: (B, H, W, C).
      value: (B, H, W, C).
      table: ((2w - 1)^2, M), read at (dy + w - 1) * (2w - 1) + (dx + w - 1) with (dy, dx) = query - key.
      window_size: w, side of the windows in pixels.
      num_heads: M.
      shifted: whether to roll the map by -ceil(w / 2) before and back after the attention. Pairs that are in one window only
        because of the roll get -100 added to their logits, as published.
      sizes: int (B, 2), multiples of w, the size of each example's map, see ``ops.sizes``; None for (H, W).

    Returns:
      (B, H, W, C), of the dtype of ``value``.

    Raises:
      ValueError: the map is not a multiple of the window, or the table does not fit.

    Source: Swin Transformer (2103.14030), with the shift of the published DAT code.
    """
    (batch, height, width, channels), w = query.shape, window_size
    if height % w or width % w:
        raise ValueError(
            f"window_attention expected map sides that are multiples of {w}, got {height} x {width}; pad the map."
        )
    if table.shape != ((2 * w - 1) ** 2, num_heads):
        raise ValueError(f"window_attention expected a table {((2 * w - 1) ** 2, num_heads)}, got {table.shape}.")
    shift = -(-w // 2) if shifted else 0

    def roll(x, by):
        if not shift:
            return x
        return jnp.roll(x, (by, by), axis=(1, 2)) if sizes is None else _roll_within(x, by, sizes)

    def partition(x):  # (B, H, W, C) -> (B, windows, w * w, C)
        x = roll(x, -shift)
        x = x.reshape(batch, height // w, w, width // w, w, channels).swapaxes(2, 3)
        return x.reshape(batch, -1, w * w, channels)

    bias = jnp.moveaxis(table[relative_position_index(w)], -1, 0)[None, None]  # (1, 1, M, w * w, w * w)
    if shift and sizes is None:
        mask = jnp.asarray(_shift_mask(height, width, w, shift), bias.dtype)  # (windows, w * w, w * w)
        bias = bias + mask[None, :, None]
    elif shift:
        make_mask = functools.partial(_shift_mask, height, width, w, shift)
        bias = bias + jax.vmap(make_mask)(sizes).astype(bias.dtype)[:, :, None]
    out = multi_head_attention(partition(query), partition(key), partition(value), num_heads=num_heads, bias=bias)
    out = out.reshape(batch, height // w, width // w, w, w, channels).swapaxes(2, 3)
    return roll(out.reshape(batch, height, width, channels), shift)


def _roll_within(x, by, sizes):
    """Rolls each map (H, W, C) of x by ``by`` pixels along both axes, within its size."""

    def roll_one(x, size):
        for axis in (0, 1):
            pixels = jnp.arange(x.shape[axis])
            x = jnp.take(x, jnp.where(pixels < size[axis], (pixels - by) % size[axis], pixels), axis=axis, mode="clip")
        return x

    return jax.vmap(roll_one)(x, sizes)


def relative_position_index(window_size: int) -> np.ndarray:
    """(w * w, w * w): row of the bias table for every (query, key) pair of a window."""
    w = window_size
    y, x = np.divmod(np.arange(w * w), w)
    return (y[:, None] - y[None, :] + w - 1) * (2 * w - 1) + (x[:, None] - x[None, :] + w - 1)


def _shift_mask(height, width, window_size, shift, size=None):
    """(windows, w * w, w * w): -100 between pixels of different regions of the rolled map, 0 elsewhere.

    ``size`` is the (height, width) of a map that fills only this part, which may be traced; None for the whole map.
    """
    size = (height, width) if size is None else size

    def regions(side, size):  # (side,): three bands, split at size - w and size - shift
        line = np.arange(side)
        return (line >= size - window_size).astype(np.int32) + (line >= size - shift)

    region = regions(height, size[0])[:, None] * 3 + regions(width, size[1])[None, :]
    w = window_size
    region = region.reshape(height // w, w, width // w, w).swapaxes(1, 2).reshape(-1, w * w)
    same = region[:, :, None] == region[:, None, :]
    return np.where(same, 0.0, -100.0) if isinstance(same, np.ndarray) else jnp.where(same, 0.0, -100.0)
