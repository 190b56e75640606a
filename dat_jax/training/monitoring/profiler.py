"""A profile of some training steps, for TensorBoard's profiler or https://ui.perfetto.dev."""

import logging
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from dat_jax.training.monitoring.hooks import Hook

logger = logging.getLogger(__name__)
WARM_UP_STEPS = 3  # before the trace: the first step compiles, and the loader fills its buffers


class StepProfiler(Hook):
    """Traces consecutive steps with ``jax.profiler``.

    An evaluation between two traced steps is part of the trace. Only the first process traces, since all processes run the
    same program.

    Args:
      directory: parent of plugins/profile/<time>/.
      steps: number of steps to trace; 0 disables the profiler.
      start_step: number of finished steps.
      total_steps: number of steps of the whole run. A run that is too short for a trace logs a warning.
    """

    def __init__(self, directory: pathlib.Path, *, steps: int, start_step: int, total_steps: int):
        self._directory, self._running = pathlib.Path(directory), False
        self._first = start_step + WARM_UP_STEPS + 1
        self._last = self._first + steps - 1
        self._enabled = steps > 0 and jax.process_index() == 0
        if self._enabled and self._last > total_steps:
            self._enabled = False
            logger.warning(
                "No profile: %d steps after %d warm-up steps need %d steps, but only %d are left.",
                *(steps, WARM_UP_STEPS, steps + WARM_UP_STEPS, total_steps - start_step),
            )

    def on_batch(self, step: int, batch: dict[str, Any]) -> None:
        """Start the trace before its first step."""
        del batch
        if self._enabled and step == self._first:
            jax.profiler.start_trace(str(self._directory))
            self._running = True

    def after_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Stop the trace once its last step has finished."""
        if self._running and step == self._last:
            jax.block_until_ready(metrics)
            self.close()
            logger.info(
                "Profile of steps %d to %d in %s/ of the work directory.", self._first, self._last, self._directory.name
            )

    def close(self) -> None:
        """Stop a running trace; after an error it may show the reason."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
