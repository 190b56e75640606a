"""Slide attention: 3 x 3 local attention whose keys are shifted copies, fixed and learned."""

import jax
import jax.numpy as jnp

from dat_jax.ops.attention.multi_head import softmax, split_heads


def slide_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    table: jax.Array,
    *,
    num_heads: int,
    scale: float,
) -> jax.Array:
    """Attention of each pixel to nine versions of its neighborhood.

    Version j = 3 * dy + dx of a channel is its copy shifted by (dy - 1, dx - 1), zero outside the map, plus a learned
    3 x 3 convolution of that channel, plus a bias. Kernel and bias are shared by the heads and by keys and values.
    Nothing is masked at the borders.

    Args:
      query: (B, H, W, M * D), heads consecutive in the channels.
      key: (B, H, W, M * D).
      value: (B, H, W, M * D).
      kernel: (3, 3, 1, 9 * D), the learned convolution; output channel c * 9 + j is version j of channel c of a head.
      bias: (9 * D,), the sum of the biases of both convolutions.
      table: (M, 9), added to all channels of version j of the keys.
      num_heads: M.
      scale: factor of the logits. The published model uses 1 / sqrt(C / M) with its full width C = 4 * M * D.

    Returns:
      (B, H, W, M * D), of the dtype of ``value``.

    Source: Slide-Transformer (2304.04237), in the form of the published DAT++ code.
    """
    _, height, width, channels = query.shape
    head_width = channels // num_heads
    taps = kernel.reshape(9, head_width, 9)  # (tap, channel of a head, version)
    # The fixed convolution has a one-hot kernel: version j is tap j.
    taps = taps + jnp.eye(9, dtype=taps.dtype)[:, None, :]

    def versions(x):  # (B, H, W, M * D) -> (B, H, W, M, 9, D)
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        copies = [x[:, dy : dy + height, dx : dx + width] for dy in range(3) for dx in range(3)]
        copies = split_heads(jnp.stack(copies), num_heads)
        mixed = jnp.einsum("sbhwmd,sdj->bhwmjd", copies, taps)
        return mixed + bias.reshape(head_width, 9).T.reshape(1, 1, 1, 1, 9, head_width)

    dtype = jnp.promote_types(query.dtype, jnp.float32)
    keys = versions(key) + table.reshape(1, 1, 1, num_heads, 9, 1)
    queries = split_heads(query * scale, num_heads)
    logits = jnp.einsum("bhwmd,bhwmjd->bhwmj", queries, keys, preferred_element_type=dtype)
    weights = softmax(logits).astype(value.dtype)
    return jnp.einsum("bhwmj,bhwmjd->bhwmd", weights, versions(value)).reshape(value.shape)
