"""Object detection and instance segmentation.

Batches to train on hold "image", uint8 (B, H, W, 3), "valid", int32 (B, 2), the height and width of each image, beyond which
is padding; "boxes", float32 (B, G, 4), x1, y1, x2, y2 in pixels; "labels", int32 (B, G), from 0; "box_mask", bool (B, G), which
of them are objects; and, for models with masks, "masks", uint8 (B, G, H, W / 8), eight pixels a byte.

To predict they hold "image", "valid" and "scale", float32 (B, 4), by which x, y, x and y of the original image were multiplied.
Detections are {"boxes": (B, D, 4), in pixels of the original images, "scores": (B, D), descending, "labels": int32 (B, D),
"valid": bool (B, D), and "masks": (B, D, 28, 28), probabilities within each box}; what is not valid is 0.
"""

from typing import Any

import jax

from dat_jax.models.key_positions import name_positions
from dat_jax.models.rcnn import RCNN
from dat_jax.models.retinanet import RetinaNet
from dat_jax.tasks import Task
from dat_jax.tasks.classification import normalize
from dat_jax.tasks.detection.rcnn import CASCADE, MASK_RCNN, RCNNSettings, rcnn_detect, rcnn_loss, set_box_coders
from dat_jax.tasks.detection.retinanet import RetinaNetSettings, retinanet_detect, retinanet_loss
from dat_jax.tasks.segmentation import clear_padding


def default_settings(model: RetinaNet | RCNN) -> RetinaNetSettings | RCNNSettings:
    """The published ones, with the box coders of the model."""
    if isinstance(model, RetinaNet):
        return RetinaNetSettings()
    settings = CASCADE if model.cascade else MASK_RCNN
    return set_box_coders(settings, means=model.box_means, stds=model.box_stds)


def make_detection_task(model: RetinaNet | RCNN, *, settings: RetinaNetSettings | RCNNSettings | None = None) -> Task:
    """The published losses and detections; batches and outputs are described above.

    Args:
      model: a detector.
      settings: of ``default_settings`` unless given.
    """
    settings = default_settings(model) if settings is None else settings

    def init(key, batch):
        return model.init(key, normalize(batch["image"]))

    def loss(variables, batch, key):
        drop_key, sample_key = jax.random.split(key)

        def compute(module, images):
            if isinstance(module, RetinaNet):
                return retinanet_loss(module, module(images, train=True), batch)
            return rcnn_loss(module, images, batch, sample_key, settings)

        options = dict(method=compute, rngs={"dropout": drop_key}, mutable=["batch_stats"])
        (value, metrics), state = model.apply(variables, _prepare(batch), **options)
        return value, {"loss": value, **metrics}, dict(state)

    def predict(variables, batch):
        return detect(model, variables, normalize(batch["image"]), batch, settings=settings)

    return Task(init=init, loss=loss, predict=predict)


def detect(
    model: RetinaNet | RCNN,
    variables,
    images: jax.Array,
    batch: dict,
    *,
    settings: RetinaNetSettings | RCNNSettings,
) -> dict[str, jax.Array]:
    """Detections of images.

    Args:
      images: (B, H, W, 3) float32, normalised.
      batch: "valid", int32 (B, 2), and "scale", float32 (B, 4), as the module says.
      settings: how many, and from which score on.

    Returns:
      "boxes", "scores", "labels", "valid" and, of a model with masks, "masks", as the module says.
    """

    def compute(module, images):
        if isinstance(module, RetinaNet):
            return retinanet_detect(module, module(images), batch, settings)
        return rcnn_detect(module, images, batch, settings)

    return model.apply(variables, clear_padding(images, batch["valid"]), method=compute)


def find_positions(model: RetinaNet | RCNN, variables, batch: dict) -> dict[str, dict[str, Any]]:
    """Where the D blocks of a detector's backbone sample the "image" and "valid" of a batch: see ``name_positions``."""
    images = _prepare(batch)
    look = lambda module, images: module.backbone(images)  # noqa: E731
    _, state = model.apply(variables, images, method=look, mutable=["intermediates"])
    sown = state.get("intermediates", {}).get("backbone", {}).get("dat", {})
    return name_positions(sown, model.dat, images.shape[1:3])


def _prepare(batch):
    return clear_padding(normalize(batch["image"]), batch["valid"])
