"""Batches of a source, each a pure function of the seed and the step.

So a run that resumes at step n sees what it would have seen, and the number of workers changes nothing.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from dat_jax.data.segmentation_transforms import IGNORED
from dat_jax.errors import UserError

_PREFETCHED_BATCHES = 4
_ENDLESS = 2**40  # batches
_PLANS_KEPT = 2  # passes over the data, of which one may end while the next one is being loaded
_LABEL_MULTIPLE = 64  # few shapes of label maps, so few programs are compiled


def make_train_batches(
    source,
    transform: Callable[[dict, np.random.Generator], dict],
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    rows: Sequence[int] | None = None,
    workers: int = 0,
) -> Iterator[dict[str, np.ndarray]]:
    """Endless training batches: every epoch shuffled anew, every example transformed with a generator of its own.

    Args:
      source: see ``data.sources``.
      transform: of one record, with its random generator.
      batch_size: examples a batch, over all processes.
      seed: of order and draws.
      start_step: the first batch to give.
      rows: which examples of every batch are this process's, only these are loaded; all unless given.
      workers: processes that load; 0 loads in threads.

    Yields:
      {"image": uint8 (R, S, S, 3), "label": int32 (R,), or uint8 (R, S, S) for segmentation} of its R rows, in their order, and
      what else the transform gives.

    Raises:
      UserError: a worker process has ended, or an example cannot be read and the source takes no other for it.
    """
    rows = range(batch_size) if rows is None else rows
    dataset = _order(source, seed).random_map(transform)

    def load(place: int) -> dict:
        step, row = divmod(place, len(rows))
        return dataset[step * batch_size + rows[row]]

    places = grain.MapDataset.range(_ENDLESS * len(rows)).map(load)
    return _load(places.batch(len(rows))[start_step:], workers)


def _order(source, seed):
    """Endless, every epoch shuffled anew."""
    return grain.MapDataset.source(source).seed(seed).shuffle().repeat()


def example_indices(count: int, *, seed: int, step: int, batch_size: int) -> list[int]:
    """Which of ``count`` training examples the batch of a step has (the first step is 1), over all processes."""
    order = _order(range(count), seed)
    return [int(order[place]) for place in range((step - 1) * batch_size, step * batch_size)]


def make_eval_batches(
    source,
    transform: Callable[[dict], dict],
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
) -> Iterator[dict[str, np.ndarray]]:
    """Every example once, in order. All processes give the same number of batches, filled up where examples run out.

    Yields:
      {"image": uint8 (batch_size, S, S, 3), "label": int32 (batch_size,), "mask": float32 (batch_size,)}, mask 1 for
      an example and 0 for filling.
    """

    def load(place: int) -> dict:
        record = transform(source[min(place, len(source) - 1)])
        return {**record, "mask": np.float32(place < len(source))}

    steps = -(-len(source) // (batch_size * process_count))
    places = grain.MapDataset.range(steps * batch_size * process_count)
    return _load(places[process_index::process_count].map(load).batch(batch_size), workers)


def make_sized_eval_batches(
    source,
    transform,
    *,
    batch_size: int,
    rows: Sequence[int] | None = None,
    workers: int = 0,
) -> Iterator[dict[str, np.ndarray]]:
    """Every example once, only examples whose views have the same shapes in a batch: nothing of an image is padded.

    Groups follow each other by their shapes, examples of a group by their size and then by their index. The last batch of
    every group is filled up with repeats of its last example.

    Args:
      source: see ``data.segmentation_sources``; the size of every example is asked for before the first batch.
      transform: see ``segmentation_transforms.make_segmentation_eval_transform``.
      batch_size: examples a batch, over all processes.
      rows: which examples of every batch are this process's, only these are loaded; all unless given.
      workers: processes that load; 0 loads in threads.

    Yields:
      {"view_0": uint8 (R, h, w, 3), ..., "label": uint8 (R, Hp, Wp), "size": int32 (R, 2), "mask": float32 (R,)} of its R
      rows, mask 1 for an example and 0 for filling. A label map lies at the top left, as large as "size" says, the rest is
      255; Hp and Wp are the batch's largest, over all processes, rounded up to a multiple of 64.

    Raises:
      UserError: a worker process has ended, or an example cannot be read.
    """
    rows = range(batch_size) if rows is None else rows
    plan = _plan_sized_batches(source, transform, batch_size)

    def load(place: int) -> dict:
        step, row = divmod(place, len(rows))
        indices, (height, width) = plan[step]
        record = transform(source[indices[min(rows[row], len(indices) - 1)]])
        label = np.full((height, width), IGNORED, np.uint8)
        label[: record["label"].shape[0], : record["label"].shape[1]] = record["label"]
        return {**record, "label": label, "mask": np.float32(rows[row] < len(indices))}

    return _load(grain.MapDataset.range(len(plan) * len(rows)).map(load).batch(len(rows)), workers)


def _plan_sized_batches(source, transform, batch_size: int) -> list[tuple[list[int], tuple[int, int]]]:
    """Up to ``batch_size`` indices of examples for every batch, and the height and width of its label maps."""
    sizes = [source.size(index) for index in range(len(source))]
    shapes = {size: transform.view_shapes(*size) for size in set(sizes)}
    order = sorted(range(len(source)), key=lambda index: (shapes[sizes[index]], sizes[index], index))
    plan = []
    for _, group in itertools.groupby(order, key=lambda index: shapes[sizes[index]]):
        group = list(group)
        for start in range(0, len(group), batch_size):
            indices = group[start : start + batch_size]
            largest = (max(sides) for sides in zip(*(sizes[index] for index in indices), strict=True))
            height, width = (-(-side // _LABEL_MULTIPLE) * _LABEL_MULTIPLE for side in largest)
            plan.append((indices, (height, width)))
    return plan


def make_detection_train_batches(
    source,
    transform,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    rows: Sequence[int] | None = None,
    workers: int = 0,
) -> Iterator[dict[str, np.ndarray]]:
    """Endless training batches, each of images that go to one bucket.

    Every image has draws of its own. As these need no more than sizes, every process knows the bucket of every batch without
    loading it. The published batches are of images that are all wider than high, or none; here of images that are in one
    bucket after they were drawn, since all devices compute one shape.

    Images follow each other in an order that is drawn anew every time all have come. Of this order, as many whole batches as
    an epoch has are planned at a time: the images of a bucket fill batches, and where some are left over, they become a batch
    with a chance of their part of one, filled up with others of the bucket; otherwise they are left out. So an image comes
    once an epoch on average, whatever its bucket. Then the batches are shuffled.

    Args:
      source: see ``data.coco``; the size of every image is asked for before the first batch.
      transform: see ``detection_transforms.make_detection_train_transform``.
      batch_size: images a batch, over all processes.
      seed: of order and draws.
      start_step: the first batch to give.
      rows: which images of every batch are this process's, only these are loaded; all unless given.
      workers: processes that load; 0 loads in threads.

    Yields:
      What the transform gives, of the R rows in their order: "image" uint8 (R, Hb, Wb, 3) and so on.

    Raises:
      UserError: as ``make_train_batches``.
    """
    rows = range(batch_size) if rows is None else rows
    sizes = np.array([source.size(index) for index in range(len(source))], np.int32)
    plan = _DetectionPlan(sizes, transform, seed=seed, batch_size=batch_size)

    def load(place: int) -> dict:
        step, row = divmod(place, len(rows))
        index, view, bucket = plan.example(step, rows[row])
        rng = np.random.default_rng((seed, step, rows[row]))
        return transform(source[index], view, bucket=bucket, rng=rng)

    places = grain.MapDataset.range(_ENDLESS * len(rows)).map(load)
    return _load(places.batch(len(rows))[start_step:], workers)


def detection_example_indices(source, transform, *, seed: int, step: int, batch_size: int) -> list[int]:
    """Which images the batch of a step has (the first step is 1), over all processes; see ``make_detection_train_batches``."""
    sizes = np.array([source.size(index) for index in range(len(source))], np.int32)
    plan = _DetectionPlan(sizes, transform, seed=seed, batch_size=batch_size)
    return [plan.example(step - 1, row)[0] for row in range(batch_size)]


class _DetectionPlan:
    """Which image, which view of it and which bucket every row of every step has; a pass over the data is planned at once.

    Planning a pass over 118,000 images takes less than a tenth of a second, and 8 MB as long as it is kept.
    """

    def __init__(self, sizes: np.ndarray, transform, *, seed: int, batch_size: int):
        self._sizes, self._transform, self._seed, self._batch_size = sizes, transform, seed, batch_size
        self._steps, self._passes = max(len(sizes) // batch_size, 1), {}

    def example(self, step: int, row: int) -> tuple[int, Any, tuple[int, int]]:
        """Index of an image, its view, and the bucket of the batch."""
        number, step = divmod(step, self._steps)
        found = self._passes.get(number)
        if found is None:  # two threads may both make it, and make the same
            found = self._passes[number] = self._plan(number)
            for old in sorted(self._passes)[:-_PLANS_KEPT]:
                self._passes.pop(old, None)
        indices, views, buckets, batches = found
        place = batches[step, row]
        return int(indices[place]), views.take(place), self._transform.buckets[buckets[place]]

    def _plan(self, number: int):
        count = self._steps * self._batch_size
        indices = _shuffled(len(self._sizes), range(number * count, (number + 1) * count), self._seed)
        rng = np.random.default_rng((self._seed, number, 1))
        views = self._transform.draw(self._sizes[indices], rng)
        buckets = self._transform.choose_buckets(views.size)
        return indices, views, buckets, plan_batches(buckets, batch_size=self._batch_size, rng=rng)


def _shuffled(count: int, places: range, seed: int) -> np.ndarray:
    """What is at some consecutive places of an endless order of ``count`` images, drawn anew after every ``count``."""
    epochs = range(places.start // count, -(-places.stop // count))
    orders = [np.random.default_rng((seed, epoch, 0)).permutation(count) for epoch in epochs]
    first = epochs.start * count
    return np.concatenate(orders)[places.start - first : places.stop - first]


def plan_batches(groups: np.ndarray, *, batch_size: int, rng: np.random.Generator) -> np.ndarray:
    """Batches of examples of one group each, as many as the examples fill.

    Args:
      groups: int (n,), of n examples, a multiple of the batch size.
      batch_size: B.
      rng: of which left-over examples of a group become a batch, with a chance of r / B for r of them, and of the order of the
        batches.

    Returns:
      int (n / B, B), places of examples.
    """
    batches, left = [], []
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        whole = len(members) // batch_size * batch_size
        batches.extend(members[:whole].reshape(-1, batch_size))
        left.append((members[whole:], members))
    # Systematic sampling: the numbers of left-over examples add up to whole batches, and so many of them are taken.
    ends = np.cumsum([0, *(len(rest) for rest, _ in left)]) + int(rng.integers(batch_size))
    for (rest, members), start, end in zip(left, ends[:-1], ends[1:], strict=True):
        if end // batch_size > start // batch_size:
            filling = rng.permutation(members[: len(members) - len(rest)])
            batches.append(np.resize(np.concatenate([rest, filling]), batch_size))
    return np.stack(batches)[rng.permutation(len(batches))]


def make_detection_eval_batches(
    source,
    transform,
    *,
    batch_size: int,
    rows: Sequence[int] | None = None,
    workers: int = 0,
) -> Iterator[dict[str, np.ndarray]]:
    """Every image once, only images of the same padded shape in a batch, in the order of ``make_sized_eval_batches``.

    Args:
      source: see ``data.coco``; the size of every image is asked for before the first batch.
      transform: see ``detection_transforms.make_detection_eval_transform``.
      batch_size, rows, workers: as for ``make_sized_eval_batches``.

    Yields:
      {"image": uint8 (R, Hp, Wp, 3), "valid": int32 (R, 2), "scale": float32 (R, 4), "original": int32 (R, 2), "index":
      int32 (R,), "mask": float32 (R,)} of its R rows, mask 1 for an image and 0 for filling.

    Raises:
      UserError: a worker process has ended, or an image cannot be read.
    """
    rows = range(batch_size) if rows is None else rows
    plan = [indices for indices, _ in _plan_sized_batches(source, transform, batch_size)]

    def load(place: int) -> dict:
        step, row = divmod(place, len(rows))
        indices = plan[step]
        index = indices[min(rows[row], len(indices) - 1)]
        counted = {"index": np.int32(index), "mask": np.float32(rows[row] < len(indices))}
        return transform(source[index]) | counted

    return _load(grain.MapDataset.range(len(plan) * len(rows)).map(load).batch(len(rows)), workers)


def _load(batches: grain.MapDataset, workers: int) -> Iterator[dict]:
    """Loads ahead, in threads of this process or in processes."""
    threads = grain.ReadOptions(num_threads=_PREFETCHED_BATCHES, prefetch_buffer_size=_PREFETCHED_BATCHES)
    loader = batches.to_iter_dataset(threads)
    if workers:
        if not flags.FLAGS.is_parsed():  # grain's workers want it, also where no command line was read
            flags.FLAGS.mark_as_parsed()
        loader = loader.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    with contextlib.closing(iter(loader)) as batches:  # ends the workers with whoever takes the batches
        try:
            yield from batches
        except RuntimeError as error:
            if "Worker process was terminated" not in str(error):
                raise
            code = str(error).split("exit code ")[-1].split(".")[0]
            raise UserError(
                f"A process that loads images has ended unasked, with status {code}: -9 is what a machine without memory "
                "does to it. Fewer config.data.workers take less; the same command goes on from the last checkpoint."
            ) from error
