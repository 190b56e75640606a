"""Loss and prediction of an image classifier."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import optax

from dat_jax.models.dat import DAT
from dat_jax.models.key_positions import name_positions
from dat_jax.tasks.classification.augmentation import erase_randomly, mix
from dat_jax.tasks.classification.distillation import distillation_loss, model_outputs, self_distillation_loss
from dat_jax.tasks.objective import Objective
from dat_jax.tasks.preprocessing import IMAGENET_MEAN, IMAGENET_STD, normalize


def smooth_labels(labels: jax.Array, *, num_classes: int, smoothing: float) -> jax.Array:
    """Label smoothing.

    Args:
      labels: (B,) int.
      num_classes: number of classes K.
      smoothing: s, from 0 to below 1.

    Returns:
      (B, K) probabilities: 1 - s + s / K for the label's class, s / K for the others.
    """
    return jax.nn.one_hot(labels, num_classes) * (1 - smoothing) + smoothing / num_classes


def soft_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean over the batch of -sum(targets * log_softmax(logits)).

    Args:
      logits: (B, K).
      targets: (B, K) probabilities.
    """
    return optax.softmax_cross_entropy(logits, targets).mean()


def binary_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean over the batch and the classes of the cross-entropy of a sigmoid for each class. Source: timm.

    Args:
      logits: (B, K).
      targets: (B, K) probabilities.
    """
    return optax.sigmoid_binary_cross_entropy(logits, targets).mean()


LOSSES = {"cross_entropy": soft_cross_entropy, "binary": binary_cross_entropy}


def make_classification_objective(
    model: DAT,
    *,
    label_smoothing: float,
    loss_kind: str = "cross_entropy",
    erasing_probability: float = 0.0,
    mixup_alpha: float = 0.0,
    cutmix_alpha: float = 0.0,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    distillation: Mapping[str, Any] | None = None,
    mesa: Mapping[str, Any] | None = None,
) -> Objective:
    """Make a classifier's objective: cross-entropy on smoothed labels of randomly erased and mixed images.

    Batches hold "image", (B, H, W, C) as ``normalize`` takes it, and "label", (B,) int. ``predict`` returns "logits", (B, K), and
    "positions" and "map_shapes" of ``name_positions``. ``embed`` returns the input of the head, (B, C).

    Args:
      model: the classifier.
      label_smoothing: see ``smooth_labels``.
      loss_kind: one of ``LOSSES``.
      erasing_probability: see ``erase_randomly``; 0 disables it.
      mixup_alpha, cutmix_alpha: see ``mix``; 0 disables that kind.
      mean, std: see ``normalize``.
      distillation: "kind", "temperature" and "weight" of the loss of a teacher, see ``distillation_loss``. It is used if the
        loss is called with a teacher.
      mesa: "start" and "weight" of the loss of the averaged model, see ``self_distillation_loss``, likewise.
    """
    normalize_images = functools.partial(normalize, mean=mean, std=std)

    def init(key, batch):
        return model.init(key, normalize_images(batch["image"]))

    def loss(variables, batch, key, guides=None):
        dropout_key, erasing_key, mixing_key = jax.random.split(key, 3)
        images = normalize_images(batch["image"])
        targets = smooth_labels(batch["label"], num_classes=model.num_classes, smoothing=label_smoothing)
        if erasing_probability > 0:
            images = erase_randomly(images, erasing_key, probability=erasing_probability)
        images, targets = mix(images, targets, mixing_key, mixup_alpha=mixup_alpha, cutmix_alpha=cutmix_alpha)
        options = dict(train=True, rngs={"dropout": dropout_key})
        if guides is None:
            outputs = {"logits": cast(jax.Array, model.apply(variables, images, **options))}
        else:
            outputs = model_outputs(model, variables, images, **options)
        logits = outputs["logits"]
        value = LOSSES[loss_kind](logits, targets)
        extra = {}
        if guides is not None and guides.teacher is not None and distillation is not None:
            kind, temperature, weight = (distillation[name] for name in ("kind", "temperature", "weight"))
            extra["distillation"] = distillation_loss(
                outputs, guides.teacher(images), kind=kind, temperature=temperature
            )
            value = (1 - weight) * value + weight * extra["distillation"]
        if guides is not None and guides.average is not None and mesa is not None:
            extra["mesa"] = self_distillation_loss(
                outputs, lambda: guides.average(images), progress=guides.progress, start=mesa["start"]
            )
            value += mesa["weight"] * extra["mesa"]
        # The class of a mixed image is that of its larger part.
        top1 = 100 * (logits.argmax(axis=-1) == targets.argmax(axis=-1)).mean(dtype=logits.dtype)
        return value, {"loss": value, "top1": top1, **extra}, {}

    def predict(variables, batch):
        images = normalize_images(batch["image"])
        logits, state = model.apply(variables, images, train=False, mutable=["intermediates"])
        return {"logits": logits, **name_positions(dict(state).get("intermediates", {}), model, images.shape[1:3])}

    def embed(variables, batch):
        def pool_features(model, images):
            return model.pool(model.features(images)[-1])

        return model.apply(variables, normalize_images(batch["image"]), method=pool_features)

    outputs = functools.partial(model_outputs, model)
    return Objective(init=init, loss=loss, predict=predict, outputs=outputs, embed=embed)
