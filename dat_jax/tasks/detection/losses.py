"""Losses of detectors, number by number, and their sums over what counts.

Predictions that do not count must be finite, as those of networks are; targets that do not count may be anything.
"""

import jax
import jax.numpy as jnp

from dat_jax.ops.detection import boxes as bx


def masked_sum(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Sum of the values (..., D) whose mask (...) is True; the others have no gradient."""
    return jnp.where(mask[..., None], values, 0).sum()


def binary_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Of a sigmoid, in the shape of the logits; targets are bool, or from 0 to 1."""
    return jax.nn.softplus(logits) - logits * targets


def sigmoid_focal_loss(logits: jax.Array, targets: jax.Array, *, gamma: float = 2.0, alpha: float = 0.25) -> jax.Array:
    """Cross-entropy of a sigmoid times alpha (1 - p) ** gamma for targets, (1 - alpha) p ** gamma for others.

    Args:
      logits: any shape.
      targets: bool, of the same shape.
      gamma, alpha: how much what is easy, and what is no target, counts less.

    Source: RetinaNet (1708.02002), equation 5.
    """
    p = jax.nn.sigmoid(logits)
    weights = jnp.where(targets, alpha * (1 - p) ** gamma, (1 - alpha) * p**gamma)
    return weights * binary_cross_entropy(logits, targets)


def softmax_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Logits (..., K) and labels (...), int -> (..., 1)."""
    own = labels[..., None] == jnp.arange(logits.shape[-1]).reshape((1,) * labels.ndim + (-1,))
    return jax.nn.logsumexp(logits, axis=-1, keepdims=True) - jnp.where(own, logits, 0).sum(axis=-1, keepdims=True)


def smooth_l1(predictions: jax.Array, targets: jax.Array, *, beta: float) -> jax.Array:
    """|d| - beta / 2 from beta on, below it d ** 2 / (2 beta); |d| with beta 0. In the shape of the predictions."""
    difference = jnp.abs(predictions - targets)
    if beta == 0:
        return difference
    return jnp.where(difference < beta, 0.5 * difference**2 / beta, difference - 0.5 * beta)


def giou_loss(boxes: jax.Array, targets: jax.Array) -> jax.Array:
    """1 - GIoU of boxes (..., 4) with their targets: (..., 1)."""
    return 1 - bx.aligned_giou(boxes, targets)[..., None]
