"""Batches of a source, each a pure function of the seed and the step.

So a run that resumes at step n sees what it would have seen, and the number of workers changes nothing.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np
from absl import flags

from dat_jax.data.segmentation_transforms import IGNORED
from dat_jax.errors import UserError

_PREFETCHED_BATCHES = 4
_ENDLESS = 2**40  # batches
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
