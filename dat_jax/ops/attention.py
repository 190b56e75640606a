"""Plain multi-head attention on packed channels: the core that the other attention ops share."""

import math

import jax
import jax.numpy as jnp


def split_heads(x: jax.Array, num_heads: int) -> jax.Array:
    """(..., N, C) -> (..., N, M, D), heads consecutive in the channels.

    Raises:
      ValueError: C is not a multiple of ``num_heads``.
    """
    if x.shape[-1] % num_heads:
        raise ValueError(f"{x.shape[-1]} channels cannot be split into {num_heads} heads of equal width.")
    return x.reshape(*x.shape[:-1], num_heads, x.shape[-1] // num_heads)


def softmax(logits: jax.Array, *, axis: int = -1) -> jax.Array:
    """Softmax in float32 or better, whatever the dtype of the logits."""
    return jax.nn.softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), axis=axis)


def multi_head_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    num_heads: int,
    bias: jax.Array | None = None,
) -> jax.Array:
    """softmax(q k^T / sqrt(D) + bias) v, over the last two axes; leading axes are batch axes.

    Args:
      query: (..., Nq, C).
      key, value: (..., Nk, C).
      num_heads: M; head width D = C / M.
      bias: broadcastable to (..., M, Nq, Nk), same rank; -inf masks a pair out.

    Returns:
      (..., Nq, C), of the dtype of ``value``. Logits and softmax are float32 or better.
    """
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    heads = [split_heads(x, num_heads) for x in (query, key, value)]
    scale = 1 / math.sqrt(heads[0].shape[-1])
    logits = jnp.einsum("...qmd,...kmd->...mqk", heads[0], heads[1], preferred_element_type=dtype) * scale
    if bias is not None:
        logits = logits + bias.astype(dtype)
    weights = softmax(logits).astype(value.dtype)
    return jnp.einsum("...mqk,...kmd->...qmd", weights, heads[2]).reshape(query.shape)
