"""Mean intersection over union over a whole data set, and figures of predictions.

A network sees an image after resizing, possibly at several scales, mirrored, or in windows. Its logits are resized to the label
map of the image by one product with a small matrix per axis. The matrix combines the published steps: from a quarter of the
network's input size to that size, then to the original size. Classes are compared there, a few rows at a time, so that the
probabilities of all pixels are never in memory at once.

Nothing is compiled for the size of an image: label maps are cut into tiles of one size, and the matrices are computed from the
sizes, which are arguments of the program. If the images are in buckets, see ``data.buckets``, the network is compiled once per
bucket; otherwise once per size.
"""

import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dat_jax.evaluation.results import Evaluation
from dat_jax.visualization import charts

METRIC = "mIoU"  # the best checkpoint has the highest value of this metric
IGNORED = 255
_ROWS = 64  # rows that are classified at a time; the sides of tiles are multiples of it
_LARGEST_TILE = 512
# Linux allows a process 65,530 memory maps. A program for a CPU takes about 600, and XLA crashes if there are no more.
_MOST_MEMORY_MAPS = 30_000
_HIGHEST = jax.lax.Precision.HIGHEST


class Pass(NamedTuple):
    """One forward pass of the network over all windows of a batch.

    Attributes:
      logits: (B, h, w, K) of each window, those of the first row of windows first.
      logits_sizes: int (B, 2), the part of these arrays that belongs to the window.
      view_sizes: int (B, 2), height and width of the resized images.
      mirrored: whether the images and their logits are mirrored horizontally.
      bucket: (height, width) of the array of resized images.
    """

    logits: tuple[jax.Array, ...]
    logits_sizes: jax.Array
    view_sizes: jax.Array
    mirrored: bool
    bucket: tuple[int, int]


class Windows(NamedTuple):
    """Sliding windows along one axis, for a batch of images.

    Attributes:
      starts: int (B, N), first pixel of each window.
      length: int (B,), pixels of a window.
      used: bool (B, N); small images need fewer windows than their bucket.
    """

    starts: jax.Array
    length: jax.Array
    used: jax.Array


