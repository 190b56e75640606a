"""Accuracy over a whole data set and of each class, the confusion matrix, and figures of predictions."""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dat_jax.evaluation.results import Evaluation
from dat_jax.visualization import charts
from dat_jax.visualization.displayable import to_rgb

_MAX_CONFUSION = 2000  # classes of a confusion matrix; it takes 16 MB on the device
METRIC = "top1"  # the best checkpoint has the highest value of this metric


def make_evaluator(predict: Callable) -> Callable[..., Evaluation]:
    """Make ``evaluate(variables, batches, *, classes=None) -> Evaluation``, compiled once per shape of batches.

    Args:
      predict: function of (variables, batch) that returns {"logits": (B, K)}.

    Returns:
      A function of variables and batches. Batches contain "label", int (B,), and "mask", (B,), 1 for examples that count.
      ``classes`` are the indices of the classes that may be predicted, for data sets without the others. The metrics are
      {"top1", "top5": percent, "loss": mean cross-entropy, "examples": number of counted examples}, those of the classes are
      "top1" and "examples", and for up to 2,000 classes there is a confusion matrix.

      If batches contain "acceptable", bool (B, K), a prediction is correct if it is any acceptable class, and examples without
      one are not counted. The only result is then {"top1", "examples"}.
    """

    @jax.jit
    def compute_sums(variables, batch, allowed):  # allowed: bool (1, K)
        logits = predict(variables, batch)["logits"].astype(jnp.float32)
        logits = jnp.where(allowed, logits, -jnp.inf)
        labels, mask = batch["label"], batch["mask"]
        if "acceptable" in batch:
            correct = jnp.take_along_axis(batch["acceptable"], logits.argmax(axis=-1)[:, None], axis=-1)[:, 0]
            mask = mask * batch["acceptable"].any(axis=-1)
            return {"top1": (correct * mask).sum(), "examples": mask.sum()}
        # Rank of the true class. Ties and NaN count against it, so that constant or invalid logits score 0.
        label_logits = jnp.take_along_axis(logits, labels[:, None], axis=-1)
        rank = ((~(logits < label_logits)) & allowed).sum(axis=-1) - 1
        loss = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=-1)[:, 0]
        count = logits.shape[-1]
        counted_label = jax.nn.one_hot(labels, count) * mask[:, None]
        sums = {"class_top1": (rank < 1) @ counted_label, "class_examples": counted_label.sum(axis=0)}
        if count <= _MAX_CONFUSION:  # a product of 0 and 1, exact in any precision
            sums["confusion"] = counted_label.T @ jax.nn.one_hot(logits.argmax(axis=-1), count)
        return sums | {
            "top1": ((rank < 1) * mask).sum(),
            "top5": ((rank < 5) * mask).sum(),
            "loss": (loss * mask).sum(),
            "examples": mask.sum(),
        }

    def evaluate(variables, batches, *, classes=None):
        totals: dict[str, Any] = {}
        for batch in batches:
            if not totals:
                count = jax.eval_shape(predict, variables, batch)["logits"].shape[-1]
                allowed = np.isin(np.arange(count), np.arange(count) if classes is None else classes)[None]
            for name, value in compute_sums(variables, batch, allowed).items():
                totals[name] = totals.get(name, 0) + np.asarray(value, np.float64)
        examples = totals["examples"]
        scales = {"top1": 100, "top5": 100, "loss": 1}
        means = {
            name: scales[name] * float(totals[name]) / max(float(examples), 1.0) for name in scales if name in totals
        }
        metrics = {**means, "examples": int(examples)}
        if "class_examples" not in totals:
            return Evaluation(metrics)
        class_examples = totals["class_examples"]
        with np.errstate(invalid="ignore"):
            per_class = {"top1": 100 * totals["class_top1"] / class_examples, "examples": class_examples}
        confusion = totals["confusion"].astype(np.int64) if "confusion" in totals else None
        return Evaluation(metrics, per_class, confusion=confusion)

    return evaluate


def save_figures(predict: Callable, variables, batch: dict, *, class_names, directory: pathlib.Path) -> None:
    """Save predictions.png and, for models with deformable attention, sampled_points.png.

    Args:
      predict: function of (variables, batch) that returns {"logits": (B, K), "positions": block -> (B, G, Hk, Wk, 2),
        "map_shapes": block -> (height, width)}.
      variables: variables of the model.
      batch: arrays of this process, "image" (B, H, W, C) and "label" (B,). Images are drawn as ``to_rgb`` shows them.
      class_names: names of the K classes.
      directory: folder of the figures.
    """
    images, labels = np.asarray(batch["image"]), np.asarray(batch["label"])
    outputs = jax.device_get(jax.jit(predict)(variables, {"image": images, "label": labels}))
    shown = np.stack([to_rgb(image) for image in images])
    charts.save_predictions(
        directory / "predictions.png",
        shown,
        labels=labels.tolist(),
        predictions=outputs["logits"].argmax(axis=-1),
        class_names=class_names,
    )
    if outputs["positions"]:
        examples = slice(0, 5)
        charts.save_sampled_points(
            directory / "sampled_points.png",
            shown[examples],
            {name: points[examples] for name, points in outputs["positions"].items()},
            map_shapes=outputs["map_shapes"],
        )
