"""Mask R-CNN and Cascade Mask R-CNN: which boxes are looked at, what they learn, and the detections that they give.

All arrays have static shapes: proposals and samples are padded, and what is padding counts nowhere.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dat_jax.models.rcnn import RCNN
from dat_jax.models.rpn import STRIDES
from dat_jax.ops.detection import boxes as bx
from dat_jax.ops.detection.assignment import NOT_CONSIDERED, assign_max_iou, sample_assigned
from dat_jax.ops.detection.masks import mask_targets
from dat_jax.ops.detection.nms import multiclass_nms, nms
from dat_jax.ops.detection.roi_align import pyramid_roi_align
from dat_jax.tasks.detection import losses
from dat_jax.tasks.detection.anchors import (
    assign_anchors,
    level_shapes,
    make_anchor_coder,
    make_level_anchors,
    take_truths,
    truths_that_count,
)

_ROI_LEVELS = 4  # of the pyramid, from the finest on


@dataclasses.dataclass(frozen=True)
class Stage:
    """A pair of heads, for boxes and for masks.

    Attributes:
      iou: overlap with a ground truth from which on a box is positive; below it, it is background.
      match_low_quality: see ``assign_max_iou``; published for Mask R-CNN only.
      means, stds: of the deltas, see ``encode_boxes``.
      weight: of the stage's losses.
    """

    iou: float = 0.5
    match_low_quality: bool = False
    means: tuple[float, ...] = (0.0,) * 4
    stds: tuple[float, ...] = (0.1, 0.1, 0.2, 0.2)
    weight: float = 1.0

    @property
    def coder(self) -> dict:
        """Of boxes."""
        return dict(means=self.means, stds=self.stds)


@dataclasses.dataclass(frozen=True)
class RCNNSettings:
    """Source: the published recipes.

    Attributes:
      stages: one, or three of a cascade.
      giou: boxes learn by 10 times GIoU of the decoded box, as in a cascade, else by L1 of deltas.
      rpn_beta: of the smooth L1 loss of the RPN's deltas.
      rpn_inside_only: whether anchors that reach out of their image are left out.
      rpn_samples, rpn_positive: anchors of an image that learn, and the largest part of them that may be positive.
      roi_samples, roi_positive: likewise, of proposals and ground truths, in every stage.
      train_candidates, train_proposals: the best anchors of a level, and what is left of all levels after NMS.
      test_candidates, test_proposals: likewise, for detections.
      proposal_iou: of proposals of one level that overlap more only the best one stays.
      score_threshold, iou_threshold, max_detections: as in ``RetinaNetSettings``.
    """

    stages: tuple[Stage, ...] = (Stage(match_low_quality=True),)
    giou: bool = False
    rpn_beta: float = 0.0
    rpn_inside_only: bool = False
    rpn_samples: int = 256
    rpn_positive: float = 0.5
    roi_samples: int = 512
    roi_positive: float = 0.25
    train_candidates: int = 2000
    train_proposals: int = 1000
    test_candidates: int = 1000
    test_proposals: int = 1000
    proposal_iou: float = 0.7
    score_threshold: float = 0.05
    iou_threshold: float = 0.5
    max_detections: int = 100


MASK_RCNN = RCNNSettings()
CASCADE = RCNNSettings(
    stages=(
        Stage(iou=0.5, stds=(0.1, 0.1, 0.2, 0.2), weight=1.0),
        Stage(iou=0.6, stds=(0.05, 0.05, 0.1, 0.1), weight=0.5),
        Stage(iou=0.7, stds=(0.033, 0.033, 0.067, 0.067), weight=0.25),
    ),
    giou=True,
    rpn_beta=1 / 9,
    rpn_inside_only=True,
    train_proposals=2000,
)


def set_box_coders(
    settings: RCNNSettings, *, means: Sequence[Sequence[float]], stds: Sequence[Sequence[float]]
) -> RCNNSettings:
    """The settings with other means and deviations of each stage's deltas; empty sequences leave them as they are.

    Raises:
      ValueError: not four numbers for each stage.
    """
    count = len(settings.stages)
    for name, values in (("box_means", means), ("box_stds", stds)):
        if values and (len(values) != count or any(len(numbers) != 4 for numbers in values)):
            raise ValueError(f"{name}: expected four numbers for each of {count} box heads, got {values}.")
    means = means or [stage.means for stage in settings.stages]
    stds = stds or [stage.stds for stage in settings.stages]
    stages = [
        dataclasses.replace(stage, means=tuple(m), stds=tuple(s))
        for stage, m, s in zip(settings.stages, means, stds, strict=True)
    ]
    return dataclasses.replace(settings, stages=tuple(stages))


class Proposals(NamedTuple):
    """Boxes worth a look, of B images, by descending score."""

    boxes: jax.Array  # (B, P, 4), in pixels of the image that the network saw
    scores: jax.Array  # (B, P), from 0 to 1
    valid: jax.Array  # (B, P) bool


class Chosen(NamedTuple):
    """What a stage learns from, of one image or of several: positives, then background, then what is not valid."""

    boxes: jax.Array  # (S, 4)
    truths: jax.Array  # (S,) int32, index of the ground truth; -1 for background
    valid: jax.Array  # (S,) bool
    is_truth: jax.Array  # (S,) bool: a ground truth's own box

    @property
    def positive(self) -> jax.Array:
        """(S,) bool."""
        return self.truths >= 0


def rpn_loss(
    model: RCNN, outputs: dict[str, Sequence[jax.Array]], batch: dict, keys: jax.Array | None, settings: RCNNSettings
) -> dict[str, jax.Array]:
    """Cross-entropy of sampled anchors, and smooth L1 of the deltas of the positive ones, both over the number sampled.

    Args:
      model: says which anchors there are.
      outputs: of ``RCNN.propose``.
      batch: see ``tasks.detection.detector``.
      keys: (B,), of the samples; None takes the first anchors.
      settings: see there.

    Returns:
      {"rpn_class_loss", "rpn_box_loss"}.
    """
    anchors = make_level_anchors(model, outputs, STRIDES)
    codes = assign_anchors(
        anchors,
        level_shapes(outputs),
        batch,
        strides=STRIDES,
        inside_only=settings.rpn_inside_only,
        positive=0.7,
        negative=0.3,
        min_positive=0.3,
    )
    options = dict(count=settings.rpn_samples, positive_fraction=settings.rpn_positive)
    sample = _map_keys(functools.partial(sample_assigned, **options), keys, codes)

    def take(levels, last):
        flat = jnp.concatenate([x.reshape(len(codes), -1, last) for x in levels], axis=1)
        return jnp.take_along_axis(flat, sample.indices[..., None], axis=1)

    class_losses = losses.binary_cross_entropy(take(outputs["scores"], 1), sample.is_positive[..., None])
    _, truths = take_truths(batch, jnp.take_along_axis(codes, sample.indices, axis=1))
    targets = bx.encode_boxes(
        jnp.concatenate(anchors)[sample.indices],
        bx.replace_invalid(truths, sample.is_positive),
        **make_anchor_coder(model),
    )
    box_losses = losses.smooth_l1(take(outputs["deltas"], 4), targets, beta=settings.rpn_beta)
    parts = sample.is_positive, sample.is_valid & ~sample.is_positive
    count = sum(jnp.maximum(part.sum(axis=1), 1).sum() for part in parts)
    return {
        "rpn_class_loss": losses.masked_sum(class_losses, sample.is_valid) / count,
        "rpn_box_loss": losses.masked_sum(box_losses, sample.is_positive) / count,
    }


def choose_proposals(
    model: RCNN,
    outputs: dict[str, Sequence[jax.Array]],
    image_shapes: jax.Array,
    *,
    candidates: int,
    count: int,
    iou_threshold: float,
) -> Proposals:
    """The best boxes of the RPN: the best of each level, those that overlap dropped level by level, the best of what is left.

    Args:
      model: says which anchors there are.
      outputs: of ``RCNN.propose``.
      image_shapes: int (B, 2), the height and width of each image, to which boxes are cut.
      candidates: of each level.
      count: of each image.
      iou_threshold: of boxes of one level that overlap more only the best one stays.
    """
    anchors = make_level_anchors(model, outputs, STRIDES)
    most = min(candidates, max(map(len, anchors)))
    coder = make_anchor_coder(model)

    def choose(scores, deltas, image_shape):
        levels = []
        for level_scores, level_deltas, level_anchors in zip(scores, deltas, anchors, strict=True):
            best, places = lax.top_k(level_scores, min(most, len(level_anchors)))
            boxes = bx.decode_boxes(level_anchors[places], level_deltas[places], **coder, image_shape=image_shape)
            missing = most - len(places)
            levels.append(
                (
                    jnp.pad(boxes, ((0, missing), (0, 0))),
                    jnp.pad(best, (0, missing), constant_values=-jnp.inf),
                )
            )
        boxes, scores = (jnp.stack(parts) for parts in zip(*levels, strict=True))
        valid = (scores > -jnp.inf) & (boxes[..., 2:] > boxes[..., :2]).all(axis=-1)
        keep = jax.vmap(lambda b, s, v: nms(b, s, threshold=iou_threshold, valid=v))(boxes, scores, valid)
        kept = jnp.where(keep, scores, -jnp.inf).reshape(-1)
        best, places = lax.top_k(kept, min(count, len(kept)))
        valid = best > -jnp.inf
        return bx.replace_invalid(boxes.reshape(-1, 4)[places], valid), jax.nn.sigmoid(best), valid

    scores = tuple(x.reshape(len(x), -1) for x in outputs["scores"])
    deltas = tuple(x.reshape(len(x), -1, 4) for x in outputs["deltas"])
    return Proposals(*lax.stop_gradient(jax.vmap(choose)(scores, deltas, image_shapes)))


def choose_boxes(
    boxes: jax.Array, valid: jax.Array, batch: dict, keys: jax.Array | None, stage: Stage, settings: RCNNSettings
) -> Chosen:
    """Samples what a stage learns from, of proposals and of the ground truths themselves.

    Args:
      boxes, valid: of the proposals, (B, P, 4) and (B, P).
      batch: see ``tasks.detection.detector``.
      keys: (B,); None takes the first boxes, ground truths before others.
      stage, settings: see there.
    """

    def choose(key, boxes, valid, truths, is_truth):
        codes, _ = assign_max_iou(
            boxes,
            truths,
            valid_boxes=valid,
            valid_ground_truths=is_truth,
            positive=stage.iou,
            negative=stage.iou,
            min_positive=stage.iou,
            match_low_quality=stage.match_low_quality,
        )
        count = len(truths)
        own = jnp.where(is_truth, jnp.arange(count, dtype=codes.dtype), NOT_CONSIDERED)
        codes = jnp.concatenate([own, codes])
        options = dict(count=settings.roi_samples, positive_fraction=settings.roi_positive)
        sample = sample_assigned(key, codes, **options)
        return Chosen(
            bx.replace_invalid(jnp.concatenate([truths, boxes])[sample.indices], sample.is_valid),
            jnp.where(sample.is_positive, codes[sample.indices], -1),
            sample.is_valid,
            sample.is_valid & (sample.indices < count),
        )

    truths = batch["boxes"].astype(boxes.dtype)
    return _map_keys(choose, keys, boxes, valid, truths, truths_that_count(batch))


def rcnn_loss(
    module: RCNN, images: jax.Array, batch: dict, key: jax.Array | None, settings: RCNNSettings
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The losses of the RPN and of every stage, added up.

    Args:
      module: a bound model; BatchNorm is in training.
      images: float (B, H, W, 3), normalised.
      batch: see ``tasks.detection.detector``.
      key: of the samples; None takes the first boxes everywhere.
      settings: see there.

    Returns:
      The loss, and {"rpn_class_loss", "rpn_box_loss", "class_loss", "box_loss", "mask_loss", "accuracy": percent}, of a
      cascade with "_0", "_1" and "_2" at the names of its stages.
    """
    keys = [None] * (1 + len(settings.stages))
    if key is not None:
        keys = jax.random.split(key, (len(keys), len(images)))
    pyramid = module.pyramid(images, train=True)
    outputs = module.propose(pyramid)
    metrics = rpn_loss(module, outputs, batch, keys[0], settings)
    proposals = choose_proposals(
        module,
        outputs,
        batch["valid"],
        candidates=settings.train_candidates,
        count=settings.train_proposals,
        iou_threshold=settings.proposal_iou,
    )
    boxes, valid = proposals.boxes, proposals.valid
    total = sum(metrics.values())
    for index, stage in enumerate(settings.stages):
        chosen = choose_boxes(boxes, valid, batch, keys[1 + index], stage, settings)
        own, (boxes, valid) = _stage_loss(module, pyramid, chosen, batch, index, settings)
        total += sum(value for name, value in own.items() if name.endswith("_loss"))
        suffix = f"_{index}" if len(settings.stages) > 1 else ""
        metrics |= {f"{name}{suffix}": value for name, value in own.items()}
    return total, metrics


