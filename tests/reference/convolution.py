"""Reference of the depthwise convolution: the window of every output pixel."""

import jax.numpy as jnp
import numpy as np


def depthwise_conv(x, kernel, *, stride, padding):
    """(B, H, W, C), (K, K, 1, C) -> (B, H', W', C)."""
    size = kernel.shape[0]
    x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    tops, lefts = (np.arange(0, side - size + 1, stride) for side in x.shape[1:3])
    rows, columns = (starts[:, None] + np.arange(size) for starts in (tops, lefts))
    windows = x[:, rows[:, None, :, None], columns[None, :, None, :]]  # (B, H', W', K, K, C)
    return jnp.einsum("bijyxc,yxc->bijc", windows, kernel[:, :, 0])
