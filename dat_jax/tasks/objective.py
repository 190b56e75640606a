"""The pure functions of a task that the training step and the evaluation are built on."""

import dataclasses
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Objective:
    """A model with its loss and prediction. ``variables`` is {"params": ..., **model state such as "batch_stats"}.

    Attributes:
      init: (key, batch) -> variables.
      loss: (variables, batch, key) -> (scalar loss, metrics, new model state). Metrics are scalars: means over the batch.
      predict: (variables, batch) -> outputs, a dict of arrays.
      embed: (variables, batch) -> features of the images, (B, C); None for tasks without one feature vector per image.
    """

    init: Callable[[Any, Any], Any]
    loss: Callable[[Any, Any, Any], Any]
    predict: Callable[[Any, Any], Any]
    embed: Callable[[Any, Any], Any] | None = None
