"""Batches of examples from a source, each a pure function of the seed and the step.

A run that resumes at step n therefore gets the same batches as an uninterrupted one, and results do not depend on the number of
workers.
"""

import bisect
import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from dat_jax.data.sources import read_record
from dat_jax.errors import UserError

_PREFETCHED_BATCHES = 4
_MAX_BATCHES = 2**40  # more than any run needs
_CACHED_PLANS = 2  # one pass over the data may end while the next one is being loaded

Transform = Callable[[Any, np.random.Generator], dict]  # of a record


def make_train_batches(
    source,
    transform: Transform,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    rows: Sequence[int] | None = None,
    workers: int = 0,
    repeats: int = 1,
    later_transforms: Sequence[tuple[int, Transform]] = (),
) -> Iterator[dict[str, np.ndarray]]:
    """Return an endless iterator of training batches, shuffled in every epoch.

    Args:
      source: see ``data.sources``.
      transform: function of a record and its own random generator.
      batch_size: number of examples per batch, over all processes.
      seed: seed of the order of examples and of the generators.
      start_step: index of the first batch.
      rows: rows of every batch that belong to this process; only these are loaded. Default: all.
      workers: number of worker processes; 0 loads in threads of this process.
      repeats: how often in a row each example occurs, every time with its own generator (repeated augmentation, 1901.09335). A
        pass over the data then takes this many times more batches.
      later_transforms: (index of a batch, the transform from this batch on), in ascending order.

    Yields:
      {"image": uint8 (R, S, S, 3), "label": int32 (R,), or uint8 (R, S, S) for segmentation} of R rows, in the order of
      ``rows``, and anything else that the transform returns.

    Raises:
      UserError: a worker died, or an example cannot be read and the source does not replace it.
    """
    rows = range(batch_size) if rows is None else rows
    order = _shuffle_and_repeat(source, seed, repeats)
    datasets = [order.random_map(function) for function in (transform, *(later for _, later in later_transforms))]
    starts = [start for start, _ in later_transforms]

    def load(position: int) -> dict:
        step, row = divmod(position, len(rows))
        record = datasets[bisect.bisect(starts, step)][step * batch_size + rows[row]]
        assert record is not None  # nothing is filtered out
        return record

    examples = grain.MapDataset.range(_MAX_BATCHES * len(rows)).map(load)
    return iterate(examples.batch(len(rows))[start_step:], workers)


