"""Loss and prediction of a semantic segmentation model."""

from typing import cast

import jax
import jax.numpy as jnp

from dat_jax.models.segmentation import Segmentor
from dat_jax.ops.layers.resize import resize_bilinear
from dat_jax.ops.sizes import clear
from dat_jax.tasks.objective import Objective
from dat_jax.tasks.preprocessing import clear_padding, normalize

IGNORED = 255  # label of pixels without a class


def segmentation_loss(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy and accuracy over pixels, at the size of the labels.

    Args:
      logits: (B, h, w, K), resized bilinearly to the labels' size.
      labels: (B, H, W) int; 255 is ignored.

    Returns:
      The loss, summed over the labeled pixels and divided by the number of ALL pixels (the published behavior), and the
      accuracy in percent over the labeled pixels.
    """
    logits = resize_bilinear(logits, labels.shape[1:3])
    labeled = labels != IGNORED
    # The label's logit is selected by comparison: a lookup would have a scatter over all logits as its gradient.
    is_label = labels[..., None] == jnp.arange(logits.shape[-1]).reshape(1, 1, 1, -1)
    losses = jax.nn.logsumexp(logits, axis=-1) - jnp.where(is_label, logits, 0).sum(axis=-1)
    loss = jnp.where(labeled, losses, 0).sum() / labels.size
    correct = (logits.argmax(axis=-1) == labels) & labeled
    return loss, 100 * correct.sum(dtype=loss.dtype) / jnp.maximum(labeled.sum(dtype=loss.dtype), 1)


def make_segmentation_objective(model: Segmentor, *, auxiliary_weight: float) -> Objective:
    """Make a segmentor's objective: ``segmentation_loss`` of its logits and of its auxiliary logits, if it has any.

    Training batches hold "image", (B, H, W, 3) uint8, "label", (B, H, W) uint8 with 255 for pixels without a class, and
    "valid", (B, 2) int, the height and width of each image; pixels beyond are padding and zero after normalization.
    ``predict`` needs "image" only and returns {"logits": (B, ceil(H / 4), ceil(W / 4), K)}. With "sizes", int (B, 2), the images
    are the top left of their arrays (``ops.sizes``), and the result also has "sizes", those of the logits.

    Args:
      model: the segmentor.
      auxiliary_weight: weight of the auxiliary loss.
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
        images, sizes = normalize(batch["image"]), batch.get("sizes")
        outputs = cast(dict[str, jax.Array], model.apply(variables, images, train=False, sizes=sizes))
        if sizes is None:
            return {"logits": outputs["logits"]}
        logits_sizes = model.logits_sizes(sizes)
        return {"logits": clear(outputs["logits"], logits_sizes), "sizes": logits_sizes}

    return Objective(init=init, loss=loss, predict=predict)
