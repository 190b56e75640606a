"""A task says what is learned: how to initialise, what the loss is, what is predicted."""

import dataclasses
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Task:
    """Functions that the loop is built on. ``variables`` is {"params": ..., **model state}.

    Attributes:
      init: (key, batch) -> variables.
      loss: (variables, batch, key) -> (loss, metrics, new model state); metrics are means over the batch.
      predict: (variables, batch) -> outputs, a dict of arrays.
    """

    init: Callable[[Any, Any], Any]
    loss: Callable[[Any, Any, Any], Any]
    predict: Callable[[Any, Any], Any]
