"""Elementwise losses of detectors, and masked sums of them.

Masked predictions must be finite, as those of networks are; masked targets may be anything.
"""

import jax
import jax.numpy as jnp

from dat_jax.ops.detection.boxes import aligned_giou


def masked_sum(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Sum of the values (..., D) whose mask (...) is True. The gradient of the other values is 0."""
    return jnp.where(mask[..., None], values, 0).sum()


def binary_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Binary cross-entropy of the sigmoid of logits, in their shape. Targets are bool, or numbers from 0 to 1."""
    return jax.nn.softplus(logits) - logits * targets


def sigmoid_focal_loss(logits: jax.Array, targets: jax.Array, *, gamma: float = 2.0, alpha: float = 0.25) -> jax.Array:
    """Focal loss, in the shape of the logits.

    It is the binary cross-entropy times alpha (1 - p) ** gamma for targets and times (1 - alpha) p ** gamma for others, where
    p is the sigmoid of the logits.

    Args:
      logits: any shape.
      targets: bool, in the same shape.
      gamma: exponent that reduces the weight of easy examples.
      alpha: weight of targets; that of others is 1 - alpha.

    Source: RetinaNet (1708.02002), equation 5.
    """
    p = jax.nn.sigmoid(logits)
    weights = jnp.where(targets, alpha * (1 - p) ** gamma, (1 - alpha) * p**gamma)
    return weights * binary_cross_entropy(logits, targets)


def softmax_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross-entropy (..., 1) of the softmax of logits (..., K) with integer labels (...)."""
    is_label = labels[..., None] == jnp.arange(logits.shape[-1]).reshape((1,) * labels.ndim + (-1,))
    return jax.nn.logsumexp(logits, axis=-1, keepdims=True) - jnp.where(is_label, logits, 0).sum(axis=-1, keepdims=True)


def smooth_l1(predictions: jax.Array, targets: jax.Array, *, beta: float) -> jax.Array:
    """Smooth L1 loss of differences d, in the shape of the predictions.

    It is d ** 2 / (2 beta) if |d| < beta, and |d| - beta / 2 otherwise. With beta 0 it is |d|.
    """
    difference = jnp.abs(predictions - targets)
    if beta == 0:
        return difference
    return jnp.where(difference < beta, 0.5 * difference**2 / beta, difference - 0.5 * beta)


def giou_loss(boxes: jax.Array, targets: jax.Array) -> jax.Array:
    """1 - GIoU, (..., 1), of boxes (..., 4) and their targets (..., 4)."""
    return 1 - aligned_giou(boxes, targets)[..., None]
