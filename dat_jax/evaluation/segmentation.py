"""Mean intersection over union over a whole data set, and pictures of predictions.

A network sees an image as it was resized, perhaps several times over, mirrored, or in windows; its logits are brought to the
size of the image's label map by one product of small matrices for each axis, which holds the published steps: from a quarter
to the size the network saw, from there to the original size. Classes are compared there, a few rows at a time, so that
probabilities of all pixels never stand in memory.
"""

import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dat_jax.ops.layers.resize import bilinear_weights, traced_bilinear_weights
from dat_jax.visualization import charts as plots

METRIC = "mIoU"  # what the best checkpoint is best in
IGNORED = 255
_ROWS = 64  # that are classified at a time; label maps are padded to multiples of it


class Pass(NamedTuple):
    """One look of the network at an image.

    Attributes:
      shape: (height, width) of the resized image.
      mirrored: whether it was mirrored left and right, and its logits with it.
      windows: (top, left, height, width) of the parts whose logits are added up, each pixel's over their number.
    """

    shape: tuple[int, int]
    mirrored: bool
    windows: tuple[tuple[int, int, int, int], ...]


def slide(shape: tuple[int, int], *, window: int, stride: int) -> tuple[tuple[int, int, int, int], ...]:
    """(top, left, height, width) of windows that cover an image; the last ones are moved back into it.

    A window of 0 is the whole image. Source: MMSegmentation's "slide" mode.
    """
    if not window:
        return ((0, 0, *shape),)
    sides = [min(window, side) for side in shape]
    starts = [
        [min(index * stride, side - part) for index in range(max(side - window + stride - 1, 0) // stride + 1)]
        for side, part in zip(shape, sides, strict=True)
    ]
    return tuple((top, left, *sides) for top in starts[0] for left in starts[1])


def make_segmenter(predict: Callable, *, flip: bool = False, window: int = 0, stride: int = 0) -> Callable:
    """Makes ``segment(variables, views, size, shape) -> (labels, probabilities)``, for pictures and files.

    Args:
      predict: (variables, {"image": (B, h, w, 3)}) -> {"logits": (B, h / 4, w / 4, K)}, rounded up.
      flip, window, stride: see ``make_evaluator``.

    Returns:
      A function of variables, views (each a uint8 (B, h, w, 3), resized from the same images), size int (B, 2), the original
      heights and widths, and shape, (height, width) of the result. It gives the likeliest class int32 (B, *shape) and its
      probability float32; what is beyond an image's size means nothing.
    """
    look = _make_look(predict, flip=flip, window=window, stride=stride)

    @functools.partial(jax.jit, static_argnames=("passes", "shape"))
    def classify(logits, size, *, passes, shape):
        def rows(start, tile):
            return tile.argmax(axis=-1), tile.max(axis=-1)

        labels, probabilities = _map_rows(rows, logits, size, passes=passes, shape=_round_up(shape))
        return tuple(x.swapaxes(0, 1).reshape(x.shape[1], -1, shape[1])[:, : shape[0]] for x in (labels, probabilities))

    def segment(variables, views, size, shape):
        passes, logits = look(variables, views)
        return classify(logits, size, passes=passes, shape=tuple(shape))

    return segment


def make_evaluator(
    predict: Callable, *, flip: bool = False, window: int = 0, stride: int = 0
) -> Callable[..., dict[str, float]]:
    """Makes ``evaluate(variables, batches) -> metrics``, compiled once for each shape that images come in.

    Args:
      predict: as of ``make_segmenter``.
      flip: also looks at mirrored images. Probabilities are averaged over all views and both.
      window, stride: of sliding windows in each view, pixels; 0 for the whole image at once.

    Returns:
      A function of variables and batches: "view_0", "view_1", ..., uint8 (B, h, w, 3); "label" uint8 (B, H, W), 255 ignored
      and beyond the image; "size" int (B, 2), the images' heights and widths; "mask" (B,), 1 for an image that counts. It
      gives {"mIoU", "mAcc", "aAcc": percent, see ``compute_metrics``, "loss": mean cross-entropy of a pixel, "images"}.
    """
    look = _make_look(predict, flip=flip, window=window, stride=stride)

    @functools.partial(jax.jit, static_argnames=("passes",))
    def count(logits, batch, *, passes):
        height, width = batch["label"].shape[1:]
        shape = _round_up((height, width))
        counted = jnp.where(batch["mask"][:, None, None] > 0, batch["label"], IGNORED)
        labels = jnp.pad(counted, ((0, 0), (0, shape[0] - height), (0, 0)), constant_values=IGNORED)

        def rows(start, tile):
            label = jax.lax.dynamic_slice_in_dim(labels, start, _ROWS, axis=1).astype(jnp.int32)
            valid, classes = label != IGNORED, tile.shape[-1]
            predicted = tile.argmax(axis=-1)
            own = jnp.take_along_axis(tile, jnp.where(valid, label, 0)[..., None], axis=-1)[..., 0]
            return {
                "intersection": _histogram(label, valid & (predicted == label), classes),
                "predicted": _histogram(predicted, valid, classes),
                "labelled": _histogram(label, valid, classes),
                "loss": jnp.where(valid, -jnp.log(jnp.maximum(own, 1e-30)), 0).sum(),
            }

        tiles = _map_rows(rows, logits, batch["size"], passes=passes, shape=shape)
        return {**jax.tree.map(lambda x: x.sum(axis=0), tiles), "images": batch["mask"].sum()}

    def evaluate(variables, batches):
        totals: dict[str, Any] = {}
        for batch in batches:
            passes, logits = look(variables, [batch[name] for name in view_names(batch)])
            rest = {name: batch[name] for name in ("label", "size", "mask")}
            for name, value in jax.device_get(count(logits, rest, passes=passes)).items():
                totals[name] = totals.get(name, 0) + np.asarray(value, np.float64)
        images, loss = totals.pop("images"), totals.pop("loss")
        pixels = max(totals["labelled"].sum(), 1.0)
        return {**compute_metrics(**totals), "loss": float(loss / pixels), "images": int(images)}

    return evaluate


def compute_metrics(*, intersection: np.ndarray, predicted: np.ndarray, labelled: np.ndarray) -> dict[str, float]:
    """Percentages from pixels of a whole data set, of each class (K,): right ones, predicted ones, labelled ones.

    Returns:
      "mIoU": mean over classes of intersection over union, "mAcc": of the part of a class's pixels that are right, both over
      the classes for which they are defined; "aAcc": the part of all pixels that are right.
    """
    union = predicted + labelled - intersection
    with np.errstate(invalid="ignore", divide="ignore"):
        iou, accuracy = intersection / union, intersection / labelled
    return {
        "mIoU": 100 * float(np.nanmean(iou)) if union.any() else 0.0,
        "mAcc": 100 * float(np.nanmean(accuracy)) if labelled.any() else 0.0,
        "aAcc": 100 * float(intersection.sum() / max(labelled.sum(), 1)),
    }


def segment_record(segment: Callable, variables, record: dict) -> tuple[np.ndarray, np.ndarray]:
    """Labels int32 (H, W) and their probabilities float32 (H, W) of one example: "view_0", ..., "size", not in a batch."""
    views = [record[name][None] for name in view_names(record)]
    shape = tuple(int(side) for side in record["size"])
    labels, probabilities = segment(variables, views, jnp.asarray(record["size"])[None], shape)
    return np.asarray(labels[0]), np.asarray(probabilities[0])


def save_pictures(
    segment: Callable,
    variables,
    records: Sequence[dict],
    *,
    class_names: Sequence[str],
    palette: np.ndarray,
    directory: pathlib.Path,
) -> None:
    """segmentations.png: image, labels and prediction of some examples.

    Args:
      segment: of ``make_segmenter``.
      variables: of the model.
      records: "image" uint8 (H, W, 3), "label" uint8 (H, W), and what ``segment_record`` wants.
      class_names, palette: of the K classes, uint8 (K, 3).
      directory: where it goes.
    """
    rows = [
        {
            "image": (record["image"], None),
            "labels": (record["image"], record["label"]),
            "prediction": (record["image"], segment_record(segment, variables, record)[0]),
        }
        for record in records
    ]
    plots.save_segmentations(directory / "segmentations.png", rows, class_names=class_names, palette=palette)


def view_names(names) -> list[str]:
    """Those of "view_0", "view_1", ... that are there, in their order."""
    return sorted((name for name in names if name.startswith("view_")), key=lambda name: int(name[5:]))


def _make_look(predict, *, flip, window, stride):
    """(variables, views) -> (passes, their logits: a tuple of a tuple of a window's (B, h, w, K) each)."""
    network = jax.jit(lambda variables, images: predict(variables, {"image": images})["logits"])

    def look(variables, views):
        passes, logits = [], []
        for images in views:
            shape = tuple(images.shape[1:3])
            windows = slide(shape, window=window, stride=stride)
            for mirrored in (False, True) if flip else (False,):
                seen = images[:, :, ::-1] if mirrored else images
                found = []
                for top, left, height, width in windows:
                    part = seen
                    if (height, width) != shape:
                        part = seen[:, top : top + height, left : left + width]
                    found.append(network(variables, part))
                passes.append(Pass(shape, mirrored, windows))
                logits.append(tuple(found))
        return tuple(passes), tuple(logits)

    return look


def _map_rows(function, logits, size, *, passes, shape):
    """``function(start, probabilities (B, _ROWS, width, K))`` of every few rows of maps of a shape, stacked."""
    dtype = jnp.promote_types(logits[0][0].dtype, jnp.float32)
    matrices = [
        [_window_matrices(window, one, size, shape, of[0].shape, dtype) for window in one.windows]
        for one, of in zip(passes, logits, strict=True)
    ]

    def tile(start):
        total = 0.0
        for one_matrices, of in zip(matrices, logits, strict=True):
            values = 0.0
            for (rows, columns), window_logits in zip(one_matrices, of, strict=True):
                part = jax.lax.dynamic_slice_in_dim(rows, start, _ROWS, axis=1)
                wide = jnp.einsum("byi,bijk->byjk", part, window_logits, precision=jax.lax.Precision.HIGHEST)
                values += jnp.einsum("bxj,byjk->byxk", columns, wide, precision=jax.lax.Precision.HIGHEST)
            total += jax.nn.softmax(values, axis=-1)
        return function(start, total / len(passes))

    return jax.lax.map(tile, jnp.arange(0, shape[0], _ROWS))


def _window_matrices(window, one, size, shape, logits_shape, dtype):
    """What a window's logits add to rows (B, height, h) and columns (B, width, w) of the original image."""
    top, left, height, width = window
    found = []
    for axis, (start, length) in enumerate(((top, height), (left, width))):
        side, stop = one.shape[axis], start + length
        # The starts along an axis are those of all windows, so a pixel is covered as often as the product over axes says.
        starts = sorted({other[axis] for other in one.windows})
        cover = sum(((np.arange(side) >= s) & (np.arange(side) < s + length)).astype(float) for s in starts)
        seen = np.zeros((side, logits_shape[1 + axis]))
        seen[start:stop] = bilinear_weights(logits_shape[1 + axis], length) / cover[start:stop, None]
        if axis == 1 and one.mirrored:
            seen = seen[::-1]
        found.append(
            jax.vmap(
                lambda new, seen=seen, side=side, count=shape[axis]: jnp.matmul(
                    traced_bilinear_weights(side, new, count=count, dtype=dtype),
                    jnp.asarray(seen, dtype),
                    precision=jax.lax.Precision.HIGHEST,
                )
            )(size[:, axis])
        )
    return found


def _round_up(shape):
    return -(-shape[0] // _ROWS) * _ROWS, shape[1]


def _histogram(values, counted, classes):
    """int32 (classes,): how many pixels have each value, of those that count. Compared, as a TPU has no fast scatter."""
    same = values[..., None] == jnp.arange(classes).reshape(1, 1, 1, classes)
    return (same & counted[..., None]).sum(axis=(0, 1, 2), dtype=jnp.int32)
