"""Mean intersection over union over a whole data set, and figures of predictions.

A network sees an image after resizing, possibly at several scales, mirrored, or in windows. Its logits are resized to the label
map of the image by one product with a small matrix per axis. The matrix combines the published steps: from a quarter of the
network's input size to that size, then to the original size. Classes are compared there, a few rows at a time, so that the
probabilities of all pixels are never in memory at once.
"""

import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dat_jax.evaluation.results import Evaluation
from dat_jax.ops.layers.resize import bilinear_weights, traced_bilinear_weights
from dat_jax.visualization import charts

METRIC = "mIoU"  # the best checkpoint has the highest value of this metric
IGNORED = 255
_ROWS = 64  # rows that are classified at a time; label maps are padded to a multiple of it


class Pass(NamedTuple):
    """One forward pass of the network over an image.

    Attributes:
      shape: (height, width) of the resized image in pixels.
      mirrored: whether the image and its logits are mirrored horizontally.
      windows: (top, left, height, width) of the windows. The logits of a pixel are averaged over the windows that contain it.
    """

    shape: tuple[int, int]
    mirrored: bool
    windows: tuple[tuple[int, int, int, int], ...]


def slide(shape: tuple[int, int], *, window: int, stride: int) -> tuple[tuple[int, int, int, int], ...]:
    """Return sliding windows that cover an image (MMSegmentation's "slide" mode).

    Args:
      shape: (height, width) of the image in pixels.
      window: side of a window; 0 is the whole image.
      stride: distance between windows. The last window along an axis is moved back into the image.

    Returns:
      (top, left, height, width) of every window.
    """
    if not window:
        return ((0, 0, *shape),)
    sides = [min(window, side) for side in shape]
    starts = [
        [min(index * stride, side - part) for index in range(max(side - window + stride - 1, 0) // stride + 1)]
        for side, part in zip(shape, sides, strict=True)
    ]
    return tuple((top, left, sides[0], sides[1]) for top in starts[0] for left in starts[1])


def make_segmenter(predict: Callable, *, flip: bool = False, window: int = 0, stride: int = 0) -> Callable:
    """Make ``segment(variables, views, size, shape) -> (labels, probabilities)``, for figures and files.

    Args:
      predict: function of (variables, {"image": (B, h, w, 3)}) that returns {"logits": (B, h / 4, w / 4, K)}, rounded up.
      flip, window, stride: see ``make_evaluator``.

    Returns:
      A function of variables; views, each uint8 (B, h, w, 3), resized from the same images; size, int (B, 2), the original
      heights and widths; and shape, (height, width) of the result. It returns the most probable class, int32 (B, *shape), and
      its probability, float32 (B, *shape). Values outside the size of an image are undefined.
    """
    forward = _make_forward(predict, flip=flip, window=window, stride=stride)

    @functools.partial(jax.jit, static_argnames=("passes", "shape"))
    def classify(logits, size, *, passes, shape):
        def classify_rows(start, probabilities):
            return probabilities.argmax(axis=-1), probabilities.max(axis=-1)

        labels, probabilities = _map_rows(classify_rows, logits, size, passes=passes, shape=_round_up(shape))
        return tuple(x.swapaxes(0, 1).reshape(x.shape[1], -1, shape[1])[:, : shape[0]] for x in (labels, probabilities))

    def segment(variables, views, size, shape):
        passes, logits = forward(variables, views)
        return classify(logits, size, passes=passes, shape=tuple(shape))

    return segment


def make_evaluator(
    predict: Callable, *, flip: bool = False, window: int = 0, stride: int = 0
) -> Callable[..., Evaluation]:
    """Make ``evaluate(variables, batches) -> Evaluation``, compiled once per shape of images.

    Args:
      predict: see ``make_segmenter``.
      flip: whether mirrored images are evaluated, too. Probabilities are averaged over all views and both directions.
      window, stride: side and stride of sliding windows in each view, in pixels; a window of 0 is the whole image.

    Returns:
      A function of variables and batches with:

      - "view_0", "view_1", ...: uint8 (B, h, w, 3);
      - "label": uint8 (B, H, W), 255 for ignored pixels and outside the image;
      - "size": int (B, 2), heights and widths of the images;
      - "mask": (B,), 1 for images that count.

      Its metrics are {"mIoU", "mAcc", "aAcc": percent, see ``compute_metrics``, "loss": mean cross-entropy per pixel, "images":
      number of images}; those of the classes are "IoU" and "accuracy" in percent and "pixels", the number of labeled pixels.
    """
    forward = _make_forward(predict, flip=flip, window=window, stride=stride)

    @functools.partial(jax.jit, static_argnames=("passes",))
    def count_pixels(logits, batch, *, passes):
        height, width = batch["label"].shape[1:]
        shape = _round_up((height, width))
        labels = jnp.where(batch["mask"][:, None, None] > 0, batch["label"], IGNORED)
        labels = jnp.pad(labels, ((0, 0), (0, shape[0] - height), (0, 0)), constant_values=IGNORED)

        def count_rows(start, probabilities):
            label = jax.lax.dynamic_slice_in_dim(labels, start, _ROWS, axis=1).astype(jnp.int32)
            valid, classes = label != IGNORED, probabilities.shape[-1]
            predicted = probabilities.argmax(axis=-1)
            safe_label = jnp.where(valid, label, 0)
            label_probability = jnp.take_along_axis(probabilities, safe_label[..., None], axis=-1)[..., 0]
            return {
                "intersection": _histogram(label, valid & (predicted == label), classes),
                "predicted": _histogram(predicted, valid, classes),
                "labeled": _histogram(label, valid, classes),
                "loss": jnp.where(valid, -jnp.log(jnp.maximum(label_probability, 1e-30)), 0).sum(),
            }

        counts = _map_rows(count_rows, logits, batch["size"], passes=passes, shape=shape)
        return {**jax.tree.map(lambda x: x.sum(axis=0), counts), "images": batch["mask"].sum()}

    def evaluate(variables, batches):
        totals: dict[str, Any] = {}
        for batch in batches:
            passes, logits = forward(variables, [batch[name] for name in view_names(batch)])
            ground_truth = {name: batch[name] for name in ("label", "size", "mask")}
            for name, value in jax.device_get(count_pixels(logits, ground_truth, passes=passes)).items():
                totals[name] = totals.get(name, 0) + np.asarray(value, np.float64)
        images, loss = totals.pop("images"), totals.pop("loss")
        pixels = max(totals["labeled"].sum(), 1.0)
        return Evaluation(
            {**compute_metrics(**totals), "loss": float(loss / pixels), "images": int(images)},
            per_class=_class_metrics(**totals) | {"pixels": totals["labeled"]},
        )

    return evaluate


def compute_metrics(*, intersection: np.ndarray, predicted: np.ndarray, labeled: np.ndarray) -> dict[str, float]:
    """Compute metrics in percent from the pixel counts of a whole data set.

    Args:
      intersection: correctly predicted pixels of each class, (K,).
      predicted: predicted pixels of each class, (K,).
      labeled: labeled pixels of each class, (K,).

    Returns:
      "mIoU": mean over classes of intersection over union; "mAcc": mean over classes of the fraction of correct pixels, both
      over the classes for which they are defined; "aAcc": fraction of all pixels that are correct.
    """
    of_classes = _class_metrics(intersection=intersection, predicted=predicted, labeled=labeled)
    means = {name: values[np.isfinite(values)] for name, values in of_classes.items()}
    return {
        "mIoU": float(means["IoU"].mean()) if len(means["IoU"]) else 0.0,
        "mAcc": float(means["accuracy"].mean()) if len(means["accuracy"]) else 0.0,
        "aAcc": 100 * float(intersection.sum() / max(labeled.sum(), 1)),
    }


def _class_metrics(*, intersection: np.ndarray, predicted: np.ndarray, labeled: np.ndarray) -> dict[str, np.ndarray]:
    """Return "IoU" and "accuracy" of each class in percent, (K,), NaN where undefined; see ``compute_metrics``."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return {
            "IoU": 100 * intersection / (predicted + labeled - intersection),
            "accuracy": 100 * intersection / labeled,
        }


def segment_record(segment: Callable, variables, record: dict) -> tuple[np.ndarray, np.ndarray]:
    """Segment one example.

    Args:
      segment: see ``make_segmenter``.
      variables: variables of the model.
      record: "view_0", ... and "size" of one example, without a batch axis.

    Returns:
      Labels int32 (H, W) and their probabilities float32 (H, W).
    """
    views = [record[name][None] for name in view_names(record)]
    shape = tuple(int(side) for side in record["size"])
    labels, probabilities = segment(variables, views, jnp.asarray(record["size"])[None], shape)
    return np.asarray(labels[0]), np.asarray(probabilities[0])


def save_figures(
    segment: Callable,
    variables,
    records: Sequence[dict],
    *,
    class_names: Sequence[str],
    palette: np.ndarray,
    directory: pathlib.Path,
) -> None:
    """Save segmentations.png with the image, the labels and the prediction of some examples.

    Args:
      segment: see ``make_segmenter``.
      variables: variables of the model.
      records: "image" uint8 (H, W, 3), "label" uint8 (H, W), and the inputs of ``segment_record``.
      class_names: names of the K classes.
      palette: their colors, uint8 (K, 3).
      directory: folder of the figure.
    """
    rows = [
        {
            "image": (record["image"], None),
            "labels": (record["image"], record["label"]),
            "prediction": (record["image"], segment_record(segment, variables, record)[0]),
        }
        for record in records
    ]
    charts.save_segmentations(directory / "segmentations.png", rows, class_names=class_names, palette=palette)


def view_names(names) -> list[str]:
    """Return the names "view_0", "view_1", ... among some names, in numerical order."""
    return sorted((name for name in names if name.startswith("view_")), key=lambda name: int(name[5:]))


def _make_forward(predict, *, flip, window, stride):
    """Make a function of (variables, views) that returns the passes and their logits.

    The logits are a tuple with one entry per pass, each a tuple of (B, h, w, K), one per window.
    """
    network = jax.jit(lambda variables, images: predict(variables, {"image": images})["logits"])

    def forward(variables, views):
        passes, logits = [], []
        for images in views:
            shape = tuple(images.shape[1:3])
            windows = slide(shape, window=window, stride=stride)
            for mirrored in (False, True) if flip else (False,):
                inputs = images[:, :, ::-1] if mirrored else images
                window_logits = []
                for top, left, height, width in windows:
                    part = inputs
                    if (height, width) != shape:
                        part = inputs[:, top : top + height, left : left + width]
                    window_logits.append(network(variables, part))
                passes.append(Pass(shape, mirrored, windows))
                logits.append(tuple(window_logits))
        return tuple(passes), tuple(logits)

    return forward


def _map_rows(function, logits, size, *, passes, shape):
    """Apply a function to all rows of the maps, ``_ROWS`` at a time, and stack the results.

    Args:
      function: function of the first row and the probabilities, (B, _ROWS, width, K).
      logits, passes: see ``_make_forward``.
      size: int (B, 2), original heights and widths.
      shape: (height, width) of the maps; the height is a multiple of ``_ROWS``.
    """
    dtype = jnp.promote_types(logits[0][0].dtype, jnp.float32)
    matrices = [
        [_window_matrices(window, one_pass, size, shape, pass_logits[0].shape, dtype) for window in one_pass.windows]
        for one_pass, pass_logits in zip(passes, logits, strict=True)
    ]

    def apply_to_rows(start):
        total = 0.0
        for pass_matrices, pass_logits in zip(matrices, logits, strict=True):
            values = 0.0
            for (rows, columns), window_logits in zip(pass_matrices, pass_logits, strict=True):
                part = jax.lax.dynamic_slice_in_dim(rows, start, _ROWS, axis=1)
                wide = jnp.einsum("byi,bijk->byjk", part, window_logits, precision=jax.lax.Precision.HIGHEST)
                values += jnp.einsum("bxj,byjk->byxk", columns, wide, precision=jax.lax.Precision.HIGHEST)
            total += jax.nn.softmax(values, axis=-1)
        return function(start, total / len(passes))

    return jax.lax.map(apply_to_rows, jnp.arange(0, shape[0], _ROWS))


def _window_matrices(window, one_pass, size, shape, logits_shape, dtype):
    """Return the contribution of a window's logits to the original image, per axis.

    Returns:
      Matrices for rows, (B, height, h), and for columns, (B, width, w).
    """
    top, left, height, width = window
    matrices = []
    for axis, (start, length) in enumerate(((top, height), (left, width))):
        side, stop = one_pass.shape[axis], start + length
        # Windows form a grid, so the number of windows over a pixel is the product of the numbers along both axes.
        starts = sorted({other[axis] for other in one_pass.windows})
        cover = np.sum([(np.arange(side) >= s) & (np.arange(side) < s + length) for s in starts], axis=0, dtype=float)
        to_view = np.zeros((side, logits_shape[1 + axis]))
        to_view[start:stop] = bilinear_weights(logits_shape[1 + axis], length) / cover[start:stop, None]
        if axis == 1 and one_pass.mirrored:
            to_view = to_view[::-1]
        matrices.append(
            jax.vmap(
                lambda new, to_view=to_view, side=side, count=shape[axis]: jnp.matmul(
                    traced_bilinear_weights(side, new, count=count, dtype=dtype),
                    jnp.asarray(to_view, dtype),
                    precision=jax.lax.Precision.HIGHEST,
                )
            )(size[:, axis])
        )
    return matrices


def _round_up(shape):
    return -(-shape[0] // _ROWS) * _ROWS, shape[1]


def _histogram(values, counted, classes):
    """Count the pixels with each value among those where ``counted`` is True, int32 (classes,).

    Values are compared with all classes, because scatter operations are slow on TPU.
    """
    is_class = values[..., None] == jnp.arange(classes).reshape(1, 1, 1, classes)
    return (is_class & counted[..., None]).sum(axis=(0, 1, 2), dtype=jnp.int32)
