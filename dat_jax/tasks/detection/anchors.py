"""Anchors of a dense head (RetinaNet or RPN) and their assignment to ground truth."""

import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from dat_jax.ops.detection.anchors import anchor_validity, inside_image, make_anchors
from dat_jax.ops.detection.assignment import assign_max_iou
from dat_jax.ops.detection.boxes import areas
from dat_jax.tasks.detection.anchor_check import PADDED_TO


def level_shapes(outputs: Mapping[str, Sequence[jax.Array]]) -> list[tuple[int, ...]]:
    """(height, width) of each pyramid level of the outputs of a dense head."""
    return [tuple(scores.shape[1:3]) for scores in outputs["scores"]]


def make_anchor_coder(model) -> dict[str, tuple[float, ...]]:
    """Means and standard deviations of box deltas relative to anchors, as arguments of ``encode_boxes``."""
    return dict(means=model.anchor_means, stds=model.anchor_stds)


def make_level_anchors(model, outputs: Mapping[str, Sequence[jax.Array]], strides: Sequence[int]) -> list[jax.Array]:
    """Anchors (n, 4) of each pyramid level of the outputs of a dense head, in the dtype of the outputs."""
    anchors = make_anchors(
        level_shapes(outputs), strides=strides, scales=model.anchor_scales, ratios=model.anchor_ratios
    )
    return [level.astype(outputs["deltas"][0].dtype) for level in anchors]


def assign_anchors(
    anchors: Sequence[jax.Array],
    shapes: Sequence[tuple[int, ...]],
    batch: dict,
    *,
    strides: Sequence[int],
    inside_only: bool,
    **thresholds,
) -> jax.Array:
    """Assign the anchors of all levels to ground truth.

    Args:
      anchors: anchors (n, 4) of each level.
      shapes: (height, width) of each level.
      batch: see ``tasks.detection.objective``.
      strides: stride of each level in pixels.
      inside_only: whether anchors that extend beyond their image are excluded.
      **thresholds: "positive", "negative" and "min_positive" of ``assign_max_iou``.

    Returns:
      Codes of ``ops.detection.assignment``, int32 (B, N), for the N anchors of all levels.
    """
    per_position = len(anchors[0]) // math.prod(shapes[0])
    all_anchors = jnp.concatenate(list(anchors))

    def assign(image_shape, ground_truth, is_valid):
        padded = -(-image_shape // PADDED_TO) * PADDED_TO
        valid = jnp.concatenate(anchor_validity(shapes, strides=strides, per_position=per_position, pad_shape=padded))
        if inside_only:
            valid &= inside_image(all_anchors, image_shape=image_shape)
        options = dict(valid_boxes=valid, valid_ground_truths=is_valid, match_low_quality=True)
        return assign_max_iou(all_anchors, ground_truth, **options, **thresholds)[0]

    return jax.vmap(assign)(batch["valid"], batch["boxes"].astype(all_anchors.dtype), valid_ground_truth(batch))


def valid_ground_truth(batch: dict) -> jax.Array:
    """Mask, bool (B, G), of the ground truth boxes that are not padding and have a positive area."""
    return batch["box_mask"] & (areas(batch["boxes"]) > 0)


def gather_ground_truth(batch: dict, codes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Labels (B, N) and boxes (B, N, 4) of the ground truth that is assigned by codes (B, N).

    Where none is assigned, they are those of the first ground truth and must be masked.
    """
    index = jnp.maximum(codes, 0)
    boxes = jnp.take_along_axis(batch["boxes"], index[..., None], axis=1)
    return jnp.take_along_axis(batch["labels"], index, axis=1), boxes
