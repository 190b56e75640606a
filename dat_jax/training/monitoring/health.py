"""What a run watches its input and its loss for."""

import contextlib
import json
import math
import pathlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from dat_jax.errors import UserError
from dat_jax.training.run import Run

_FEW = 10  # damaged images that stop no run, whatever part of those seen they are
_REMEMBERED = 100  # losses that a new one is compared with


def watch(batches: Iterator[dict], *, seconds: float, note: Callable[[str], None]) -> Iterator[dict]:
    """The same batches; says how long one has been waited for, each time that it is as long again.

    Args:
      batches: loaded elsewhere.
      seconds: of waiting that are said; 0 says nothing.
      note: is told, from another thread.
    """
    with contextlib.closing(batches):
        while True:
            finished = threading.Event()
            if seconds:
                threading.Thread(target=_say_waiting, args=(finished, seconds, note), daemon=True).start()
            try:
                batch = next(batches, None)
            finally:
                finished.set()
            if batch is None:
                return
            yield batch


def _say_waiting(finished, seconds, note):
    start = time.monotonic()
    while not finished.wait(seconds):
        note(
            f"The input pipeline has given no batch for {time.monotonic() - start:.0f} s: a disk that stalls, or too few "
            "config.data.workers."
        )


class ImageCounter:
    """Counts images that could not be read, which their successors took the place of, and objects that had no room.

    Args:
      max_damaged: the part of all images seen from which on the run ends.
      note: is told when the first ones are found.
    """

    def __init__(self, max_damaged: float, *, note: Callable[[str], None]):
        self._max, self._note, self._seen, self._damaged, self._dropped = max_damaged, note, 0, 0, 0

    def count(self, batch: dict[str, Any]) -> None:
        """Takes "damaged" and "dropped" out of a batch of this process.

        Raises:
          UserError: too many were damaged.
        """
        damaged = int(np.sum(batch.pop("damaged", 0)))
        if damaged and not self._damaged:
            self._note("Some images cannot be read; each is named once, and the next one is taken instead.")
        self._dropped += int(np.sum(batch.pop("dropped", 0)))
        self._seen += len(batch["image"]) + damaged
        self._damaged += damaged
        if self._damaged > max(_FEW, self._max * self._seen):
            raise UserError(
                f"{self._damaged} of {self._seen} images could not be read, more than config.data.max_damaged "
                f"{self._max:g} of them. `python -m dat_jax.data.prepare` finds all that are damaged."
            )

    def summary(self) -> dict[str, int]:
        """{"damaged_images", "dropped_objects": how many so far}, where there were any."""
        found = {"damaged_images": self._damaged, "dropped_objects": self._dropped}
        return {name: count for name, count in found.items() if count}


class SpikeReport:
    """Writes down which images were in a batch whose loss was far above the losses before it, or no finite number.

    Args:
      path: of the file that gets a line {"step", "loss", "usual_loss", "images"} for each, null for a loss that is not
        finite; "images" are the indices of the training images, of all processes.
      run: the run.
      factor: of the mean of the last hundred losses, above which one is a spike; 0 reports nothing.
      note: is told of each.
    """

    def __init__(self, path: pathlib.Path, run: Run, *, factor: float, note: Callable[[str], None]):
        self._path, self._run, self._factor, self._note, self._losses = path, run, factor, note, []

    def report(self, step: int, values: list[dict]) -> None:
        """Looks at the metrics of the last steps, ``step`` being the last."""
        if not self._factor:
            return
        for index, metrics in enumerate(values, start=step - len(values) + 1):
            loss, usual = float(metrics["loss"]), float(np.mean(self._losses)) if self._losses else math.inf
            if not metrics["skipped_in_a_row"] and loss <= self._factor * usual:
                self._losses = [*self._losses, loss][-_REMEMBERED:]
                continue
            images = self._run.setup.example_indices(self._run.config, self._run.train_source, step=index)
            self._note(f"  step {index}: loss {loss:.4g}, usually {usual:.4g}; its images are in {self._path}")
            finite = {name: x if math.isfinite(x) else None for name, x in (("loss", loss), ("usual_loss", usual))}
            if jax.process_index() == 0:
                with self._path.open("a") as file:
                    file.write(json.dumps({"step": index, **finite, "images": images}) + "\n")
