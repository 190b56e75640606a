"""Top-1 and top-5 accuracy over a whole data set, and a picture of predictions."""

import pathlib
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from dat_jax import plots

METRIC = "top1"  # what the best checkpoint is best in


def make_evaluator(predict: Callable) -> Callable[[dict, Iterable[dict]], dict[str, float]]:
    """Makes ``evaluate(variables, batches) -> metrics``, compiled once for its batches' shapes.

    Args:
      predict: (variables, batch) -> {"logits": (B, K)}. Batches hold "label" and "mask", 1 for each example that counts.

    Returns:
      A function giving {"top1", "top5": percent, "loss": mean cross-entropy, "examples": how many were counted}.
    """

    @jax.jit
    def sums(variables, batch):
        logits = predict(variables, batch)["logits"].astype(jnp.float32)
        labels, mask = batch["label"], batch["mask"]
        # Rank of the true class. Ties and NaN count against it, so that logits that say nothing score nothing.
        own = jnp.take_along_axis(logits, labels[:, None], axis=-1)
        rank = (~(logits < own)).sum(axis=-1) - 1
        loss = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=-1)[:, 0]
        return {
            "top1": ((rank < 1) * mask).sum(),
            "top5": ((rank < 5) * mask).sum(),
            "loss": (loss * mask).sum(),
            "examples": mask.sum(),
        }

    def evaluate(variables, batches):
        totals = {"top1": 0.0, "top5": 0.0, "loss": 0.0, "examples": 0.0}
        for batch in batches:
            for name, value in sums(variables, batch).items():
                totals[name] += float(value)
        count = totals["examples"]
        return {
            "top1": 100 * totals["top1"] / count,
            "top5": 100 * totals["top5"] / count,
            "loss": totals["loss"] / count,
            "examples": int(count),
        }

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
