"""Settings, sampling, losses and detections of Mask R-CNN and Cascade Mask R-CNN.

All arrays have static shapes. Proposals and samples are padded, and padding is masked everywhere.
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
from dat_jax.ops.detection.assignment import NOT_CONSIDERED, assign_max_iou, sample_assigned
from dat_jax.ops.detection.boxes import clip_boxes, decode_boxes, encode_boxes, replace_invalid
from dat_jax.ops.detection.masks import mask_targets
from dat_jax.ops.detection.nms import multiclass_nms
from dat_jax.ops.detection.roi_align import pyramid_roi_align
from dat_jax.tasks.detection import losses
from dat_jax.tasks.detection.anchors import gather_ground_truth, valid_ground_truth
from dat_jax.tasks.detection.rpn import choose_proposals, map_keys, rpn_loss

_ROI_LEVELS = 4  # number of pyramid levels for RoIAlign, starting with the finest


@dataclasses.dataclass(frozen=True)
class Stage:
    """Settings of one stage: a box head and a mask head.

    Attributes:
      iou: a box is positive if its IoU with a ground truth is at least this, and background otherwise.
      match_low_quality: see ``assign_max_iou``; in the published recipes only for Mask R-CNN.
      means: means of the box deltas, see ``encode_boxes``.
      stds: standard deviations of the box deltas, see ``encode_boxes``.
      weight: weight of the losses of the stage.
    """

    iou: float = 0.5
    match_low_quality: bool = False
    means: tuple[float, ...] = (0.0,) * 4
    stds: tuple[float, ...] = (0.1, 0.1, 0.2, 0.2)
    weight: float = 1.0

    @property
    def coder(self) -> dict:
        """Means and standard deviations of the box deltas, as arguments of ``encode_boxes``."""
        return dict(means=self.means, stds=self.stds)


@dataclasses.dataclass(frozen=True)
class RCNNSettings:
    """Settings of sampling, losses and postprocessing. Defaults are those of the published recipe for Mask R-CNN.

    Attributes:
      stages: one stage, or three stages of a cascade.
      giou: whether the box loss is 10 times the GIoU loss of decoded boxes, as in the published cascade, instead of the L1
        loss of deltas.
      rpn_beta: beta of the smooth L1 loss of the RPN's deltas.
      rpn_inside_only: whether anchors that extend beyond their image are excluded from training.
      rpn_samples: number of anchors per image that are sampled for the losses of the RPN.
      rpn_positive: maximum fraction of positive anchors among these samples.
      roi_samples: number of RoIs (proposals and ground truth boxes) per image that are sampled for each stage.
      roi_positive: maximum fraction of positive RoIs among these samples.
      train_candidates: number of anchors per level, those with the best scores, that enter NMS during training.
      train_proposals: maximum number of proposals per image after NMS during training.
      test_candidates: like train_candidates, for detections.
      test_proposals: like train_proposals, for detections.
      proposal_iou: of proposals of one level with a larger IoU, NMS keeps only the one with the best score.
      score_threshold: see ``RetinaNetSettings``.
      iou_threshold: see ``RetinaNetSettings``.
      max_detections: see ``RetinaNetSettings``.
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
    """Replace means and standard deviations of the box deltas of each stage. Empty sequences change nothing.

    Raises:
      ValueError: the values are not four numbers for each stage.
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


class SampledRoIs(NamedTuple):
    """RoIs sampled for the losses of a stage: positive ones, then background, then padding.

    Arrays have a leading axis (B,) for a batch of images.

    Attributes:
      boxes: (S, 4), as x1, y1, x2, y2 in pixels of the network's input.
      ground_truth: index of the assigned ground truth, int32 (S,); -1 for background.
      valid: bool (S,), False for padding.
      is_ground_truth: bool (S,), True if the box is that of a ground truth instead of a proposal.
    """

    boxes: jax.Array
    ground_truth: jax.Array
    valid: jax.Array
    is_ground_truth: jax.Array

    @property
    def positive(self) -> jax.Array:
        """Mask of positive RoIs, bool (S,)."""
        return self.ground_truth >= 0


def sample_rois(
    boxes: jax.Array, valid: jax.Array, batch: dict, keys: jax.Array | None, stage: Stage, settings: RCNNSettings
) -> SampledRoIs:
    """Sample the RoIs of a stage's losses from proposals and ground truth boxes.

    Args:
      boxes: boxes of the proposals, (B, P, 4).
      valid: mask of the proposals, bool (B, P).
      batch: see ``tasks.detection.objective``.
      keys: random keys (B,) for sampling; None takes the first boxes, ground truth boxes before proposals.
      stage: see ``Stage``.
      settings: see ``RCNNSettings``.
    """

    def sample(key, boxes, valid, ground_truth, is_valid):
        codes, _ = assign_max_iou(
            boxes,
            ground_truth,
            valid_boxes=valid,
            valid_ground_truths=is_valid,
            positive=stage.iou,
            negative=stage.iou,
            min_positive=stage.iou,
            match_low_quality=stage.match_low_quality,
        )
        count = len(ground_truth)
        # Each ground truth box is assigned to itself.
        self_codes = jnp.where(is_valid, jnp.arange(count, dtype=codes.dtype), NOT_CONSIDERED)
        codes = jnp.concatenate([self_codes, codes])
        samples = sample_assigned(key, codes, count=settings.roi_samples, positive_fraction=settings.roi_positive)
        return SampledRoIs(
            boxes=replace_invalid(jnp.concatenate([ground_truth, boxes])[samples.indices], samples.is_valid),
            ground_truth=jnp.where(samples.is_positive, codes[samples.indices], -1),
            valid=samples.is_valid,
            is_ground_truth=samples.is_valid & (samples.indices < count),
        )

    ground_truth = batch["boxes"].astype(boxes.dtype)
    return map_keys(sample, keys, boxes, valid, ground_truth, valid_ground_truth(batch))


def rcnn_loss(
    module: RCNN, images: jax.Array, batch: dict, key: jax.Array | None, settings: RCNNSettings
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Sum of the losses of the RPN and of every stage.

    Args:
      module: bound model. BatchNorm updates its statistics.
      images: normalized images, float (B, H, W, 3).
      batch: see ``tasks.detection.objective``.
      key: random key for sampling; None takes the first boxes everywhere.
      settings: see ``RCNNSettings``.

    Returns:
      The loss, and {"rpn_class_loss", "rpn_box_loss", "class_loss", "box_loss", "mask_loss", "accuracy": percent}. Metrics
      of the stages of a cascade have the suffixes "_0", "_1" and "_2".
    """
    keys = [None] * (1 + len(settings.stages))
    if key is not None:
        keys = jax.random.split(key, (len(keys), len(images)))
    pyramid = module.pyramid(images, train=True)
    outputs = module.propose(pyramid)
    metrics = rpn_loss(
        module,
        outputs,
        batch,
        keys[0],
        samples=settings.rpn_samples,
        positive_fraction=settings.rpn_positive,
        beta=settings.rpn_beta,
        inside_only=settings.rpn_inside_only,
    )
    proposals = choose_proposals(
        module,
        outputs,
        batch["valid"],
        candidates=settings.train_candidates,
        count=settings.train_proposals,
        iou_threshold=settings.proposal_iou,
    )
    boxes, valid = proposals.boxes, proposals.valid
    total = jnp.asarray(sum(metrics.values()))
    for index, stage in enumerate(settings.stages):
        rois = sample_rois(boxes, valid, batch, keys[1 + index], stage, settings)
        stage_metrics, (boxes, valid) = _stage_loss(module, pyramid, rois, batch, index, settings)
        total += sum(value for name, value in stage_metrics.items() if name.endswith("_loss"))
        suffix = f"_{index}" if len(settings.stages) > 1 else ""
        metrics |= {f"{name}{suffix}": value for name, value in stage_metrics.items()}
    return total, metrics


