"""Loss and prediction of an object detector.

Training batches hold "image", (B, H, W, 3) uint8; "valid", (B, 2) int32, the height and width of each image, beyond which is
padding; "boxes", (B, G, 4) float32, x1, y1, x2, y2 in pixels; "labels", (B, G) int32, from 0; "box_mask", (B, G) bool, True for
the entries that are objects; and, for models with masks, "masks", (B, G, H, ceil(W / 8)) uint8, eight pixels per byte.

Batches for prediction may also hold "sizes", (B, 2) int32, the padded height and width of each image if its array is larger, see
``ops.sizes``. They hold "image", "valid" and "scale", (B, 4) float32, the factors by which x, y, x and y of the original
image were multiplied. Detections are {"boxes": (B, D, 4), in pixels of the original images, "scores": (B, D), descending,
"labels": (B, D) int32, "valid": (B, D) bool, and, for models with masks, "masks": (B, D, 28, 28), probabilities within each box}.
Entries that are not valid are 0.
"""

from typing import Any, cast, overload

import jax

from dat_jax.models.key_positions import name_positions
from dat_jax.models.rcnn import RCNN
from dat_jax.models.retinanet import RetinaNet
from dat_jax.tasks.detection.rcnn import CASCADE, MASK_RCNN, RCNNSettings, rcnn_detect, rcnn_loss, set_box_coders
from dat_jax.tasks.detection.retinanet import RetinaNetSettings, retinanet_detect, retinanet_loss
from dat_jax.tasks.objective import Objective
from dat_jax.tasks.preprocessing import clear_padding, normalize


@overload
def default_settings(model: RetinaNet) -> RetinaNetSettings: ...


@overload
def default_settings(model: RCNN) -> RCNNSettings: ...


@overload
def default_settings(model: RetinaNet | RCNN) -> RetinaNetSettings | RCNNSettings: ...


def default_settings(model: RetinaNet | RCNN) -> RetinaNetSettings | RCNNSettings:
    """Published settings of a detector's targets and detections, with the box coders of the model."""
    if isinstance(model, RetinaNet):
        return RetinaNetSettings()
    settings = CASCADE if model.cascade else MASK_RCNN
    return set_box_coders(settings, means=model.box_means, stds=model.box_stds)


def make_detection_objective(
    model: RetinaNet | RCNN, *, settings: RetinaNetSettings | RCNNSettings | None = None
) -> Objective:
    """Make a detector's objective: the published losses and detections. The module describes batches and outputs.

    Args:
      model: the detector.
      settings: by default ``default_settings(model)``.
    """
    settings = default_settings(model) if settings is None else settings

    def init(key, batch):
        return model.init(key, normalize(batch["image"]))

    def loss(variables, batch, key):
        dropout_key, sampling_key = jax.random.split(key)

        def compute(module, images):
            if isinstance(module, RetinaNet):
                return retinanet_loss(module, module(images, train=True), batch)
            assert isinstance(settings, RCNNSettings)
            return rcnn_loss(module, images, batch, sampling_key, settings)

        (value, metrics), state = model.apply(
            variables, _preprocess(batch), method=compute, rngs={"dropout": dropout_key}, mutable=["batch_stats"]
        )
        return value, {"loss": value, **metrics}, dict(state)

    def predict(variables, batch):
        return detect(model, variables, normalize(batch["image"]), batch, settings=settings)

    return Objective(init=init, loss=loss, predict=predict)


def detect(
    model: RetinaNet | RCNN,
    variables,
    images: jax.Array,
    batch: dict,
    *,
    settings: RetinaNetSettings | RCNNSettings,
) -> dict[str, jax.Array]:
    """Detect objects.

    Args:
      model, variables: the detector.
      images: (B, H, W, 3) float32, normalized.
      batch: "valid", (B, 2) int32, and "scale", (B, 4) float32, as the module describes them.
      settings: score threshold, number of detections and the like.

    Returns:
      Detections as the module describes them.
    """

    def compute(module, images):
        if isinstance(module, RetinaNet):
            assert isinstance(settings, RetinaNetSettings)
            return retinanet_detect(module, module(images, sizes=batch.get("sizes")), batch, settings)
        assert isinstance(settings, RCNNSettings)
        return rcnn_detect(module, images, batch, settings)

    detections = model.apply(variables, clear_padding(images, batch["valid"]), method=compute)
    return cast(dict[str, jax.Array], detections)


def find_positions(model: RetinaNet | RCNN, variables, batch: dict) -> dict[str, dict[str, Any]]:
    """Positions that the D blocks of a detector's backbone sample, see ``name_positions``.

    Args:
      model, variables: the detector.
      batch: "image", "valid" and, if images are the top left of larger arrays, "sizes" as the module describes them.
    """
    images = _preprocess(batch)

    def run_backbone(module, images):
        return module.backbone(images, sizes=batch.get("sizes"))

    _, state = model.apply(variables, images, method=run_backbone, mutable=["intermediates"])
    sown = dict(state).get("intermediates", {}).get("backbone", {}).get("dat", {})
    return name_positions(sown, model.dat, images.shape[1:3])


def _preprocess(batch):
    return clear_padding(normalize(batch["image"]), batch["valid"])
