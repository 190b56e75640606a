"""Top-1 and top-5 accuracy over a whole data set, and a picture of predictions."""

import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dat_jax.visualization import charts as plots

METRIC = "top1"  # what the best checkpoint is best in


def make_evaluator(predict: Callable) -> Callable[..., dict[str, float]]:
    """Makes ``evaluate(variables, batches, *, classes=None) -> metrics``, compiled once for its batches' shapes.

    Args:
      predict: (variables, batch) -> {"logits": (B, K)}. Batches hold "label" and "mask", 1 for each example that counts.
        Where they hold "acceptable", bool (B, K), every class that is true is right, and examples without one do not count.

    Returns:
      A function giving {"top1", "top5": percent, "loss": mean cross-entropy, "examples": how many were counted}; with
      "acceptable", top1 and examples. classes: indices of those that can be predicted, of a set without the others.
    """

    @jax.jit
    def sums(variables, batch, allowed):  # allowed: bool (1, K)
        logits = predict(variables, batch)["logits"].astype(jnp.float32)
        logits = jnp.where(allowed, logits, -jnp.inf)
        labels, mask = batch["label"], batch["mask"]
        if "acceptable" in batch:
            right = jnp.take_along_axis(batch["acceptable"], logits.argmax(axis=-1)[:, None], axis=-1)[:, 0]
            mask = mask * batch["acceptable"].any(axis=-1)
            return {"top1": (right * mask).sum(), "examples": mask.sum()}
        # Rank of the true class. Ties and NaN count against it, so that logits that say nothing score nothing.
        own = jnp.take_along_axis(logits, labels[:, None], axis=-1)
        rank = ((~(logits < own)) & allowed).sum(axis=-1) - 1
        loss = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=-1)[:, 0]
        return {
            "top1": ((rank < 1) * mask).sum(),
            "top5": ((rank < 5) * mask).sum(),
            "loss": (loss * mask).sum(),
            "examples": mask.sum(),
        }

    def evaluate(variables, batches, *, classes=None):
        totals = {}
        for batch in batches:
            if not totals:
                count = jax.eval_shape(predict, variables, batch)["logits"].shape[-1]
                allowed = np.isin(np.arange(count), np.arange(count) if classes is None else classes)[None]
            for name, value in sums(variables, batch, allowed).items():
                totals[name] = totals.get(name, 0.0) + float(value)
        examples = totals.pop("examples")
        scales = {"top1": 100, "top5": 100, "loss": 1}
        means = {name: scales[name] * totals[name] / max(examples, 1.0) for name in scales if name in totals}
        return {**means, "examples": int(examples)}

    return evaluate


def save_pictures(predict: Callable, variables, batch: dict, *, class_names, directory: pathlib.Path) -> None:
    """predictions.png and, of a model with deformable attention, sampled_points.png.

    Args:
      predict: (variables, batch) -> {"logits": (B, K), "positions": block -> (B, G, Hk, Wk, 2), "map_shapes": block ->
        (height, width)}.
      batch: of this process's own arrays, "image" uint8 (B, H, W, 3) and "label".
      class_names: of the K classes.
      directory: where they go.
    """
    images, labels = np.asarray(batch["image"]), np.asarray(batch["label"])
    outputs = jax.device_get(jax.jit(predict)(variables, {"image": images, "label": labels}))
    plots.save_predictions(
        directory / "predictions.png",
        images,
        labels=labels,
        predictions=outputs["logits"].argmax(axis=-1),
        class_names=class_names,
    )
    if outputs["positions"]:
        examples = slice(0, 5)
        plots.save_sampled_points(
            directory / "sampled_points.png",
            images[examples],
            {name: points[examples] for name, points in outputs["positions"].items()},
            map_shapes=outputs["map_shapes"],
        )