def _stage_loss(module, pyramid, rois, batch, index, settings):
    """Metrics of one stage, and its refined boxes with their validity, for the next stage."""
    stage, positive = settings.stages[index], rois.positive
    logits, deltas = run_box_head(module, pyramid, rois.boxes, rois.valid, stage=index, train=True)
    target_labels, targets = gather_ground_truth(batch, rois.ground_truth)
    labels = jnp.where(positive, target_labels, module.num_classes)
    count = jnp.maximum(rois.valid.sum(), 1)
    class_loss = losses.masked_sum(losses.softmax_cross_entropy(logits, labels), rois.valid) / count
    class_deltas = _select_class(deltas, labels)
    boxes, targets = (replace_invalid(x, positive) for x in (rois.boxes, targets.astype(rois.boxes.dtype)))
    if settings.giou:
        box_losses = 10 * losses.giou_loss(decode_boxes(boxes, class_deltas, **stage.coder), targets)
    else:
        box_losses = losses.smooth_l1(class_deltas, encode_boxes(boxes, targets, **stage.coder), beta=0)
    correct = (logits.argmax(axis=-1) == labels) & rois.valid
    metrics = {
        "class_loss": stage.weight * class_loss,
        "box_loss": stage.weight * losses.masked_sum(box_losses, positive) / count,
        "mask_loss": stage.weight * _mask_loss(module, pyramid, rois, labels, batch, index, settings),
        "accuracy": 100 * correct.sum() / count.astype(logits.dtype),
    }
    best = jnp.where(positive, labels, logits[..., :-1].argmax(axis=-1))
    refined = refine_boxes(rois.boxes, deltas, best, batch["valid"], stage)
    return metrics, (refined, rois.valid & ~rois.is_ground_truth)


