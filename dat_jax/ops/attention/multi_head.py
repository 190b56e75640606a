"""Multi-head attention on packed channels, the core of the other attention ops."""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from dat_jax.ops import dispatch, memory
from dat_jax.ops.layers.reduction import sum_over_axes

_RESULTS = "attention_results"
# Policy for ``jax.checkpoint``: keep the results of ``attend``, recompute its arguments.
KEEP_RESULTS = jax.checkpoint_policies.save_only_these_names(_RESULTS)


def split_heads(x: jax.Array, num_heads: int) -> jax.Array:
    """(..., N, C) -> (..., N, M, D); heads are consecutive in the channels.

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
      key: (..., Nk, C).
      value: (..., Nk, C).
      num_heads: M; the head width is D = C / M.
      bias: broadcastable to (..., M, Nq, Nk), of the same rank; -inf masks a pair out.

    Returns:
      (..., Nq, C), of the dtype of ``value``. Logits and softmax are float32 or better.
    """
    q, k, v = (jnp.moveaxis(split_heads(x, num_heads), -2, -3) for x in (query, key, value))  # (..., M, N, D)
    if bias is None:
        bias = jnp.zeros((1,) * q.ndim, jnp.promote_types(q.dtype, jnp.float32))
    out = attend(q, k, v, bias)
    return jnp.moveaxis(out, -3, -2).reshape(query.shape)


def attention_weights(query: jax.Array, key: jax.Array, *, num_heads: int, bias: jax.Array | None = None) -> jax.Array:
    """Attention weights softmax(q k^T / sqrt(D) + bias), for visualization. ``multi_head_attention`` never holds them.

    Args:
      query: (..., Nq, C).
      key: (..., Nk, C).
      num_heads: M; the head width is D = C / M.
      bias: broadcastable to (..., M, Nq, Nk), of the same rank; -inf masks a pair out.

    Returns:
      (..., M, Nq, Nk), float32 or better; the weights of a query sum to 1.
    """
    q, k = (jnp.moveaxis(split_heads(x, num_heads), -2, -3) for x in (query, key))
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    logits = jnp.einsum("...qd,...kd->...qk", q / math.sqrt(q.shape[-1]), k, preferred_element_type=dtype)
    return softmax(logits if bias is None else logits + bias)


def attend(query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array) -> jax.Array:
    """softmax(q k^T / sqrt(D) + bias) v, with the heads among the leading axes.

    For the backward pass it keeps its inputs and its output, and recomputes the weights.

    Args:
      query: (..., Nq, D).
      key: (..., Nk, D).
      value: (..., Nk, D).
      bias: broadcastable to (..., Nq, Nk), of the same rank, float32 or better.

    Returns:
      (..., Nq, D), of the dtype of ``value``.

    Source of the backward pass: FlashAttention (2205.14135), algorithm 4.
    """
    scale = 1 / math.sqrt(query.shape[-1])
    attend_scaled = _attend if dispatch.uses_custom_gradients() else _compute_attention
    if query.dtype == jnp.promote_types(query.dtype, bias.dtype):
        return attend_scaled(query * scale, key, value, bias, 1.0)
    return attend_scaled(
        query, key, value, bias, scale
    )  # scales the logits: a scaled bfloat16 query would be rounded again


def attend_backward(
    query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array, out: jax.Array, gradient: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Gradients of the arguments of ``attend``, from its arguments, its output and the gradient of the output."""
    scale = 1 / math.sqrt(query.shape[-1])
    if query.dtype == jnp.promote_types(query.dtype, bias.dtype):
        to_query, to_key, to_value, to_bias = _attend_backward(1.0, (query * scale, key, value, bias, out), gradient)
        return to_query * scale, to_key, to_value, to_bias
    return _attend_backward(scale, (query, key, value, bias, out), gradient)


def _compute_attention(query, key, value, bias, scale):
    exponentials, total = _exponentials(query, key, bias, scale)
    # Divides after the product: D numbers per query instead of Nk. On CPU all is then one loop that writes no weights.
    product = jnp.einsum(
        "...qk,...kd->...qd", exponentials.astype(value.dtype), value, preferred_element_type=total.dtype
    )
    return (product / total).astype(value.dtype)


_attend = jax.custom_vjp(_compute_attention, nondiff_argnums=(4,))


def _exponentials(query, key, bias, scale):
    """exp(logits - their maximum per query), (..., Nq, Nk), and the sums, (..., Nq, 1)."""
    dtype = jnp.promote_types(query.dtype, bias.dtype)
    logits = _times(jnp.einsum("...qd,...kd->...qk", query, key, preferred_element_type=dtype), scale) + bias
    # The result does not depend on the maximum. Its derivative would compare logits that the compiler may round differently.
    maximum = lax.stop_gradient(logits.max(axis=-1, keepdims=True))
    exponentials = jnp.exp(logits - maximum)
    return exponentials, exponentials.sum(axis=-1, keepdims=True)


def _times(x, scale):
    return x if scale == 1 else x * scale


def _attend_forward(query, key, value, bias, scale):
    out = checkpoint_name(_compute_attention(query, key, value, bias, scale), _RESULTS)
    return out, (query, key, value, bias, out)


def _attend_backward(scale, residuals, gradient):
    query, key, value, bias, out = memory.recompute_from(residuals)
    exponentials, total = _exponentials(query, key, bias, scale)
    dtype = total.dtype
    weights = exponentials / total
    to_weights = jnp.einsum("...qd,...kd->...qk", gradient, value, preferred_element_type=dtype)
    projection = (gradient.astype(dtype) * out.astype(dtype)).sum(axis=-1, keepdims=True)
    to_logits = weights * (to_weights - projection)
    scaled = _times(to_logits, scale).astype(query.dtype)
    to_query = jnp.einsum("...qk,...kd->...qd", scaled, key)
    # In this order the products transpose the gradient or the query, not the weights.
    to_key = jnp.einsum("...qd,...qk->...dk", query, scaled).swapaxes(-1, -2)
    to_value = jnp.einsum("...qd,...qk->...dk", gradient, weights.astype(value.dtype)).swapaxes(-1, -2)
    broadcast_axes = [axis for axis, size in enumerate(bias.shape) if size == 1 and to_logits.shape[axis] > 1]
    return to_query, to_key, to_value, sum_over_axes(to_logits, broadcast_axes).astype(bias.dtype)


_attend.defvjp(_attend_forward, _attend_backward)
