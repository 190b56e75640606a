"""Monitoring of the input pipeline: stalls, damaged images and dropped objects."""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from dat_jax.errors import UserError
from dat_jax.training.monitoring.hooks import Hook

logger = logging.getLogger(__name__)
_ALWAYS_TOLERATED = 10  # damaged images that never end a run


class StallWarning(Hook):
    """Warns while the loop waits for a batch, each time that another ``seconds`` have passed.

    Args:
      seconds: waiting time before a warning; 0 disables it.
    """

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._arrived = threading.Event()

    def before_batch(self, step: int) -> None:
        """Start the clock."""
        del step
        if self._seconds:
            self._arrived = threading.Event()
            threading.Thread(target=self._warn_until, args=(self._arrived,), daemon=True).start()

    def on_batch(self, step: int, batch: dict[str, Any]) -> None:
        """Stop the clock."""
        del step, batch
        self._arrived.set()

    def close(self) -> None:
        """Stop the clock."""
        self._arrived.set()

    def _warn_until(self, arrived: threading.Event) -> None:
        start = time.monotonic()
        while not arrived.wait(self._seconds):
            logger.warning(
                "The input pipeline has not delivered a batch for %.0f s. Either the disk stalls, or "
                "config.data.workers is too small.",
                time.monotonic() - start,
            )


def without_damaged(
    batches: Iterable[dict[str, Any]], *, count: int, max_damaged: float, describe: Callable[[int], str | None]
) -> Iterator[dict[str, Any]]:
    """Remove "damaged_index" from evaluation batches, and log the damaged examples, which their "mask" leaves out.

    Args:
      batches: see ``data.batching.make_eval_batches``.
      count: number of examples in all.
      max_damaged: largest fraction of damaged examples; one is always tolerated.
      describe: function of an index that returns why the example is damaged.

    Raises:
      UserError: more examples are damaged.
    """
    damaged = 0
    for batch in batches:
        for index in batch.pop("damaged_index", np.array([-1])).tolist():
            if index >= 0:
                damaged += 1
                logger.warning("%s It is left out of the evaluation.", describe(index))
        if damaged > max(1, max_damaged * count):
            raise UserError(
                f"{damaged} of the {count} images to evaluate could not be read, more than the fraction "
                f"config.data.max_damaged {max_damaged:g}."
            )
        yield batch
    if damaged:
        logger.warning("The metrics are those of %d of %d images; %d are damaged.", count - damaged, count, damaged)


class ImageCounter(Hook):
    """Counts damaged images, which are replaced by the next one, and objects dropped beyond ``config.data.max_boxes``.

    Args:
      max_damaged: fraction of damaged images, of all images seen, above which the run ends.
      count: number of training examples.
      example_indices: function of a step that returns the indices of the examples of this process, in the order of its batch.
      describe: function of an index that returns why the example is damaged.
    """

    def __init__(
        self,
        max_damaged: float,
        *,
        count: int,
        example_indices: Callable[[int], Sequence[int]],
        describe: Callable[[int], str | None],
    ):
        self._max_damaged, self._count = max_damaged, count
        self._example_indices, self._describe = example_indices, describe
        self._seen = self._damaged = self._dropped = 0
        self._logged: set[int] = set()

    def on_batch(self, step: int, batch: dict[str, Any]) -> None:
        """Remove "damaged" and "dropped", counts per example, from the batch.

        Raises:
          UserError: too many images were damaged.
        """
        replaced = batch.pop("damaged", np.zeros(1, int))
        damaged = int(replaced.sum())
        if damaged:
            self._log(step, replaced)
        self._dropped += int(np.sum(batch.pop("dropped", 0)))
        self._seen += len(batch["image"]) + damaged
        self._damaged += damaged
        if self._damaged > max(_ALWAYS_TOLERATED, self._max_damaged * self._seen):
            raise UserError(
                f"{self._damaged} of {self._seen} images could not be read, more than the fraction "
                f"config.data.max_damaged {self._max_damaged:g}. `python -m dat_jax.data.prepare` lists damaged images."
            )

    def _log(self, step: int, replaced: np.ndarray) -> None:
        """Name each damaged image once. ``replaced`` is the number of damaged images before the one that a row holds."""
        for first, count in zip(self._example_indices(step), replaced.tolist(), strict=True):
            for index in range(first, first + count):
                index %= self._count
                if index not in self._logged:
                    self._logged.add(index)
                    reason = self._describe(index) or f"Image {index} could not be read once."
                    logger.warning("%s The next readable image is used instead.", reason)

    def on_log(self, step: int, metrics: Sequence[Mapping[str, Any]]) -> Mapping[str, float]:
        """{"damaged_images", "dropped_objects"}: totals so far, without those that are 0."""
        del step, metrics
        totals = {"damaged_images": self._damaged, "dropped_objects": self._dropped}
        return {name: count for name, count in totals.items() if count}