def _mask_loss(module, pyramid, rois, labels, batch, index, settings):
    # Positive RoIs come first; masks of the others are not computed.
    max_positive = int(settings.roi_samples * settings.roi_positive)
    boxes, indices, positive, labels = (
        x[:, :max_positive] for x in (rois.boxes, rois.ground_truth, rois.positive, labels)
    )
    logits = run_mask_head(module, pyramid, boxes, positive, labels, stage=index)
    resolution = 2 * module.mask_side

    def make_targets(masks, boxes, indices, image_shape, positive):
        options = dict(size=resolution, mask_shape=tuple(image_shape), valid=positive, packed=True)
        return mask_targets(masks, boxes, indices, **options)

    targets = jax.vmap(make_targets)(batch["masks"], boxes, indices, batch["valid"], positive)
    values = losses.binary_cross_entropy(logits, targets)
    count = jnp.maximum(positive.sum(), 1) * resolution**2
    return losses.masked_sum(values.reshape(*positive.shape, -1), positive) / count


def run_box_head(
    module: RCNN,
    pyramid: Sequence[jax.Array],
    boxes: jax.Array,
    valid: jax.Array,
    *,
    stage: int,
    train: bool,
    sizes: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Run the box head of a stage on RoIs.

    Args:
      module: bound model.
      pyramid: feature maps of the pyramid.
      boxes: (B, S, 4), as x1, y1, x2, y2 in pixels of the network's input.
      valid: bool (B, S), see ``pyramid_roi_align``.
      stage: index of the stage.
      train: whether BatchNorm updates its statistics.
      sizes: sizes of the images in their arrays, int (B, 2), see ``RCNN``; None for the whole arrays.

    Returns:
      Logits (B, S, K + 1), with the background last, and deltas (B, S, K, 4).
    """
    features = _align_rois(module, pyramid, boxes, valid, module.box_side, sizes)
    logits, deltas = module.boxes(features, stage=stage, train=train, mask=valid.reshape(-1))
    return logits.reshape(*valid.shape, -1), deltas.reshape(*valid.shape, module.num_classes, 4)


def run_mask_head(
    module: RCNN,
    pyramid: Sequence[jax.Array],
    boxes: jax.Array,
    valid: jax.Array,
    labels: jax.Array,
    *,
    stage: int,
    sizes: jax.Array | None = None,
) -> jax.Array:
    """Mask logits (B, S, 28, 28) of boxes (B, S, 4) for their classes, labels (B, S); see ``run_box_head``."""
    logits = module.masks(_align_rois(module, pyramid, boxes, valid, module.mask_side, sizes), stage=stage)
    is_label = labels.reshape(-1, 1, 1, 1) == jnp.arange(logits.shape[-1]).reshape(1, 1, 1, -1)
    return jnp.where(is_label, logits, 0).sum(axis=-1).reshape(*valid.shape, *logits.shape[1:3])


def refine_boxes(
    boxes: jax.Array, deltas: jax.Array, labels: jax.Array, image_shapes: jax.Array, stage: Stage
) -> jax.Array:
    """Boxes (B, S, 4) refined by a stage, clipped to the images, without gradient.

    Args:
      boxes: (B, S, 4).
      deltas: deltas of all classes, (B, S, K, 4).
      labels: class whose deltas are applied, (B, S).
      image_shapes: height and width of each image, int (B, 2).
      stage: stage that predicted the deltas.
    """
    refined = decode_boxes(boxes, _select_class(deltas, labels), **stage.coder)
    return lax.stop_gradient(jax.vmap(lambda b, shape: clip_boxes(b, image_shape=shape))(refined, image_shapes))


def rcnn_detect(module: RCNN, images: jax.Array, batch: dict, settings: RCNNSettings) -> dict[str, jax.Array]:
    """Detections of every image; see ``tasks.detection.objective`` for their format.

    For a cascade, scores are the softmax of the mean logits of the stages, boxes are those of the last stage, and masks are
    the mean probabilities of the stages.

    Args:
      module: bound model.
      images: normalized images, float (B, H, W, 3).
      batch: see ``tasks.detection.objective``.
      settings: see ``RCNNSettings``.
    """
    sizes = batch.get("sizes")
    pyramid = module.pyramid(images, sizes=sizes)
    proposals = choose_proposals(
        module,
        module.propose(pyramid, sizes=sizes),
        batch["valid"],
        candidates=settings.test_candidates,
        count=settings.test_proposals,
        iou_threshold=settings.proposal_iou,
    )
    boxes, logits_sum = proposals.boxes, 0.0
    for index, stage in enumerate(settings.stages):
        logits, deltas = run_box_head(module, pyramid, boxes, proposals.valid, stage=index, train=False, sizes=sizes)
        logits_sum += logits
        if index < len(settings.stages) - 1:
            boxes = refine_boxes(boxes, deltas, logits[..., :-1].argmax(axis=-1), batch["valid"], stage)
    scores = jax.nn.softmax(logits_sum / len(settings.stages), axis=-1)[..., :-1]
    scores = jnp.where(proposals.valid[..., None], scores, 0)

    def detect(boxes, deltas, scores, image_shape, scale):
        boxes = decode_boxes(boxes[:, None], deltas, **settings.stages[-1].coder, image_shape=image_shape)
        return multiclass_nms(
            boxes / scale.reshape(1, 1, 4),
            scores,
            score_threshold=settings.score_threshold,
            iou_threshold=settings.iou_threshold,
            max_detections=settings.max_detections,
            candidates=len(boxes),
        )

    detections = jax.vmap(detect)(boxes, deltas, scores, batch["valid"], batch["scale"])
    boxes = detections.boxes * batch["scale"][:, None]  # in pixels of the network's input
    masks = 0.0
    for index in range(len(settings.stages)):
        logits = run_mask_head(module, pyramid, boxes, detections.valid, detections.labels, stage=index, sizes=sizes)
        masks += jax.nn.sigmoid(logits)
    return {
        "boxes": detections.boxes,
        "scores": detections.scores,
        "labels": detections.labels,
        "valid": detections.valid,
        "masks": jnp.asarray(masks) / len(settings.stages),
    }


def _align_rois(module, pyramid, boxes, valid, side, sizes):
    """Features of RoIs, (B * S, side, side, C)."""
    levels = slice(_ROI_LEVELS)
    align = functools.partial(pyramid_roi_align, size=side, strides=STRIDES[levels])
    level_sizes = None if sizes is None else tuple(module.level_sizes(sizes)[levels])
    features = jax.vmap(lambda maps, b, v, s: align(maps, b, valid=v, sizes=s))(
        tuple(pyramid[levels]), boxes, valid, level_sizes
    )
    return features.reshape(-1, *features.shape[2:])


def _select_class(deltas, labels):
    """Deltas (B, S, 4) of the classes ``labels`` (B, S) from deltas (B, S, K, 4); 0 for background.

    They are selected by comparison because the gradient of indexing is a scatter.
    """
    is_label = labels[..., None] == jnp.arange(deltas.shape[2]).reshape(1, 1, -1)
    return jnp.where(is_label[..., None], deltas, 0).sum(axis=2)
