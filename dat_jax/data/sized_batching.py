"""Evaluation batches of images of many sizes, for segmentation and detection.

The images of a batch are in arrays of one shape: their own, or a bucket with the sizes of the images beside it.
"""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import grain
import numpy as np

from dat_jax.data.batching import iterate, make_marks
from dat_jax.data.buckets import MAX_WASTE, choose_buckets, pad_view, pad_views, parse_buckets, plan_shapes
from dat_jax.data.image_files import DamagedFile
from dat_jax.data.segmentation_transforms import IGNORED
from dat_jax.errors import UserError

_SMALLEST_TILE = 64  # of label maps


class SizedBatch(NamedTuple):
    """Plan of one evaluation batch of images of several sizes.

    Attributes:
      indices: indices of up to ``batch_size`` examples.
      shapes: (height, width) of the array of each view.
    """

    indices: list[int]
    shapes: tuple[tuple[int, int], ...]


def make_sized_eval_batches(
    source,
    transform,
    *,
    batch_size: int,
    rows: Sequence[int] | None = None,
    workers: int = 0,
    min_side: int = 1,
    buckets: Sequence[tuple[int, int]] | None = None,
    tile: int = 512,
) -> Iterator[dict[str, np.ndarray]]:
    """Return an iterator over all examples of a segmentation data set, once, in batches of equal arrays.

    Examples are sorted by the shapes of their arrays, then by size, then by index. The last batch of every group of equal shapes
    is filled with copies of its last example.

    Args:
      source: see ``data.segmentation_sources``; the sizes of all examples are read before the first batch.
      transform: see ``segmentation_transforms.make_segmentation_eval_transform``.
      batch_size: number of examples per batch, over all processes.
      rows: rows of every batch that belong to this process; only these are loaded. Default: all.
      workers: number of worker processes; 0 loads in threads of this process.
      min_side: see ``check_view_sizes``.
      buckets: see ``plan_shapes``.
      tile: side of the largest tiles of label maps, a power of two. It is halved while a label map fits into it.

    Yields:
      A dictionary of R rows:

      - "view_0", "view_1", ...: uint8 (R, h, w, 3);
      - "size_of_view_0", ...: int32 (R, 2), heights and widths of the views in these arrays, only with ``buckets``;
      - "label": uint8 (R, T, tile, tile), the tiles of the label maps, with 255 outside of the images. T is enough for the
        largest image of the batch, over all processes;
      - "origin": int32 (R, T, 2), (top, left) of the tiles;
      - "size": int32 (R, 2), heights and widths of the original images;
      - "mask": float32 (R,) and "damaged_index": int32 (R,), see ``make_eval_batches``.

    Raises:
      UserError: a worker died, an example cannot be read, a view is too small, or no bucket holds an image.
    """
    rows = range(batch_size) if rows is None else rows
    sizes = check_view_sizes(source, transform, min_side=min_side)
    plan = _plan_sized_batches(sizes, transform, batch_size, buckets)
    longest = max((max(size) for size in sizes), default=1)
    while tile > _SMALLEST_TILE and tile // 2 >= longest:
        tile //= 2

    def load(position: int) -> dict:
        step, row = divmod(position, len(rows))
        indices, shapes = plan[step]
        index, counts = indices[min(rows[row], len(indices) - 1)], rows[row] < len(indices)
        try:
            record, damaged = source[index], False
        except DamagedFile:
            shape = sizes[index]
            record, damaged = (
                {"image": np.zeros((*shape, 3), np.uint8), "label": np.full(shape, IGNORED, np.uint8)},
                True,
            )
        record = transform(record)
        largest = (max(sides) for sides in zip(*(sizes[index] for index in indices), strict=True))
        labels, origins = _cut_tiles(record["label"], tuple(largest), tile)
        record = record if buckets is None else pad_views(record, shapes)
        return {**record, "label": labels, "origin": origins} | make_marks(index, counts=counts, damaged=damaged)

    return iterate(grain.MapDataset.range(len(plan) * len(rows)).map(load).batch(len(rows)), workers)


