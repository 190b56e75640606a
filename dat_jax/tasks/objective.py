"""The pure functions of a task that the training step and the evaluation are built on."""

import dataclasses
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Objective:
    """A model with its loss and prediction. ``variables`` is {"params": ..., **model state such as "batch_stats"}.

    Attributes:
      init: (key, batch) -> variables.
      loss: (variables, batch, key) -> (scalar loss, metrics, new model state). Metrics are scalars: means over the batch. If the
        training has ``Guides``, they are a fourth argument.
      predict: (variables, batch) -> outputs, a dict of arrays.
      outputs: (variables, normalized images) -> what a student learns from a model, a dict of arrays; None for tasks without
        distillation.
      embed: (variables, batch) -> features of the images, (B, C); None for tasks without one feature vector per image.
    """

    init: Callable[[Any, Any], Any]
    loss: Callable[[Any, Any, Any], Any]
    predict: Callable[[Any, Any], Any]
    outputs: Callable[[Any, Any], Any] | None = None
    embed: Callable[[Any, Any], Any] | None = None


@dataclasses.dataclass(frozen=True)
class Guides:
    """Models that a student learns from besides the labels.

    Attributes:
      progress: finished part of the run, from 0 to 1.
      teacher: normalized images -> outputs of the teacher, or None.
      average: normalized images -> outputs of the averaged model, or None.
    """

    progress: Any
    teacher: Callable[[Any], Any] | None = None
    average: Callable[[Any], Any] | None = None
