"""The interface of what observes the training loop."""

from collections.abc import Mapping, Sequence
from typing import Any


class Hook:
    """Observes the training loop. Every method does nothing unless a subclass overrides it.

    Steps are counted from 1. Each process of a run has its own hooks.
    """

    def before_batch(self, step: int) -> None:
        """Called before the loop waits for the batch of a step."""

    def on_batch(self, step: int, batch: dict[str, Any]) -> None:
        """Called with this process's batch, numpy arrays, before the step. May remove entries that are not for the model.

        Raises:
          UserError: ends the run.
        """

    def after_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Called once a step is dispatched, with its metrics on the devices: reading them waits for the step."""

    def on_log(self, step: int, metrics: Sequence[Mapping[str, Any]]) -> Mapping[str, float]:
        """Called when metrics are logged, with those of every step since the last time, the last being ``step``.

        Returns:
          Metrics to log.
        """
        del step, metrics
        return {}

    def after_evaluation(self, step: int) -> None:
        """Called after an evaluation and the saving of its checkpoint."""

    def close(self) -> None:
        """Called at the end of the loop, also after an error."""
