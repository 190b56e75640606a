"""Semantic segmentation."""

import jax
import jax.numpy as jnp

from dat_jax.models.segmentation import Segmentor
from dat_jax.ops.layers.resize import resize_bilinear
from dat_jax.tasks import Task
from dat_jax.tasks.classification import normalize

IGNORED = 255  # label of pixels that do not count


def segmentation_loss(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy at the labels' size, and the percentage of pixels that are right.

    Args:
      logits: (B, h, w, K), resized bilinearly.
      labels: (B, H, W) integers; 255 is ignored.

    Returns:
      The sum over pixels that count, over the number of ALL pixels, as published; and the accuracy among those that count.
    """
    logits = resize_bilinear(logits, labels.shape[1:3])
    valid = labels != IGNORED
    # The label's logit by comparison: looked up, its gradient would be a scatter over all logits.
    own = labels[..., None] == jnp.arange(logits.shape[-1]).reshape(1, 1, 1, -1)
    losses = jax.nn.logsumexp(logits, axis=-1) - jnp.where(own, logits, 0).sum(axis=-1)
    loss = jnp.where(valid, losses, 0).sum() / labels.size
    right = (logits.argmax(axis=-1) == labels) & valid
    return loss, 100 * right.sum(dtype=loss.dtype) / jnp.maximum(valid.sum(dtype=loss.dtype), 1)


def make_segmentation_task(model: Segmentor, *, auxiliary_weight: float) -> Task:
    """``segmentation_loss`` of the logits, and ``auxiliary_weight`` times that of the auxiliary ones where there are any.

    Batches to train on hold "image", uint8 (B, H, W, 3), "label", uint8 (B, H, W), 255 for pixels that do not count, and
    "valid", int (B, 2), the height and width of each image; what is beyond is padding and 0 after normalising. Outputs of
    ``predict`` (which wants "image" only): {"logits": (B, H / 4, W / 4, K)}, rounded up.
    """

    def init(key, batch):
        return model.init(key, normalize(batch["image"]))

    def loss(variables, batch, key):
        images = clear_padding(normalize(batch["image"]), batch["valid"])
        rngs = {"dropout": key}
        outputs, state = model.apply(variables, images, train=True, rngs=rngs, mutable=["batch_stats"])
        value, accuracy = segmentation_loss(outputs["logits"], batch["label"])
        metrics = {"accuracy": accuracy}
        if "auxiliary_logits" in outputs:
            auxiliary, _ = segmentation_loss(outputs["auxiliary_logits"], batch["label"])
            metrics |= {"main_loss": value, "auxiliary_loss": auxiliary_weight * auxiliary}
            value = value + auxiliary_weight * auxiliary
        return value, {"loss": value, **metrics}, dict(state)

    def predict(variables, batch):
        return {"logits": model.apply(variables, normalize(batch["image"]), train=False)["logits"]}

    return Task(init=init, loss=loss, predict=predict)


def clear_padding(images: jax.Array, valid: jax.Array) -> jax.Array:
    """Images (B, H, W, 3) with zeros beyond their heights and widths, int (B, 2)."""
    rows, columns = (jnp.arange(side)[None, :] < valid[:, axis, None] for axis, side in enumerate(images.shape[1:3]))
    return jnp.where((rows[:, :, None] & columns[:, None, :])[..., None], images, 0)
