"""Loss and detections of RetinaNet."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from dat_jax.models.retinanet import STRIDES, RetinaNet
from dat_jax.ops.detection.assignment import BACKGROUND
from dat_jax.ops.detection.boxes import decode_boxes, encode_boxes, replace_invalid
from dat_jax.ops.detection.nms import nms
from dat_jax.tasks.detection.anchor_check import AnchorSettings
from dat_jax.tasks.detection.anchors import (
    assign_anchors,
    gather_ground_truth,
    level_shapes,
    make_anchor_coder,
    make_level_anchors,
)
from dat_jax.tasks.detection.losses import masked_sum, sigmoid_focal_loss, smooth_l1

_THRESHOLDS = dict(positive=0.5, negative=0.4, min_positive=0.0)  # see ``assign_max_iou``


def retinanet_anchor_settings(*, scales: Sequence[float], ratios: Sequence[float]) -> AnchorSettings:
    """Return the anchors of a RetinaNet.

    An object below the positive threshold has one positive anchor or a few, too weak to be learned beside the background.
    """
    positive = _THRESHOLDS["positive"]
    return AnchorSettings(
        strides=STRIDES,
        scales=tuple(scales),
        ratios=tuple(ratios),
        inside_only=False,
        required=positive,
        positive=positive,
    )


@dataclasses.dataclass(frozen=True)
class RetinaNetSettings:
    """Settings of the postprocessing. Defaults are those of the published recipe.

    Attributes:
      candidates: number of pairs of an anchor and a class per level, those with the best scores, that enter NMS.
      score_threshold: detections have a score above this.
      iou_threshold: of boxes of one class with a larger IoU, NMS keeps only the one with the best score.
      max_detections: maximum number of detections per image.
    """

    candidates: int = 1000
    score_threshold: float = 0.05
    iou_threshold: float = 0.5
    max_detections: int = 100


def retinanet_loss(
    model: RetinaNet, outputs: Mapping[str, Sequence[jax.Array]], batch: dict
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Focal loss of positive and background anchors, and L1 loss of the deltas of positive anchors.

    Both are divided by the number of positive anchors, counting at least one per image.

    Args:
      model: model whose anchors are used.
      outputs: outputs of the model.
      batch: see ``tasks.detection.objective``.

    Returns:
      The total loss, and {"class_loss", "box_loss"}.
    """
    level_anchors = make_level_anchors(model, outputs, STRIDES)
    codes = assign_anchors(
        level_anchors,
        level_shapes(outputs),
        batch,
        strides=STRIDES,
        inside_only=False,
        **_THRESHOLDS,
    )
    count = jnp.maximum((codes >= 0).sum(axis=1), 1).sum()
    classes = jnp.arange(model.num_classes).reshape(1, 1, -1)
    coder = make_anchor_coder(model)
    class_loss = box_loss = start = 0
    for scores, deltas, anchors in zip(outputs["scores"], outputs["deltas"], level_anchors, strict=True):
        level_codes = codes[:, start : start + len(anchors)]
        start += len(anchors)
        positive = level_codes >= 0
        labels, targets = gather_ground_truth(batch, level_codes)
        is_class = positive[..., None] & (labels[..., None] == classes)
        focal = sigmoid_focal_loss(scores.reshape(*level_codes.shape, -1), is_class)
        class_loss += masked_sum(focal, positive | (level_codes == BACKGROUND))
        targets = encode_boxes(anchors[None], replace_invalid(targets, positive), **coder)
        box_loss += masked_sum(smooth_l1(deltas.reshape(targets.shape), targets, beta=0), positive)
    class_loss, box_loss = class_loss / count, box_loss / count
    return class_loss + box_loss, {"class_loss": class_loss, "box_loss": box_loss}


def retinanet_detect(
    model: RetinaNet, outputs: Mapping[str, Sequence[jax.Array]], batch: dict, settings: RetinaNetSettings
) -> dict[str, jax.Array]:
    """Detections of every image from the outputs of the model; see ``tasks.detection.objective`` for their format."""
    anchors = make_level_anchors(model, outputs, STRIDES)
    coder = make_anchor_coder(model)

    def detect(scores, deltas, image_shape, scale):
        levels = zip(scores, deltas, anchors, strict=True)
        candidates = [_best_of_level(*level, image_shape, settings, coder) for level in levels]
        boxes, scores, labels = (jnp.concatenate(parts) for parts in zip(*candidates, strict=True))
        boxes, valid = boxes / scale.reshape(1, 4), scores > 0
        keep = nms(boxes, scores, threshold=settings.iou_threshold, valid=valid, groups=labels)
        best, indices = lax.top_k(jnp.where(keep, scores, 0), min(settings.max_detections, len(scores)))
        valid = best > 0
        return {
            "boxes": jnp.where(valid[:, None], boxes[indices], 0),
            "scores": best,
            "labels": jnp.where(valid, labels[indices], 0),
            "valid": valid,
        }

    scores, deltas = (
        tuple(x.reshape(len(x), -1, last) for x in outputs[name])
        for name, last in (("scores", model.num_classes), ("deltas", 4))
    )
    return jax.vmap(detect)(scores, deltas, batch["valid"], batch["scale"])


def _best_of_level(scores, deltas, anchors, image_shape, settings, coder):
    """Boxes (n, 4), scores (n,) and labels (n,) of the best pairs of anchor and class. Scores below the threshold are 0."""
    # The anchors of the best n pairs are among the best n anchors by their best class, so only anchors are sorted first.
    count = min(settings.candidates, math.prod(scores.shape))
    _, rows = lax.top_k(scores.max(axis=-1), min(count, len(scores)))
    best, indices = lax.top_k(scores[rows].reshape(-1), count)
    rows, labels = rows[indices // scores.shape[-1]], indices % scores.shape[-1]
    boxes = decode_boxes(anchors[rows], deltas[rows], **coder, image_shape=image_shape)
    probabilities = jax.nn.sigmoid(best)
    return boxes, jnp.where(probabilities > settings.score_threshold, probabilities, 0), labels
