"""Anchors of a dense head, RetinaNet's or an RPN's: where they are, and which ground truths they learn."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from dat_jax.ops.detection import boxes as bx
from dat_jax.ops.detection.anchors import anchor_validity, inside_image, make_anchors
from dat_jax.ops.detection.assignment import assign_max_iou

_PADDED_TO = 32  # each image's own padding ends at a multiple of it; anchors that start beyond are not used


def level_shapes(outputs: dict[str, Sequence[jax.Array]]) -> list[tuple[int, int]]:
    """(height, width) of each level of a dense head's outputs."""
    return [tuple(scores.shape[1:3]) for scores in outputs["scores"]]


def make_anchor_coder(model) -> dict[str, tuple[float, ...]]:
    """Means and deviations of the deltas between anchors and boxes, as arguments of ``encode_boxes``."""
    return dict(means=model.anchor_means, stds=model.anchor_stds)


def make_level_anchors(model, outputs: dict[str, Sequence[jax.Array]], strides: Sequence[int]) -> list[jax.Array]:
    """The anchors (n, 4) of each level of a dense head's outputs, in their dtype."""
    anchors = make_anchors(
        level_shapes(outputs), strides=strides, scales=model.anchor_scales, ratios=model.anchor_ratios
    )
    return [level.astype(outputs["deltas"][0].dtype) for level in anchors]


def assign_anchors(
    anchors: Sequence[jax.Array],
    shapes: Sequence[tuple[int, int]],
    batch: dict,
    *,
    strides: Sequence[int],
    inside_only: bool,
    **thresholds,
) -> jax.Array:
    """What every anchor of all levels learns, codes of ``ops.detection.assignment``: int32 (B, N).

    Args:
      anchors: (n, 4) of each level.
      shapes: (height, width) of each level.
      batch: see ``tasks.detection.detector``.
      strides: of the levels.
      inside_only: leaves out anchors that reach out of their image.
      **thresholds: "positive", "negative" and "min_positive" of ``assign_max_iou``.
    """
    per_position = len(anchors[0]) // math.prod(shapes[0])
    anchors = jnp.concatenate(list(anchors))

    def assign(image_shape, truths, is_truth):
        padded = -(-image_shape // _PADDED_TO) * _PADDED_TO
        valid = jnp.concatenate(anchor_validity(shapes, strides=strides, per_position=per_position, pad_shape=padded))
        if inside_only:
            valid &= inside_image(anchors, image_shape=image_shape)
        options = dict(valid_boxes=valid, valid_ground_truths=is_truth, match_low_quality=True)
        return assign_max_iou(anchors, truths, **options, **thresholds)[0]

    return jax.vmap(assign)(batch["valid"], batch["boxes"].astype(anchors.dtype), truths_that_count(batch))


def truths_that_count(batch: dict) -> jax.Array:
    """Bool (B, G): ground truths that are there and have an area."""
    return batch["box_mask"] & (bx.areas(batch["boxes"]) > 0)


def take_truths(batch: dict, codes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Labels (B, N) and boxes (B, N, 4) of the ground truths that codes (B, N) name; of the first where they name none."""
    index = jnp.maximum(codes, 0)
    boxes = jnp.take_along_axis(batch["boxes"], index[..., None], axis=1)
    return jnp.take_along_axis(batch["labels"], index, axis=1), boxes
