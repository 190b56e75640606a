"""Monitoring of the loss: which images were in a batch with an unusual loss."""

import json
import logging
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from dat_jax.training.monitoring.hooks import Hook

logger = logging.getLogger(__name__)
_WINDOW = 100  # recent losses that a loss is compared with


class SpikeReport(Hook):
    """Records steps whose loss is far above the recent mean, or not finite.

    Args:
      path: JSONL file that gets a line {"step", "loss", "usual_loss", "images"} for each; null stands for a loss that is not
        finite. "images" are indices of training images, over all processes.
      example_indices: step -> these indices.
      factor: a loss above ``factor`` times the mean of the last hundred losses is a spike; 0 disables the report.
    """

    def __init__(self, path: pathlib.Path, example_indices: Callable[[int], list[int]], *, factor: float):
        self._path, self._example_indices, self._factor = path, example_indices, factor
        self._losses: list[float] = []

    def on_log(self, step: int, metrics: Sequence[Mapping[str, Any]]) -> Mapping[str, float]:
        """Check the loss of each step since the last call."""
        if self._factor:
            for index, values in enumerate(metrics, start=step - len(metrics) + 1):
                self._check(index, float(values["loss"]), skipped=bool(values["skipped_in_a_row"]))
        return {}

    def _check(self, step: int, loss: float, *, skipped: bool) -> None:
        usual = float(np.mean(self._losses)) if self._losses else math.inf
        if not skipped and loss <= self._factor * usual:
            self._losses = [*self._losses, loss][-_WINDOW:]
            return
        logger.warning(
            "step %d: loss %.4g, usually %.4g; its images are listed in %s", step, loss, usual, self._path.name
        )
        numbers = {"loss": loss, "usual_loss": usual}
        finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        if jax.process_index() == 0:
            with self._path.open("a") as file:
                file.write(json.dumps({"step": step, **finite, "images": self._example_indices(step)}) + "\n")
