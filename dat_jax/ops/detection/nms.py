"""Non-maximum suppression, exact and of static size. Boxes are as in ``boxes``."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dat_jax.ops.detection import boxes as bx


class Detections(NamedTuple):
    """The best boxes over all classes, by descending score; all fields but ``complete`` are zero where not valid."""

    boxes: jax.Array  # (D, 4)
    scores: jax.Array  # (D,)
    labels: jax.Array  # (D,) int32, the class
    indices: jax.Array  # (D,) int32, the row of the input
    valid: jax.Array  # (D,) bool
    complete: jax.Array  # () bool: False if the limit of candidates may have cost a detection


def nms(
    boxes: jax.Array,
    scores: jax.Array,
    *,
    threshold: float,
    valid: jax.Array | None = None,
    groups: jax.Array | None = None,
) -> jax.Array:
    """Greedy non-maximum suppression: by descending score, a box is kept unless it overlaps one kept before too much.

    A box is kept exactly if no earlier kept one suppresses it. Computed for all boxes at once and repeated until nothing
    changes, that gives the greedy result: each round settles at least the first box in order that was not yet settled.
    Takes as many rounds as the longest chain of suppressions, 4 to 9 on 600 boxes, and N x N memory.

    Args:
      boxes: (N, 4).
      scores: (N,); of equal ones, the first box goes first.
      threshold: a box is suppressed if its IoU is strictly greater. Of two boxes without area it is not, being 0 / 0.
      valid: (N,) bool; others are not kept and suppress nothing, whatever their box and score are. None for all.
      groups: (N,) int, such as classes or levels: only boxes of the same group suppress each other. None for one group.

    Returns:
      (N,) bool, True for the boxes kept, in the order of the input.

    Raises:
      ValueError: the shapes do not fit.

    Source: the rule is that of MMCV 1.7, ``nms``.
    """
    if boxes.ndim != 2 or boxes.shape[1] != 4 or scores.shape != boxes.shape[:1]:
        raise ValueError(f"nms wants boxes (N, 4) and scores (N,), got {boxes.shape} and {scores.shape}.")
    boxes, scores = lax.stop_gradient((boxes, scores))
    valid = jnp.ones(scores.shape, bool) if valid is None else valid
    boxes = bx.replace_invalid(boxes, valid)
    order = jnp.arange(scores.shape[0], dtype=jnp.int32)
    # [i, j]: i comes before j
    first = (scores[:, None] > scores[None]) | ((scores[:, None] == scores[None]) & (order[:, None] < order[None]))
    suppresses = first & (bx.pairwise_iou(boxes, boxes, eps=0) > threshold)
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
    """Suppression within each class, then the best detections over all classes.

    A class takes part with its ``candidates`` best boxes above the score threshold. Leaving out worse ones changes nothing
    among those taken, so the result is exact as long as no class has more above the threshold, and even then if
    ``max_detections`` are found before the first one left out in order of score; ``complete`` says whether one
    of both was so. If not, detections with low scores are missing, and others with still lower ones may stand instead.

    Args:
      boxes: (N, K, 4), a box for each class, or (N, 4), the same for all.
      scores: (N, K), without background. Entries that are NaN are no detections; so a score that is not above the
        threshold, or NaN, masks a box out, whatever that is.
      score_threshold: a detection's score is strictly greater; at least 0.
      iou_threshold: see ``nms``.
      max_detections: D.
      candidates: largest number of boxes of one class; memory is ``chunk * candidates**2`` numbers.
      chunk: number of classes treated at once.

    Returns:
      ``Detections``. Of equal scores, the lower class goes first, then the lower row.

    Raises:
      ValueError: the shapes do not fit.

    Source: MMDetection 2.26, ``multiclass_nms``, whose background column is left out here. It adds offsets to keep the classes
    apart, which costs precision in float32; here each class is on its own.
    """
    count, classes = scores.shape
    if boxes.shape not in ((count, 4), (count, classes, 4)):
        raise ValueError(
            f"multiclass_nms wants boxes (N, 4) or (N, K, 4) for scores {scores.shape}, got {boxes.shape}."
        )
    boxes, scores = lax.stop_gradient((boxes, scores))
    above = jnp.where(scores > score_threshold, scores, 0).T  # (K, N)
    best, rows = lax.top_k(above, min(candidates, count))
    labels = jnp.broadcast_to(jnp.arange(classes, dtype=jnp.int32)[:, None], rows.shape)
    chosen = boxes[rows] if boxes.ndim == 2 else boxes[rows, labels]  # (K, candidates, 4)
    chosen = bx.replace_invalid(chosen, best > 0)

    def keep_of_class(arguments):
        return nms(*arguments, threshold=iou_threshold, valid=arguments[1] > 0)

    keep = lax.map(keep_of_class, (chosen, best), batch_size=min(chunk, classes))
    kept = jnp.where(keep, best, 0).reshape(-1)
    missing = max(0, max_detections - kept.shape[0])
    top, places = lax.top_k(kept, max_detections - missing)
    top, places = jnp.pad(top, (0, missing)), jnp.pad(places, (0, missing))
    valid = top > 0
    overflow = (above > 0).sum(axis=1) > rows.shape[1]
    complete = ~(overflow & (best[:, -1] >= top[-1])).any() if max_detections else jnp.asarray(True)
    return Detections(
        jnp.where(valid[:, None], chosen.reshape(-1, 4)[places], 0),
        top,
        jnp.where(valid, labels.reshape(-1)[places], 0),
        jnp.where(valid, rows.reshape(-1)[places], 0).astype(jnp.int32),
        valid,
        complete,
    )