def _shuffle_and_repeat(source, seed, repeats):
    """Return an endless dataset that is shuffled in every epoch, with each example ``repeats`` times in a row."""
    order = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
    if repeats == 1:
        return order
    return grain.MapDataset.range(sys.maxsize).seed(seed).map(lambda position: order[position // repeats])


def example_indices(count: int, *, seed: int, step: int, batch_size: int, repeats: int = 1) -> list[int]:
    """Return the indices of the examples in one batch of ``make_train_batches``, over all processes.

    Args:
      count: number of training examples.
      seed, batch_size, repeats: as for ``make_train_batches``.
      step: number of the step, from 1.
    """
    order = _shuffle_and_repeat(range(count), seed, repeats)
    positions = range((step - 1) * batch_size, step * batch_size)
    return [int(order[position]) for position in positions]  # pyright: ignore[reportArgumentType] (nothing is filtered out)


def make_eval_batches(
    source,
    transform: Callable[[dict], dict],
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
) -> Iterator[dict[str, np.ndarray]]:
    """Return an iterator over all examples, once and in order.

    All processes get the same number of batches; missing examples are filled with copies of the last one.

    Args:
      source: see ``data.sources``.
      transform: function of a record.
      batch_size: number of examples per batch and process.
      process_index, process_count: index of this process and number of processes.
      workers: number of worker processes; 0 loads in threads of this process.

    Yields:
      {"image": uint8 (batch_size, S, S, 3), "label": int32 (batch_size,), "mask": float32 (batch_size,), "damaged_index": int32
      (batch_size,)}, with the mask 1 for examples, and 0 for filling and damaged examples. "damaged_index" is the index of a
      damaged example, and -1 for all others.
    """

    def load(position: int) -> dict:
        index = min(position, len(source) - 1)
        record = read_record(source.__getitem__, index, count=len(source), skip_damaged=True)
        damaged = record.pop("damaged") > 0
        return transform(record) | make_marks(index, counts=position < len(source), damaged=damaged)

    steps = -(-len(source) // (batch_size * process_count))
    positions = grain.MapDataset.range(steps * batch_size * process_count)
    return iterate(positions[process_index::process_count].map(load).batch(batch_size), workers)


def make_marks(index: int, *, counts: bool, damaged: bool) -> dict:
    """Return "mask" and "damaged_index" of a row, which holds an example if ``counts`` is True, and filling otherwise."""
    damaged_index = index if counts and damaged else -1
    return {"mask": np.float32(counts and not damaged), "damaged_index": np.int32(damaged_index)}


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
    """Return an endless iterator of training batches, each of images in a single bucket.

    The augmentation of every image is drawn independently. It depends only on the size of the image, so every process knows the
    bucket of every batch without loading it. Published batches contain either only images that are wider than high or only
    others; here they contain images that are in one bucket after augmentation, because all devices compute one shape.

    Images are shuffled in every epoch. From this endless order, the whole batches of one epoch are planned at a time. The images
    of each bucket fill batches. Those left over become a batch, filled with other images of the bucket, with a probability equal
    to their fraction of a batch; otherwise they are left out. An image therefore occurs once per epoch on average, whatever its
    bucket. Finally, the batches are shuffled.

    Args:
      source: see ``data.coco``; the sizes of all images are read before the first batch.
      transform: see ``detection_transforms.make_detection_train_transform``.
      batch_size: number of images per batch, over all processes.
      seed: seed of the order and of the augmentation.
      start_step: index of the first batch.
      rows: rows of every batch that belong to this process; only these are loaded. Default: all.
      workers: number of worker processes; 0 loads in threads of this process.

    Yields:
      The results of the transform for R rows, in the order of ``rows``: "image" uint8 (R, Hb, Wb, 3) etc.

    Raises:
      UserError: see ``make_train_batches``.
    """
    rows = range(batch_size) if rows is None else rows
    plan = _DetectionPlan(_image_sizes(source), transform, seed=seed, batch_size=batch_size)

    def load(position: int) -> dict:
        step, row = divmod(position, len(rows))
        index, view, bucket = plan.example(step, rows[row])
        rng = np.random.default_rng((seed, step, rows[row]))
        return transform(source[index], view, bucket=bucket, rng=rng)

    examples = grain.MapDataset.range(_MAX_BATCHES * len(rows)).map(load)
    return iterate(examples.batch(len(rows))[start_step:], workers)


def detection_example_indices(source, transform, *, seed: int, step: int, batch_size: int) -> list[int]:
    """Return the indices of the images in one batch of ``make_detection_train_batches``, over all processes.

    Args:
      source, transform, seed, batch_size: as for ``make_detection_train_batches``.
      step: number of the step, from 1.
    """
    plan = _DetectionPlan(_image_sizes(source), transform, seed=seed, batch_size=batch_size)
    return [plan.example(step - 1, row)[0] for row in range(batch_size)]


def _image_sizes(source) -> np.ndarray:
    """Return the heights and widths of all images in pixels, int32 (N, 2)."""
    return np.array([source.size(index) for index in range(len(source))], np.int32)


class _DetectionPlan:
    """Image, augmentation and bucket of every row of every step, planned for one pass over the data at a time.

    Planning a pass over 118,000 images takes less than a tenth of a second, and its plan takes 8 MB.
    """

    def __init__(self, sizes: np.ndarray, transform, *, seed: int, batch_size: int):
        self._sizes, self._transform, self._seed, self._batch_size = sizes, transform, seed, batch_size
        self._steps, self._plans = max(len(sizes) // batch_size, 1), {}

    def example(self, step: int, row: int) -> tuple[int, Any, tuple[int, int]]:
        """Return the index of an image, the parameters of its augmentation, and the bucket of the batch."""
        number, step = divmod(step, self._steps)
        plan = self._plans.get(number)
        if plan is None:  # two threads may both compute it, with the same result
            plan = self._plans[number] = self._plan(number)
            for oldest in sorted(self._plans)[:-_CACHED_PLANS]:
                self._plans.pop(oldest, None)
        indices, views, buckets, batches = plan
        position = batches[step, row]
        return int(indices[position]), views.take(position), self._transform.buckets[buckets[position]]

    def _plan(self, number: int):
        count = self._steps * self._batch_size
        positions = range(number * count, (number + 1) * count)
        indices = _shuffled_indices(len(self._sizes), positions, self._seed)
        rng = np.random.default_rng((self._seed, number, 1))
        views = self._transform.draw(self._sizes[indices], rng)
        buckets = self._transform.choose_buckets(views.size)
        return indices, views, buckets, plan_batches(buckets, batch_size=self._batch_size, rng=rng)


def _shuffled_indices(count: int, positions: range, seed: int) -> np.ndarray:
    """Return the images at consecutive positions of an endless order of ``count`` images, shuffled in every epoch."""
    epochs = range(positions.start // count, -(-positions.stop // count))
    orders = [np.random.default_rng((seed, epoch, 0)).permutation(count) for epoch in epochs]
    first = epochs.start * count
    return np.concatenate(orders)[positions.start - first : positions.stop - first]


def plan_batches(groups: np.ndarray, *, batch_size: int, rng: np.random.Generator) -> np.ndarray:
    """Combine examples into batches of one group each, with as many batches as the examples fill.

    Args:
      groups: int (n,), group of each example; n is a multiple of the batch size.
      batch_size: number B of examples per batch.
      rng: generator that decides which r left-over examples of a group become a batch, with probability r / B, and shuffles the
        batches.

    Returns:
      Indices of examples, int (n / B, B).
    """
    batches, remainders = [], []
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        full = len(members) // batch_size * batch_size
        batches.extend(members[:full].reshape(-1, batch_size))
        remainders.append((members[full:], members))
    # Systematic sampling: the left-over examples add up to a whole number of batches, which is the number of samples.
    ends = np.cumsum([0, *(len(remainder) for remainder, _ in remainders)]) + int(rng.integers(batch_size))
    for (remainder, members), start, end in zip(remainders, ends[:-1], ends[1:], strict=True):
        if end // batch_size > start // batch_size:
            filling = rng.permutation(members[: len(members) - len(remainder)])
            batches.append(np.resize(np.concatenate([remainder, filling]), batch_size))
    return np.stack(batches)[rng.permutation(len(batches))]


def iterate(batches: grain.MapDataset, workers: int) -> Iterator[dict]:
    """Iterate over batches with prefetching, in threads of this process or in worker processes."""
    threads = grain.ReadOptions(num_threads=_PREFETCHED_BATCHES, prefetch_buffer_size=_PREFETCHED_BATCHES)
    loader = batches.to_iter_dataset(threads)
    if workers:
        if not flags.FLAGS.is_parsed():  # required by grain's workers, even if there is no command line
            flags.FLAGS.mark_as_parsed()
        loader = loader.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    with contextlib.closing(iter(loader)) as iterator:  # stops the workers when the consumer stops
        try:
            yield from iterator
        except RuntimeError as error:
            if "Worker process was terminated" not in str(error):
                raise
            code = str(error).split("exit code ")[-1].split(".")[0]
            raise UserError(
                f"A data worker died with status {code}; -9 usually means that the machine ran out of memory. Reduce "
                "config.data.workers to save memory, and rerun the command to resume from the last checkpoint."
            ) from error
