"""Image classification."""

import jax
import jax.numpy as jnp
import optax

from dat_jax.models.dat import DAT
from dat_jax.models.key_positions import name_positions
from dat_jax.tasks import Task
from dat_jax.tasks.augmentation import erase_randomly, mix

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalize(images: jax.Array) -> jax.Array:
    """uint8 (B, H, W, 3) -> float32: scaled to 0..1, less the ImageNet mean, over its deviation."""
    mean, std = (jnp.asarray(x, jnp.float32).reshape(1, 1, 1, 3) for x in (IMAGENET_MEAN, IMAGENET_STD))
    return (images.astype(jnp.float32) / 255 - mean) / std


def smooth_labels(labels: jax.Array, *, num_classes: int, smoothing: float) -> jax.Array:
    """int (B,) -> (B, num_classes): 1 - s + s / K for the class, s / K for the others."""
    return jax.nn.one_hot(labels, num_classes) * (1 - smoothing) + smoothing / num_classes


def soft_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean over the batch of -sum(targets * log_softmax(logits)); logits and targets (B, K)."""
    return optax.softmax_cross_entropy(logits, targets).mean()


def make_classification_task(
    model: DAT,
    *,
    label_smoothing: float,
    erasing_probability: float = 0.0,
    mixup_alpha: float = 0.0,
    cutmix_alpha: float = 0.0,
) -> Task:
    """Cross-entropy on smoothed labels, of images that are erased and mixed as ``tasks.augmentation`` says.

    Batches hold "image", uint8 (B, H, W, 3), and "label", int (B,). Outputs of ``predict``: "logits" (B, K), and "positions"
    and "map_shapes" of ``name_positions``.
    """

    def init(key, batch):
        return model.init(key, normalize(batch["image"]))

    def loss(variables, batch, key):
        dropout, erasing, mixing = jax.random.split(key, 3)
        images = normalize(batch["image"])
        targets = smooth_labels(batch["label"], num_classes=model.num_classes, smoothing=label_smoothing)
        if erasing_probability > 0:
            images = erase_randomly(images, erasing, probability=erasing_probability)
        images, targets = mix(images, targets, mixing, mixup_alpha=mixup_alpha, cutmix_alpha=cutmix_alpha)
        logits = model.apply(variables, images, train=True, rngs={"dropout": dropout})
        value = soft_cross_entropy(logits, targets)
        # Of a mixed image the class with the larger part counts.
        top1 = 100 * (logits.argmax(axis=-1) == targets.argmax(axis=-1)).mean(dtype=logits.dtype)
        return value, {"loss": value, "top1": top1}, {}

    def predict(variables, batch):
        images = normalize(batch["image"])
        logits, state = model.apply(variables, images, train=False, mutable=["intermediates"])
        return {"logits": logits, **name_positions(state.get("intermediates", {}), model, images.shape[1:3])}

    return Task(init=init, loss=loss, predict=predict)