def _stage_loss(module, pyramid, chosen, batch, index, settings):
    """Losses of one stage, and the refined boxes with their validity, for the next one."""
    stage, positive = settings.stages[index], chosen.positive
    logits, deltas = look_at_boxes(module, pyramid, chosen.boxes, chosen.valid, stage=index, train=True)
    truth_labels, truths = take_truths(batch, chosen.truths)
    labels = jnp.where(positive, truth_labels, module.num_classes)
    count = jnp.maximum(chosen.valid.sum(), 1)
    class_loss = losses.masked_sum(losses.softmax_cross_entropy(logits, labels), chosen.valid) / count
    own = _pick_class(deltas, labels)
    boxes, truths = (bx.replace_invalid(x, positive) for x in (chosen.boxes, truths.astype(chosen.boxes.dtype)))
    if settings.giou:
        box_losses = 10 * losses.giou_loss(bx.decode_boxes(boxes, own, **stage.coder), truths)
    else:
        box_losses = losses.smooth_l1(own, bx.encode_boxes(boxes, truths, **stage.coder), beta=0)
    right = (logits.argmax(axis=-1) == labels) & chosen.valid
    metrics = {
        "class_loss": stage.weight * class_loss,
        "box_loss": stage.weight * losses.masked_sum(box_losses, positive) / count,
        "mask_loss": stage.weight * _mask_loss(module, pyramid, chosen, labels, batch, index, settings),
        "accuracy": 100 * right.sum() / count.astype(logits.dtype),
    }
    best = jnp.where(positive, labels, logits[..., :-1].argmax(axis=-1))
    refined = refine_boxes(chosen.boxes, deltas, best, batch["valid"], stage)
    return metrics, (refined, chosen.valid & ~chosen.is_truth)