def count_windows(side: Any, *, window: int, stride: int) -> Any:
    """Number of sliding windows along a side (MMSegmentation's "slide" mode): an int, or an array if ``side`` is one."""
    larger = max(side - window, 0) if isinstance(side, int) else jnp.maximum(side - window, 0)
    return -(-larger // stride) + 1


def slide(side: jax.Array, bucket: int, *, window: int, stride: int) -> Windows:
    """Return the sliding windows that cover images along one axis.

    Args:
      side: int (B,), height or width of the images in pixels.
      bucket: the same side of the array that holds them.
      window: side of a window; 0 is the whole image.
      stride: distance between windows. The last window is moved back into the image.
    """
    if not window:
        ones = jnp.ones((len(side), 1), bool)
        return Windows(jnp.zeros((len(side), 1), side.dtype), side, ones)
    index = jnp.arange(count_windows(bucket, window=window, stride=stride))[None]
    length = jnp.minimum(side, window)
    starts = jnp.minimum(index * stride, (side - length)[:, None])
    return Windows(starts, length, index < count_windows(side, window=window, stride=stride)[:, None])


def label_tile(side: int) -> int:
    """Side of the tiles of label maps whose longest side is this: a power of two from 64 to 512."""
    tile = _ROWS
    while tile < min(side, _LARGEST_TILE):
        tile *= 2
    return tile


def tile_origins(shape: tuple[int, int], tile: int) -> list[tuple[int, int]]:
    """(top, left) of the tiles that cover a label map of (height, width)."""
    return [(top, left) for top in range(0, shape[0], tile) for left in range(0, shape[1], tile)]


def make_segmenter(predict: Callable, *, flip: bool = False, window: int = 0, stride: int = 0) -> Callable:
    """Make ``segment(variables, views, size, shape, view_sizes=None) -> (labels, probabilities)``, for figures and files.

    Args:
      predict: function of (variables, {"image": (B, h, w, 3)}) that returns {"logits": (B, h / 4, w / 4, K)}, rounded up. If
        images are smaller than their arrays, it also gets "sizes", int (B, 2), and returns "sizes", those of the logits.
      flip, window, stride: see ``make_evaluator``.

    Returns:
      A function of variables; views, each uint8 (B, h, w, 3), resized from the same images; size, int (B, 2), the original
      heights and widths; shape, (height, width) of the result; and view_sizes, an int (B, 2) for each view with the sizes of the
      resized images, or None if they fill the arrays. It returns the most probable class, int32 (B, *shape), and its
      probability, float32 (B, *shape). Values outside the size of an image are undefined.
    """
    forward, programs = _make_forward(predict, flip=flip, window=window, stride=stride)

    @functools.partial(jax.jit, static_argnames=("mirrored", "buckets", "tile"))
    def classify(arrays, size, origin, *, mirrored, buckets, tile):
        def classify_rows(start, probabilities):
            return probabilities.argmax(axis=-1), probabilities.max(axis=-1)

        passes = _join_passes(arrays, mirrored, buckets)
        parts = _map_rows(classify_rows, passes, size, origin, tile=tile, window=window, stride=stride)
        return tuple(x.swapaxes(0, 1).reshape(x.shape[1], tile, tile) for x in parts)

    discard_programs = _make_discarding([*programs, classify])

    def segment(variables, views, size, shape, view_sizes=None):
        discard_programs(views)
        passes = forward(variables, views, view_sizes)
        arrays, mirrored, buckets = _split_passes(passes)
        tile, found = label_tile(max(shape)), None
        for top, left in tile_origins(shape, tile):
            origin = jnp.full((len(size), 2), jnp.array([top, left]), jnp.int32)
            parts = classify(arrays, jnp.asarray(size), origin, mirrored=mirrored, buckets=buckets, tile=tile)
            if found is None:
                found = tuple(np.zeros((len(size), *shape), part.dtype) for part in parts)
            for whole, part in zip(found, parts, strict=True):
                place = whole[:, top : top + tile, left : left + tile]
                place[:] = np.asarray(part)[:, : place.shape[1], : place.shape[2]]
        return found

    return segment


def make_evaluator(
    predict: Callable, *, flip: bool = False, window: int = 0, stride: int = 0, exact: bool = True
) -> Callable[..., Evaluation]:
    """Make ``evaluate(variables, batches) -> Evaluation``, compiled once per shape of the arrays of images.

    Args:
      predict: see ``make_segmenter``.
      flip: whether mirrored images are evaluated, too. Probabilities are averaged over all views and both directions.
      window, stride: side and stride of sliding windows in each view, in pixels; a window of 0 is the whole image.
      exact: whether the images fill their arrays, so that the network needs no sizes.

    Returns:
      A function of variables and batches, see ``data.sized_batching.make_sized_eval_batches``. Its metrics are {"mIoU", "mAcc",
      "aAcc": percent, see ``compute_metrics``, "loss": mean cross-entropy per pixel, "images": number of images}; those of the
      classes are "IoU" and "accuracy" in percent and "pixels", the number of labeled pixels.
    """
    forward, programs = _make_forward(predict, flip=flip, window=window, stride=stride)

    @functools.partial(jax.jit, static_argnames=("mirrored", "buckets"))
    def count_pixels(arrays, batch, number, *, mirrored, buckets):
        """Counts of one tile of the label maps; "images" are those of the batch."""
        label, origin = (
            jax.lax.dynamic_index_in_dim(batch[name], number, 1, keepdims=False) for name in ("label", "origin")
        )
        labels = jnp.where(batch["mask"][:, None, None] > 0, label, IGNORED)

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

        passes = _join_passes(arrays, mirrored, buckets)
        options = dict(tile=label.shape[1], window=window, stride=stride)
        counts = _map_rows(count_rows, passes, batch["size"], origin, **options)
        images = jnp.where(number == 0, batch["mask"].sum(), 0)
        return {**jax.tree.map(lambda x: x.sum(axis=0), counts), "images": images}

    discard_programs = _make_discarding([*programs, count_pixels])

    def evaluate(variables, batches):
        totals: dict[str, Any] = {}
        for batch in batches:
            names = view_names(batch)
            discard_programs([batch[name] for name in names])
            view_sizes = None if exact else [batch[f"size_of_{name}"] for name in names]
            passes = forward(variables, [batch[name] for name in names], view_sizes)
            arrays, mirrored, buckets = _split_passes(passes)
            ground_truth = {name: batch[name] for name in ("label", "origin", "size", "mask")}
            for number in range(batch["label"].shape[1]):
                counts = count_pixels(arrays, ground_truth, np.int32(number), mirrored=mirrored, buckets=buckets)
                for name, value in jax.device_get(counts).items():
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
      record: "view_0", ... and "size" of one example, without a batch axis; and "size_of_view_0", ... if the views are smaller
        than their arrays.

    Returns:
      Labels int32 (H, W) and their probabilities float32 (H, W).
    """
    views = [record[name][None] for name in view_names(record)]
    shape = tuple(int(side) for side in record["size"])
    view_sizes = [record[f"size_of_{name}"][None] for name in view_names(record) if f"size_of_{name}" in record]
    labels, probabilities = segment(variables, views, record["size"][None], shape, view_sizes or None)
    return labels[0], probabilities[0]


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
    """Make a function of (variables, views, sizes of the views or None) that returns the passes, and list its programs."""

    @jax.jit
    def network(variables, images, sizes):
        outputs = predict(variables, {"image": images} | ({} if sizes is None else {"sizes": sizes}))
        logits = outputs["logits"]
        return logits, outputs["sizes"] if "sizes" in outputs else _fill(logits)

    @functools.partial(jax.jit, static_argnames=("mirrored",))
    def prepare(images, sizes, place, *, mirrored):
        """The window at a place (row, column), its size, and the size of the view."""
        bucket = tuple(images.shape[1:3])
        sizes = _fill(images) if sizes is None else sizes
        if mirrored:
            columns = jnp.maximum(sizes[:, 1:] - 1 - jnp.arange(bucket[1])[None], 0)
            images = jnp.take_along_axis(images, columns[:, None, :, None], axis=2)
        lines = [slide(sizes[:, axis], bucket[axis], window=window, stride=stride) for axis in (0, 1)]
        shape = tuple(min(window or side, side) for side in bucket)
        if shape != bucket:
            starts = jnp.stack([line.starts[:, index] for line, index in zip(lines, place, strict=True)], axis=1)
            images = jax.vmap(
                lambda image, start: jax.lax.dynamic_slice(image, (*start, 0), (*shape, image.shape[-1]))
            )(images, starts)
        return images, jnp.stack([line.length for line in lines], axis=1), sizes

    def forward(variables, views, view_sizes):
        passes = []
        for number, images in enumerate(views):
            bucket = tuple(images.shape[1:3])
            given = None if view_sizes is None else view_sizes[number]
            counts = [count_windows(side, window=window, stride=stride) if window else 1 for side in bucket]
            for mirrored in (False, True) if flip else (False,):
                results, sizes = [], []
                for place in np.ndindex(*counts):
                    part, lengths, view_size = prepare(images, given, np.array(place, np.int32), mirrored=mirrored)
                    results.append(network(variables, part, None if given is None else lengths))
                    sizes.append(view_size)
                logits = tuple(logits for logits, _ in results)
                passes.append(Pass(logits, results[0][1], sizes[0], mirrored, bucket))
        return passes

    return forward, (network, prepare)


def _make_discarding(programs):
    """Make a function of the views of a batch that discards the programs if those for other shapes take many memory maps."""
    used = set()

    def discard_programs(views):
        shapes = {images.shape for images in views}
        if not shapes <= used and used and _count_memory_maps() > _MOST_MEMORY_MAPS:
            for program in programs:
                program.clear_cache()
            used.clear()
        used.update(shapes)

    return discard_programs


def _count_memory_maps() -> int:
    """Number of memory maps of this process; 0 on systems other than Linux."""
    try:
        return pathlib.Path("/proc/self/maps").read_bytes().count(b"\n")
    except OSError:
        return 0


def _fill(maps):
    """Int (B, 2), the sizes of maps (B, H, W, C) that fill their array."""
    return jnp.full((len(maps), 2), jnp.array(maps.shape[1:3]), jnp.int32)


def _split_passes(passes):
    """The arrays of passes, and what a program is compiled for: which are mirrored, and the buckets."""
    arrays = tuple((one.logits, one.logits_sizes, one.view_sizes) for one in passes)
    return arrays, tuple(one.mirrored for one in passes), tuple(one.bucket for one in passes)


def _join_passes(arrays, mirrored, buckets):
    return [
        Pass(logits, logits_sizes, view_sizes, flag, bucket)
        for (logits, logits_sizes, view_sizes), flag, bucket in zip(arrays, mirrored, buckets, strict=True)
    ]


def _map_rows(function, passes, size, origin, *, tile, window, stride):
    """Apply a function to all rows of a tile of the label maps, ``_ROWS`` at a time, and stack the results.

    Args:
      function: function of the first row and the probabilities, (B, _ROWS, tile, K).
      passes: see ``Pass``.
      size: int (B, 2), original heights and widths.
      origin: int (B, 2), (top, left) of the tile.
      tile: side of the tile, a multiple of ``_ROWS``.
      window, stride: see ``slide``.
    """
    matrices = [_pass_matrices(one, size, origin, tile=tile, window=window, stride=stride) for one in passes]

    def apply_to_rows(start):
        total = 0.0
        for (rows, columns), one in zip(matrices, passes, strict=True):
            values, count = 0.0, len(columns)
            for number, logits in enumerate(one.logits):
                part = jax.lax.dynamic_slice_in_dim(rows[number // count], start, _ROWS, axis=1)
                wide = jnp.einsum("byi,bijk->byjk", part, logits, precision=_HIGHEST)
                values += jnp.einsum("bxj,byjk->byxk", columns[number % count], wide, precision=_HIGHEST)
            total += jax.nn.softmax(values, axis=-1)
        return function(start, total / len(passes))

    return jax.lax.map(apply_to_rows, jnp.arange(0, tile, _ROWS))


def _pass_matrices(one, size, origin, *, tile, window, stride):
    """The contribution of each window's logits to the tile.

    Returns:
      Matrices (B, tile, h) for the rows of windows, and (B, tile, w) for their columns.
    """
    dtype = jnp.promote_types(one.logits[0].dtype, jnp.float32)
    matrices = []
    for axis in (0, 1):
        view_side, logits_side = one.view_sizes[:, axis], one.logits[0].shape[1 + axis]
        pixels = origin[:, axis : axis + 1] + jnp.arange(tile)[None]  # of the label map
        to_view = _linear_weights(pixels, size[:, axis], view_side, count=one.bucket[axis], dtype=dtype)
        line = jnp.arange(one.bucket[axis])[None]  # of the view
        if axis == 1 and one.mirrored:
            line = view_side[:, None] - 1 - line
        windows = slide(view_side, one.bucket[axis], window=window, stride=stride)
        inside = line[:, :, None] - windows.starts[:, None]  # (B, pixels of the view, windows)
        inside = (inside >= 0) & (inside < windows.length[:, None, None]) & windows.used[:, None]
        # Windows form a grid, so the number of windows over a pixel is the product of the numbers along both axes.
        cover = jnp.maximum(inside.sum(axis=2), 1).astype(dtype)
        lines = []
        for number in range(windows.starts.shape[1]):
            local = line - windows.starts[:, number : number + 1]
            to_logits = _linear_weights(
                local, windows.length, one.logits_sizes[:, axis], count=logits_side, dtype=dtype
            )
            to_logits = jnp.where(inside[:, :, number, None], to_logits / cover[:, :, None], 0)
            lines.append(jnp.einsum("btp,bpl->btl", to_view, to_logits, precision=_HIGHEST))
        matrices.append(lines)
    return matrices


def _linear_weights(pixels, new, old, *, count, dtype):
    """Weights of ``ops.layers.resize.bilinear_weights`` at some pixels (B, n) of lines resized from old to new (B,).

    Returns:
      (B, n, count).
    """
    old, new = (x.astype(dtype)[:, None] for x in (old, new))
    center = jnp.clip((pixels.astype(dtype) + 0.5) * old / new - 0.5, 0, old - 1)
    return jnp.maximum(0, 1 - jnp.abs(center[..., None] - jnp.arange(count, dtype=dtype)[None, None]))


def _histogram(values, counted, classes):
    """Count the pixels with each value among those where ``counted`` is True, int32 (classes,).

    Values are compared with all classes, because scatter operations are slow on TPU.
    """
    is_class = values[..., None] == jnp.arange(classes).reshape(1, 1, 1, classes)
    return (is_class & counted[..., None]).sum(axis=(0, 1, 2), dtype=jnp.int32)
