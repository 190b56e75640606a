"""Slide attention: 3 x 3 local attention whose keys are shifted copies, fixed and learned."""

import jax
import jax.numpy as jnp

from dat_jax.ops.attention import multi_head as attention


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
    """Attention of each pixel to nine versions of its neighbourhood.

    Version j = 3 * dy + dx of a channel is its copy shifted by (dy - 1, dx - 1), zero outside the map, plus a learned
    3 x 3 convolution of that channel, plus a bias. Kernel and bias are shared by the heads and by keys and values.
    Nothing is masked at the borders.

    Args:
      query, key, value: (B, H, W, M * D), heads consecutive in the channels.
      kernel: (3, 3, 1, 9 * D), the learned convolution; output channel c * 9 + j is version j of channel c of a head.
      bias: (9 * D,), of both convolutions together.
      table: (M, 9), added to all channels of version j of the keys.
      num_heads: M.
      scale: of the logits. The published model takes 1 / sqrt(C / M) with C = 4 * M * D, its full width.

    Returns:
      (B, H, W, M * D), of the dtype of ``value``.

    Source: Slide-Transformer (2304.04237), as the published DAT++ code has it.
    """
    _, height, width, channels = query.shape
    head_width = channels // num_heads
    taps = kernel.reshape(9, head_width, 9)  # (tap, channel of a head, version)
    # The fixed convolution has a one-hot kernel: version j is tap j.
    taps = taps + jnp.eye(9, dtype=taps.dtype)[:, None, :]

    def versions(x):  # (B, H, W, M * D) -> (B, H, W, M, 9, D)
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        copies = [x[:, dy : dy + height, dx : dx + width] for dy in range(3) for dx in range(3)]
        copies = attention.split_heads(jnp.stack(copies), num_heads)
        mixed = jnp.einsum("sbhwmd,sdj->bhwmjd", copies, taps)
        return mixed + bias.reshape(head_width, 9).T.reshape(1, 1, 1, 1, 9, head_width)

    dtype = jnp.promote_types(query.dtype, jnp.float32)
    keys = versions(key) + table.reshape(1, 1, 1, num_heads, 9, 1)
    queries = attention.split_heads(query * scale, num_heads)
    logits = jnp.einsum("bhwmd,bhwmjd->bhwmj", queries, keys, preferred_element_type=dtype)
    weights = attention.softmax(logits).astype(value.dtype)
    return jnp.einsum("bhwmj,bhwmjd->bhwmd", weights, versions(value)).reshape(value.shape)
