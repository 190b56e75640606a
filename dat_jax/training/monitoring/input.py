"""Monitoring of the input pipeline: stalls, damaged images and dropped objects."""

import logging
import threading
import time
from collections.abc import Mapping, Sequence
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


class ImageCounter(Hook):
    """Counts damaged images, which are replaced by the next one, and objects dropped beyond ``config.data.max_boxes``.

    Args:
      max_damaged: fraction of damaged images, of all images seen, above which the run ends.
    """

    def __init__(self, max_damaged: float):
        self._max_damaged, self._seen, self._damaged, self._dropped = max_damaged, 0, 0, 0

    def on_batch(self, step: int, batch: dict[str, Any]) -> None:
        """Remove "damaged" and "dropped", counts per example, from the batch.

        Raises:
          UserError: too many images were damaged.
        """
        del step
        damaged = int(np.sum(batch.pop("damaged", 0)))
        if damaged and not self._damaged:
            logger.warning("Some images cannot be read. Each is named once and replaced by the next image.")
        self._dropped += int(np.sum(batch.pop("dropped", 0)))
        self._seen += len(batch["image"]) + damaged
        self._damaged += damaged
        if self._damaged > max(_ALWAYS_TOLERATED, self._max_damaged * self._seen):
            raise UserError(
                f"{self._damaged} of {self._seen} images could not be read, more than the fraction "
                f"config.data.max_damaged {self._max_damaged:g}. `python -m dat_jax.data.prepare` lists damaged images."
            )

    def on_log(self, step: int, metrics: Sequence[Mapping[str, Any]]) -> Mapping[str, float]:
        """{"damaged_images", "dropped_objects"}: totals so far, without those that are 0."""
        del step, metrics
        totals = {"damaged_images": self._damaged, "dropped_objects": self._dropped}
        return {name: count for name, count in totals.items() if count}