def _mask_loss(module, pyramid, chosen, labels, batch, index, settings):
    # Positives come first, so that the rest needs no masks.
    most = int(settings.roi_samples * settings.roi_positive)
    boxes, truths, positive, labels = (x[:, :most] for x in (chosen.boxes, chosen.truths, chosen.positive, labels))
    logits = look_at_masks(module, pyramid, boxes, positive, labels, stage=index)
    resolution = 2 * module.mask_side

    def cut(masks, boxes, truths, image_shape, positive):
        options = dict(size=resolution, mask_shape=tuple(image_shape), valid=positive, packed=True)
        return mask_targets(masks, boxes, truths, **options)

    targets = jax.vmap(cut)(batch["masks"], boxes, truths, batch["valid"], positive)
    values = losses.binary_cross_entropy(logits, targets)
    count = jnp.maximum(positive.sum(), 1) * resolution**2
    return losses.masked_sum(values.reshape(*positive.shape, -1), positive) / count


def look_at_boxes(
    module: RCNN, pyramid: Sequence[jax.Array], boxes: jax.Array, valid: jax.Array, *, stage: int, train: bool
) -> tuple[jax.Array, jax.Array]:
    """Logits (B, S, K + 1) and deltas (B, S, K, 4) of boxes (B, S, 4); valid (B, S) as in ``pyramid_roi_align``."""
    cuts = _cut_out(pyramid, boxes, valid, module.box_side)
    logits, deltas = module.boxes(cuts, stage=stage, train=train, mask=valid.reshape(-1))
    return logits.reshape(*valid.shape, -1), deltas.reshape(*valid.shape, module.num_classes, 4)


