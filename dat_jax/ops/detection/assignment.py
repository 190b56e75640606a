"""Assignment of boxes to ground truths by overlap, and sampling from what was assigned, all of static size.

Codes of an assignment: >= 0 is the index of a ground truth, and the constants below.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dat_jax.ops.detection import boxes as bx

BACKGROUND = -1
IGNORED = -2  # between the thresholds
NOT_CONSIDERED = -3  # not a valid box


class Sample(NamedTuple):
    """A choice of boxes; positives come first, then negatives, then what is not valid."""

    indices: jax.Array  # (count,) int32, into the assignment; 0 where not valid
    is_positive: jax.Array  # (count,) bool
    is_valid: jax.Array  # (count,) bool


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
    """Assigns each box, an anchor or a proposal, to the ground truth with which its IoU is largest.

    A box is positive from an IoU of ``positive`` on, background below ``negative``, ignored between. With
    ``match_low_quality``, each ground truth whose best IoU is at least ``min_positive`` also gets every box that ties this
    best one exactly, whatever the box had before; of several such ground truths the last one gets it. As published, this
    holds too where the best IoU is 0 and ``min_positive`` is 0: a ground truth that touches no box gets all boxes that
    it does not touch, so leave out ground truths without area.

    Needs several arrays of N x G at once: map over images where N is all anchors of a large one.

    Args:
      boxes: (N, 4).
      ground_truths: (G, 4), G >= 1, padded.
      valid_boxes: (N,) bool, or None for all.
      valid_ground_truths: (G,) bool, or None for all.
      positive: least IoU of a positive box.
      negative: IoU from which on a box is no longer background.
      min_positive: least IoU of a low-quality match, at least 0.
      match_low_quality: whether there are such matches.

    Returns:
      Codes (N,) int32, and each box's largest IoU (N,): 0 without a valid ground truth, -1 for a box not considered.
      Neither has a gradient.

    Source: MMDetection 2.26, ``MaxIoUAssigner``.
    """
    boxes, ground_truths = lax.stop_gradient((boxes, ground_truths))
    valid_boxes = jnp.ones(boxes.shape[0], bool) if valid_boxes is None else valid_boxes
    valid_ground_truths = jnp.ones(ground_truths.shape[0], bool) if valid_ground_truths is None else valid_ground_truths
    overlaps = bx.pairwise_iou(
        bx.replace_invalid(boxes, valid_boxes), bx.replace_invalid(ground_truths, valid_ground_truths)
    )
    overlaps = jnp.where(valid_boxes[:, None] & valid_ground_truths[None, :], overlaps, -1)
    # Ties are found by equality. A compiler that computed overlaps once more for the comparison, fused otherwise and
    # so rounded otherwise, would lose them.
    overlaps = lax.optimization_barrier(overlaps)
    best = jnp.maximum(overlaps.max(axis=1), 0)
    codes = jnp.where(best < negative, BACKGROUND, IGNORED).astype(jnp.int32)
    # Without a ground truth all is background, even with negative = 0.
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
    """Chooses a fixed number of positive and background boxes.

    At most int(count * positive_fraction) positives; background fills the rest, and where there is not enough of it, the
    sample is smaller than ``count``. All positives are in the first int(count * positive_fraction) places. Ground truths
    take part if the caller puts them in front: codes 0, 1, 2, ..., and NOT_CONSIDERED where they are padding.

    Args:
      key: every choice of the right size is equally likely; with None the first ones in ascending index are taken.
      assigned: (N,) int codes of ``assign_max_iou``.
      count: size of the sample.
      positive_fraction: largest part of it that may be positive.

    Returns:
      A ``Sample``, in no particular order within positives and within negatives.

    Source: MMDetection 2.26, ``RandomSampler`` without an upper bound of negatives to positives.
    """
    priority = jnp.zeros(assigned.shape, jnp.int32)
    if key is not None:  # 31 random bits: of ties, which are rare, the first wins
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


def _first_by_priority(priority, wanted, limit):
    """How many of the wanted there are, at most ``limit``, and indices of which that many are the ones chosen."""
    # top_k is stable: with equal priorities, the lowest indices
    _, indices = lax.top_k(jnp.where(wanted, priority, -1), min(limit, priority.shape[0]))
    return jnp.minimum(wanted.sum(dtype=jnp.int32), limit), indices.astype(jnp.int32)
