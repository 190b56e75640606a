"""Assignment of boxes to ground truth by overlap, and sampling of assigned boxes, all with static shapes.

The code of an assigned box is the index of a ground-truth box, >= 0, or one of the constants below.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dat_jax.ops.detection.boxes import pairwise_iou, replace_invalid

BACKGROUND = -1
IGNORED = -2  # between the thresholds
NOT_CONSIDERED = -3  # not a valid box


class Sample(NamedTuple):
    """Sampled boxes: positives come first, then negatives, then invalid entries.

    Attributes:
      indices: (count,) int32, into the assignment; 0 where not valid.
      is_positive: (count,) bool.
      is_valid: (count,) bool.
    """

    indices: jax.Array
    is_positive: jax.Array
    is_valid: jax.Array


def assign_max_iou(
    boxes: jax.Array,
    ground_truths: jax.Array,
    *,
    valid_boxes: jax.Array | None,
    valid_ground_truths: jax.Array | None,
    positive: float,
    negative: float,
    min_positive: float,
    match_low_quality: bool,
) -> tuple[jax.Array, jax.Array]:
    """Assigns each box, an anchor or a proposal, to the ground-truth box with the largest IoU.

    A box is positive if its IoU is at least ``positive``, background if it is below ``negative``, and ignored otherwise.

    With ``match_low_quality``, a ground-truth box whose best IoU is at least ``min_positive`` also gets every box with exactly
    this IoU, whatever the box's code was. If there are several such ground-truth boxes, the last one gets it. As published, this
    also applies if the best IoU and ``min_positive`` are 0: a ground-truth box that overlaps no box gets all boxes, so
    exclude ground truth without area.

    Several arrays of shape (N, G) are in memory at once: map over the images if N is the number of anchors of a large image.

    Args:
      boxes: (N, 4).
      ground_truths: (G, 4), G >= 1, padded.
      valid_boxes: (N,) bool, or None for all.
      valid_ground_truths: (G,) bool, or None for all.
      positive: minimum IoU of a positive box.
      negative: IoU below which a box is background.
      min_positive: minimum IoU of a low-quality match, at least 0.
      match_low_quality: whether to make low-quality matches.

    Returns:
      Codes (N,) int32, and the largest IoU of each box (N,): 0 if no ground truth is valid, -1 for a box that is not considered.
      Neither has a gradient.

    Source: MMDetection 2.26, ``MaxIoUAssigner``.
    """
    boxes, ground_truths = lax.stop_gradient((boxes, ground_truths))
    valid_boxes = jnp.ones(boxes.shape[0], bool) if valid_boxes is None else valid_boxes
    valid_ground_truths = jnp.ones(ground_truths.shape[0], bool) if valid_ground_truths is None else valid_ground_truths
    overlaps = pairwise_iou(replace_invalid(boxes, valid_boxes), replace_invalid(ground_truths, valid_ground_truths))
    overlaps = jnp.where(valid_boxes[:, None] & valid_ground_truths[None, :], overlaps, -1)
    # Equality detects ties. If the compiler recomputed the overlaps for the comparison, fused and so rounded differently, ties
    # would be lost.
    overlaps = lax.optimization_barrier(overlaps)
    best = jnp.maximum(overlaps.max(axis=1), 0)
    codes = jnp.where(best < negative, BACKGROUND, IGNORED).astype(jnp.int32)
    # Without ground truth all boxes are background, even with negative = 0.
    codes = jnp.where(valid_ground_truths.any(), codes, BACKGROUND)
    codes = jnp.where(overlaps.max(axis=1) >= positive, overlaps.argmax(axis=1).astype(jnp.int32), codes)
    if match_low_quality:
        best_of_truth = overlaps.max(axis=0, keepdims=True)
        ties = (overlaps == best_of_truth) & (best_of_truth >= max(min_positive, 0.0))
        order = jnp.arange(ground_truths.shape[0], dtype=jnp.int32)[None, :]
        last = jnp.where(ties, order, -1).max(axis=1)
        codes = jnp.where(last >= 0, last, codes)
    return jnp.where(valid_boxes, codes, NOT_CONSIDERED), jnp.where(valid_boxes, best, -1)


def sample_assigned(key: jax.Array | None, assigned: jax.Array, *, count: int, positive_fraction: float) -> Sample:
    """Samples a fixed number of positive and background boxes.

    There are at most int(count * positive_fraction) positives, all in the first int(count * positive_fraction) places.
    Background fills the rest; if there is not enough of it, fewer than ``count`` entries are valid. To sample ground-truth boxes
    too, put them in front, with codes 0, 1, 2, ..., and NOT_CONSIDERED for padding.

    Args:
      key: random key; every choice of the right size is equally likely. None takes the lowest indices.
      assigned: (N,) int codes of ``assign_max_iou``.
      count: size of the sample.
      positive_fraction: maximum fraction of positives.

    Returns:
      A ``Sample``, in no particular order within positives and within negatives.

    Source: MMDetection 2.26, ``RandomSampler`` without an upper bound of negatives to positives.
    """
    priority = jnp.zeros(assigned.shape, jnp.int32)
    if key is not None:  # 31 random bits: ties are rare, and the first one wins
        priority = (jax.random.bits(key, assigned.shape, jnp.uint32) >> 1).astype(jnp.int32)
    num_positive, positives = _first_by_priority(priority, assigned >= 0, int(count * positive_fraction))
    num_negative, negatives = _first_by_priority(priority, assigned == BACKGROUND, count)
    place = jnp.arange(count, dtype=jnp.int32)
    is_positive = place < num_positive
    is_valid = place < num_positive + jnp.minimum(num_negative, count - num_positive)
    positives = jnp.pad(positives, (0, count - positives.shape[0]))
    negatives = jnp.pad(negatives, (0, count - negatives.shape[0]))[jnp.maximum(place - num_positive, 0)]
    indices = jnp.where(is_positive, positives, negatives)
    return Sample(jnp.where(is_valid, indices, 0), is_positive, is_valid)


def _first_by_priority(priority, mask, limit):
    """The number of boxes in the mask, at most ``limit``, and indices whose first entries are that many sampled boxes."""
    # top_k is stable: with equal priorities, the lowest indices
    _, indices = lax.top_k(jnp.where(mask, priority, -1), min(limit, priority.shape[0]))
    return jnp.minimum(mask.sum(dtype=jnp.int32), limit), indices.astype(jnp.int32)