def _cut_tiles(label: np.ndarray, shape: tuple[int, ...], tile: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the tiles (T, tile, tile) of a label map in an array of at least (height, width), and their origins (T, 2)."""
    rows, columns = (-(-side // tile) for side in shape)
    padded = np.full((rows * tile, columns * tile), IGNORED, np.uint8)
    padded[: label.shape[0], : label.shape[1]] = label
    tiles = padded.reshape(rows, tile, columns, tile).swapaxes(1, 2).reshape(-1, tile, tile)
    origins = [(row * tile, column * tile) for row in range(rows) for column in range(columns)]
    return tiles, np.array(origins, np.int32)


def check_view_sizes(source, transform, *, min_side: int) -> list[tuple[int, int]]:
    """Check that the views of all examples are large enough for a model.

    Args:
      source: see ``data.segmentation_sources``; only sizes are read.
      transform: see ``segmentation_transforms.make_segmentation_eval_transform``.
      min_side: smallest side of a view in pixels.

    Returns:
      The heights and widths of all examples.

    Raises:
      UserError: a view has a smaller side, as of an image that is very long and thin.
    """
    sizes = _read_sizes(source)
    for height, width in set(sizes):
        smallest = min(transform.view_shapes(height, width), key=min)
        if min(smallest) < min_side:
            index = sizes.index((height, width))
            name = source.files[index][0] if hasattr(source, "files") else f"image {index}"
            raise UserError(
                f"The validation image {name} of {height} x {width} pixels is resized to {smallest[0]} x {smallest[1]} pixels: "
                f"expected sides of at least {min_side}. Leave it out, or increase config.data.long_side and short_side."
            )
    return sizes


def _read_sizes(source) -> list[tuple[int, int]]:
    """Return the heights and widths of all examples; damaged ones have the size of the first readable one."""
    sizes, error = [], None
    for index in range(len(source)):
        try:
            sizes.append(tuple(source.size(index)))
        except DamagedFile as caught:
            sizes.append(None)
            error = error or caught
    readable = next((size for size in sizes if size is not None), None)
    if readable is None and error is not None:
        raise error
    return [size or readable or (0, 0) for size in sizes]


def _plan_sized_batches(
    sizes: Sequence[tuple[int, int]],
    transform,
    batch_size: int,
    buckets: Sequence[tuple[int, int]] | None = None,
) -> list[SizedBatch]:
    """Return the examples and the shapes of every batch."""
    shapes = plan_shapes({size: transform.view_shapes(*size) for size in set(sizes)}, buckets)
    order = sorted(range(len(sizes)), key=lambda index: (shapes[sizes[index]], sizes[index], index))
    plan = []
    for group_shapes, group in itertools.groupby(order, key=lambda index: shapes[sizes[index]]):
        group = list(group)
        plan += [
            SizedBatch(group[start : start + batch_size], group_shapes) for start in range(0, len(group), batch_size)
        ]
    return plan


def choose_eval_buckets(
    source, transform, choice: str, *, max_waste: float = MAX_WASTE
) -> list[tuple[int, int]] | None:
    """Return the buckets of an evaluation, or None if every image has an array of its own size.

    Args:
      source: a segmentation or detection data set; the sizes of all examples are read.
      transform: function with ``view_shapes``; the buckets are for the first view.
      choice: "exact" for no buckets; "auto" to choose them from the sizes, see ``choose_buckets``, unless all images of a
        bucket fill it; or the buckets, see ``parse_buckets``.
      max_waste: see ``choose_buckets``.

    Raises:
      UserError: a text is no bucket.
    """
    if choice == "exact":
        return None
    if choice != "auto":
        return parse_buckets(choice, key="config.eval.buckets")
    shapes = [transform.view_shapes(*size)[0] for size in _read_sizes(source)]
    buckets = choose_buckets(shapes, max_waste=max_waste)
    return None if set(shapes) <= set(buckets) else buckets


def count_arrays(
    source, transform, buckets: Sequence[tuple[int, int]] | None, *, window: int = 0
) -> dict[tuple[int, int], int]:
    """Return the number of views for each shape of the arrays that the network gets in an evaluation.

    Args:
      source, transform: as for ``choose_eval_buckets``.
      buckets: see ``plan_shapes``.
      window: side of sliding windows; 0 is the whole array.
    """
    sizes = _read_sizes(source)
    shapes = plan_shapes({size: transform.view_shapes(*size) for size in set(sizes)}, buckets)
    counts = Counter((min(window or h, h), min(window or w, w)) for size in sizes for h, w in shapes[size])
    return dict(sorted(counts.items()))


def make_detection_eval_batches(
    source,
    transform,
    *,
    batch_size: int,
    rows: Sequence[int] | None = None,
    workers: int = 0,
    buckets: Sequence[tuple[int, int]] | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Return an iterator over all images, once, in batches of equal padded shape, in the order of ``make_sized_eval_batches``.

    Args:
      source: see ``data.coco``; the sizes of all images are read before the first batch.
      transform: see ``detection_transforms.make_detection_eval_transform``.
      batch_size, rows, workers, buckets: as for ``make_sized_eval_batches``.

    Yields:
      {"image": uint8 (R, Hp, Wp, 3), "valid": int32 (R, 2), "scale": float32 (R, 4), "original": int32 (R, 2), "index":
      int32 (R,), "mask": float32 (R,), "damaged_index": int32 (R,)} of R rows; see ``make_eval_batches`` for the last two. With
      ``buckets`` also "sizes": int32 (R, 2), the padded heights and widths in these arrays.

    Raises:
      UserError: a worker died, or an image cannot be read.
    """
    rows = range(batch_size) if rows is None else rows
    sizes = _read_sizes(source)
    plan = _plan_sized_batches(sizes, transform, batch_size, buckets)

    def load(position: int) -> dict:
        step, row = divmod(position, len(rows))
        indices, (shape,) = plan[step]
        index, counts = indices[min(rows[row], len(indices) - 1)], rows[row] < len(indices)
        try:
            record, damaged = source[index], False
        except DamagedFile:
            record, damaged = {"image": np.zeros((*sizes[index], 3), np.uint8)}, True
        record = transform(record)
        if buckets is not None:
            padded = pad_view(record["image"], shape, name="image")
            record |= {"image": padded["image"], "sizes": padded["size_of_image"]}
        return record | {"index": np.int32(index)} | make_marks(index, counts=counts, damaged=damaged)

    return iterate(grain.MapDataset.range(len(plan) * len(rows)).map(load).batch(len(rows)), workers)