def look_at_masks(
    module: RCNN, pyramid: Sequence[jax.Array], boxes: jax.Array, valid: jax.Array, labels: jax.Array, *, stage: int
) -> jax.Array:
    """Logits (B, S, 28, 28) of each box's class, labels (B, S)."""
    logits = module.masks(_cut_out(pyramid, boxes, valid, module.mask_side), stage=stage)
    own = labels.reshape(-1, 1, 1, 1) == jnp.arange(logits.shape[-1]).reshape(1, 1, 1, -1)
    return jnp.where(own, logits, 0).sum(axis=-1).reshape(*valid.shape, *logits.shape[1:3])


def refine_boxes(
    boxes: jax.Array, deltas: jax.Array, labels: jax.Array, image_shapes: jax.Array, stage: Stage
) -> jax.Array:
    """Where a stage's deltas (B, S, K, 4) of a class, labels (B, S), lead boxes (B, S, 4) to, within the images; no gradient."""
    refined = bx.decode_boxes(boxes, _pick_class(deltas, labels), **stage.coder)
    return lax.stop_gradient(jax.vmap(lambda b, shape: bx.clip_boxes(b, image_shape=shape))(refined, image_shapes))


def rcnn_detect(module: RCNN, images: jax.Array, batch: dict, settings: RCNNSettings) -> dict[str, jax.Array]:
    """Detections of every image, see ``tasks.detection.detector``; ``module`` and ``images`` as for ``rcnn_loss``.

    A cascade's scores are the softmax of the mean of its stages' logits, its boxes those of the last stage, its masks the
    mean of its stages' probabilities.
    """
    pyramid = module.pyramid(images)
    proposals = choose_proposals(
        module,
        module.propose(pyramid),
        batch["valid"],
        candidates=settings.test_candidates,
        count=settings.test_proposals,
        iou_threshold=settings.proposal_iou,
    )
    boxes, total = proposals.boxes, 0.0
    for index, stage in enumerate(settings.stages):
        logits, deltas = look_at_boxes(module, pyramid, boxes, proposals.valid, stage=index, train=False)
        total += logits
        if index < len(settings.stages) - 1:
            boxes = refine_boxes(boxes, deltas, logits[..., :-1].argmax(axis=-1), batch["valid"], stage)
    scores = jax.nn.softmax(total / len(settings.stages), axis=-1)[..., :-1]
    scores = jnp.where(proposals.valid[..., None], scores, 0)

    def detect(boxes, deltas, scores, image_shape, scale):
        boxes = bx.decode_boxes(boxes[:, None], deltas, **settings.stages[-1].coder, image_shape=image_shape)
        return multiclass_nms(
            boxes / scale.reshape(1, 1, 4),
            scores,
            score_threshold=settings.score_threshold,
            iou_threshold=settings.iou_threshold,
            max_detections=settings.max_detections,
            candidates=len(boxes),
        )

    found = jax.vmap(detect)(boxes, deltas, scores, batch["valid"], batch["scale"])
    seen = found.boxes * batch["scale"][:, None]
    masks = 0.0
    for index in range(len(settings.stages)):
        masks += jax.nn.sigmoid(look_at_masks(module, pyramid, seen, found.valid, found.labels, stage=index))
    return {
        "boxes": found.boxes,
        "scores": found.scores,
        "labels": found.labels,
        "valid": found.valid,
        "masks": masks / len(settings.stages),
    }


def _cut_out(pyramid, boxes, valid, side):
    """(B * S, side, side, C)"""
    levels = slice(_ROI_LEVELS)
    align = functools.partial(pyramid_roi_align, size=side, strides=STRIDES[levels])
    cuts = jax.vmap(lambda maps, b, v: align(maps, b, valid=v))(tuple(pyramid[levels]), boxes, valid)
    return cuts.reshape(-1, *cuts.shape[2:])


def _pick_class(deltas, labels):
    """(B, S, K, 4) and (B, S) -> (B, S, 4); 0 for background. By comparison, as the gradient of a look-up is a scatter."""
    own = labels[..., None] == jnp.arange(deltas.shape[2]).reshape(1, 1, -1)
    return jnp.where(own[..., None], deltas, 0).sum(axis=2)


def _map_keys(function, keys, *arrays):
    """``function(key, ...)`` of every image; without keys, with None."""
    if keys is None:
        return jax.vmap(functools.partial(function, None))(*arrays)
    return jax.vmap(function)(keys, *arrays)
