"""Loss and proposals of the region proposal network (RPN) of Mask R-CNN and Cascade Mask R-CNN."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dat_jax.models.rcnn import RCNN
from dat_jax.models.rpn import STRIDES
from dat_jax.ops.detection.assignment import sample_assigned
from dat_jax.ops.detection.boxes import decode_boxes, encode_boxes, replace_invalid
from dat_jax.ops.detection.nms import nms
from dat_jax.tasks.detection import losses
from dat_jax.tasks.detection.anchor_check import AnchorSettings
from dat_jax.tasks.detection.anchors import (
    assign_anchors,
    gather_ground_truth,
    level_shapes,
    make_anchor_coder,
    make_level_anchors,
)

_THRESHOLDS = dict(positive=0.7, negative=0.3, min_positive=0.3)  # see ``assign_max_iou``


def rpn_anchor_settings(*, scales: Sequence[float], ratios: Sequence[float], inside_only: bool) -> AnchorSettings:
    """Return the anchors of an RPN. Objects below the positive threshold are learned with their best anchors."""
    return AnchorSettings(
        strides=STRIDES,
        scales=tuple(scales),
        ratios=tuple(ratios),
        inside_only=inside_only,
        required=_THRESHOLDS["min_positive"],
        positive=_THRESHOLDS["positive"],
    )


class Proposals(NamedTuple):
    """Scored region proposals of B images, in descending order of the scores.

    Attributes:
      boxes: (B, P, 4), as x1, y1, x2, y2 in pixels of the network's input.
      scores: (B, P), from 0 to 1.
      valid: bool (B, P), False for padding.
    """

    boxes: jax.Array
    scores: jax.Array
    valid: jax.Array


def rpn_loss(
    model: RCNN,
    outputs: Mapping[str, Sequence[jax.Array]],
    batch: dict,
    keys: jax.Array | None,
    *,
    samples: int,
    positive_fraction: float,
    beta: float,
    inside_only: bool,
) -> dict[str, jax.Array]:
    """Binary cross-entropy of sampled anchors, and smooth L1 loss of the deltas of the positive ones.

    Both are divided by the number of samples.

    Args:
      model: model whose anchors are used.
      outputs: outputs of ``RCNN.propose``.
      batch: see ``tasks.detection.objective``.
      keys: random keys (B,) for sampling; None takes the first anchors.
      samples: number of sampled anchors per image.
      positive_fraction: maximum fraction of positive anchors among them.
      beta: beta of the smooth L1 loss.
      inside_only: whether anchors that extend beyond their image are excluded.

    Returns:
      {"rpn_class_loss", "rpn_box_loss"}.
    """
    anchors = make_level_anchors(model, outputs, STRIDES)
    codes = assign_anchors(
        anchors,
        level_shapes(outputs),
        batch,
        strides=STRIDES,
        inside_only=inside_only,
        **_THRESHOLDS,
    )
    options = dict(count=samples, positive_fraction=positive_fraction)
    sample = map_keys(functools.partial(sample_assigned, **options), keys, codes)

    def take(levels, last):
        flat = jnp.concatenate([x.reshape(len(codes), -1, last) for x in levels], axis=1)
        return jnp.take_along_axis(flat, sample.indices[..., None], axis=1)

    class_losses = losses.binary_cross_entropy(take(outputs["scores"], 1), sample.is_positive[..., None])
    _, boxes = gather_ground_truth(batch, jnp.take_along_axis(codes, sample.indices, axis=1))
    targets = encode_boxes(
        jnp.concatenate(anchors)[sample.indices],
        replace_invalid(boxes, sample.is_positive),
        **make_anchor_coder(model),
    )
    box_losses = losses.smooth_l1(take(outputs["deltas"], 4), targets, beta=beta)
    parts = sample.is_positive, sample.is_valid & ~sample.is_positive
    count = sum(jnp.maximum(part.sum(axis=1), 1).sum() for part in parts)
    return {
        "rpn_class_loss": losses.masked_sum(class_losses, sample.is_valid) / count,
        "rpn_box_loss": losses.masked_sum(box_losses, sample.is_positive) / count,
    }


def choose_proposals(
    model: RCNN,
    outputs: Mapping[str, Sequence[jax.Array]],
    image_shapes: jax.Array,
    *,
    candidates: int,
    count: int,
    iou_threshold: float,
) -> Proposals:
    """Proposals of the RPN: the best candidates of each level, NMS within each level, and the best boxes of all levels.

    Args:
      model: model whose anchors are used.
      outputs: outputs of ``RCNN.propose``.
      image_shapes: height and width of each image, int (B, 2), to which boxes are clipped.
      candidates: number of candidates per level.
      count: maximum number of proposals per image.
      iou_threshold: of boxes of one level with a larger IoU, NMS keeps only the one with the best score.
    """
    anchors = make_level_anchors(model, outputs, STRIDES)
    per_level = min(candidates, max(map(len, anchors)))
    coder = make_anchor_coder(model)

    def choose(scores, deltas, image_shape):
        levels = []
        for level_scores, level_deltas, level_anchors in zip(scores, deltas, anchors, strict=True):
            best, indices = lax.top_k(level_scores, min(per_level, len(level_anchors)))
            boxes = decode_boxes(level_anchors[indices], level_deltas[indices], **coder, image_shape=image_shape)
            missing = per_level - len(indices)
            levels.append(
                (
                    jnp.pad(boxes, ((0, missing), (0, 0))),
                    jnp.pad(best, (0, missing), constant_values=-jnp.inf),
                )
            )
        boxes, scores = (jnp.stack(parts) for parts in zip(*levels, strict=True))
        valid = (scores > -jnp.inf) & (boxes[..., 2:] > boxes[..., :2]).all(axis=-1)
        keep = jax.vmap(lambda b, s, v: nms(b, s, threshold=iou_threshold, valid=v))(boxes, scores, valid)
        scores = jnp.where(keep, scores, -jnp.inf).reshape(-1)
        best, indices = lax.top_k(scores, min(count, len(scores)))
        valid = best > -jnp.inf
        return replace_invalid(boxes.reshape(-1, 4)[indices], valid), jax.nn.sigmoid(best), valid

    scores = tuple(x.reshape(len(x), -1) for x in outputs["scores"])
    deltas = tuple(x.reshape(len(x), -1, 4) for x in outputs["deltas"])
    return Proposals(*lax.stop_gradient(jax.vmap(choose)(scores, deltas, image_shapes)))


def map_keys(function: Callable, keys: jax.Array | None, *arrays: jax.Array) -> Any:
    """Map ``function(key, ...)`` over the images; the key is None if ``keys`` is None."""
    if keys is None:
        return jax.vmap(functools.partial(function, None))(*arrays)
    return jax.vmap(function)(keys, *arrays)
