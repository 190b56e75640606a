"""Non-maximum suppression, exact and with static shapes. For the format of boxes see ``boxes``."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dat_jax.ops.detection.boxes import pairwise_iou, replace_invalid


class Detections(NamedTuple):
    """The best boxes over all classes, by descending score. Invalid entries are zero.

    Attributes:
      boxes: (D, 4).
      scores: (D,).
      labels: (D,) int32, the class.
      indices: (D,) int32, the row of the input.
      valid: (D,) bool.
      complete: () bool, False if detections may be missing because of the limit of candidates.
    """

    boxes: jax.Array
    scores: jax.Array
    labels: jax.Array
    indices: jax.Array
    valid: jax.Array
    complete: jax.Array


def nms(
    boxes: jax.Array,
    scores: jax.Array,
    *,
    threshold: float,
    valid: jax.Array | None = None,
    groups: jax.Array | None = None,
) -> jax.Array:
    """Greedy non-maximum suppression: by descending score, keeps a box unless it overlaps a box kept before too much.

    A box is kept exactly if no earlier box that is kept suppresses it. This rule is applied to all boxes at once and repeated
    until nothing changes, which gives the greedy result: each round settles at least the first unsettled box in order. It takes
    as many rounds as the longest chain of suppressions, 4 to 9 for 600 boxes, and N x N memory.

    Args:
      boxes: (N, 4).
      scores: (N,); boxes with equal scores are in the order of the input.
      threshold: a box is suppressed if the IoU is strictly greater. The IoU of two boxes without area is 0.
      valid: (N,) bool; invalid boxes are not kept and suppress nothing, whatever their values are. None if all are valid.
      groups: (N,) int, for example classes or levels: only boxes of the same group suppress each other. None for one group.

    Returns:
      (N,) bool, True for the boxes to keep, in the order of the input.

    Raises:
      ValueError: the shapes do not fit.

    Source: the rule is that of MMCV 1.7, ``nms``.
    """
    if boxes.ndim != 2 or boxes.shape[1] != 4 or scores.shape != boxes.shape[:1]:
        raise ValueError(f"nms expected boxes (N, 4) and scores (N,), got {boxes.shape} and {scores.shape}.")
    boxes, scores = lax.stop_gradient((boxes, scores))
    valid = jnp.ones(scores.shape, bool) if valid is None else valid
    boxes = replace_invalid(boxes, valid)
    order = jnp.arange(scores.shape[0], dtype=jnp.int32)
    # [i, j]: i comes before j
    first = (scores[:, None] > scores[None]) | ((scores[:, None] == scores[None]) & (order[:, None] < order[None]))
    suppresses = first & (pairwise_iou(boxes, boxes, eps=0) > threshold)
    if groups is not None:
        suppresses &= groups[:, None] == groups[None]

    def step(state):
        keep, _ = state
        after = valid & ~(suppresses & keep[:, None]).any(axis=0)
        return after, (after != keep).any()

    keep, _ = lax.while_loop(lambda state: state[1], step, (valid, valid.any()))
    return keep


def multiclass_nms(
    boxes: jax.Array,
    scores: jax.Array,
    *,
    score_threshold: float,
    iou_threshold: float,
    max_detections: int,
    candidates: int = 1000,
    chunk: int = 8,
) -> Detections:
    """Suppresses boxes within each class, then takes the best detections over all classes.

    Each class has its ``candidates`` best boxes above the score threshold. The result is exact if no class has more boxes above
    the threshold, or if ``max_detections`` detections score higher than every box that was left out; then ``complete`` is True.
    Otherwise detections with low scores may be missing, and others with even lower scores may take their place.

    Args:
      boxes: (N, K, 4), a box for each class, or (N, 4), one box for all classes.
      scores: (N, K), without background. A score that is NaN or not above the threshold masks a box out, whatever its
        values are.
      score_threshold: scores of detections are strictly greater; at least 0.
      iou_threshold: see ``nms``.
      max_detections: D.
      candidates: maximum number of boxes per class; memory is ``chunk * candidates**2`` numbers.
      chunk: number of classes processed at once.

    Returns:
      ``Detections``. Equal scores are ordered by class, then by row.

    Raises:
      ValueError: the shapes do not fit.

    Source: MMDetection 2.26, ``multiclass_nms``, without its background column. It separates classes by adding offsets to the
    boxes, which costs precision in float32; this function processes each class on its own.
    """
    count, classes = scores.shape
    if boxes.shape not in ((count, 4), (count, classes, 4)):
        raise ValueError(
            f"multiclass_nms expected boxes (N, 4) or (N, K, 4) for scores {scores.shape}, got {boxes.shape}."
        )
    boxes, scores = lax.stop_gradient((boxes, scores))
    above = jnp.where(scores > score_threshold, scores, 0).T  # (K, N)
    best, rows = lax.top_k(above, min(candidates, count))
    labels = jnp.broadcast_to(jnp.arange(classes, dtype=jnp.int32)[:, None], rows.shape)
    selected = boxes[rows] if boxes.ndim == 2 else boxes[rows, labels]  # (K, candidates, 4)
    selected = replace_invalid(selected, best > 0)

    def keep_of_class(arguments):
        return nms(*arguments, threshold=iou_threshold, valid=arguments[1] > 0)

    keep = lax.map(keep_of_class, (selected, best), batch_size=min(chunk, classes))
    remaining = jnp.where(keep, best, 0).reshape(-1)
    missing = max(0, max_detections - remaining.shape[0])
    top, places = lax.top_k(remaining, max_detections - missing)
    top, places = jnp.pad(top, (0, missing)), jnp.pad(places, (0, missing))
    valid = top > 0
    overflow = (above > 0).sum(axis=1) > rows.shape[1]
    complete = ~(overflow & (best[:, -1] >= top[-1])).any() if max_detections else jnp.asarray(True)
    return Detections(
        jnp.where(valid[:, None], selected.reshape(-1, 4)[places], 0),
        top,
        jnp.where(valid, labels.reshape(-1)[places], 0),
        jnp.where(valid, rows.reshape(-1)[places], 0).astype(jnp.int32),
        valid,
        complete,
    )
