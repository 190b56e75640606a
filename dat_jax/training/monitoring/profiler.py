"""A trace of some steps, for TensorBoard's profiler or https://ui.perfetto.dev."""

import pathlib
from collections.abc import Callable

import jax

WARM_UP_STEPS = 3  # of this process, before the trace: the first compiles, and the loader fills up


class StepProfiler:
    """Traces consecutive steps of a run into ``directory``. Use as a context manager around the loop.

    An evaluation that falls between two of the traced steps is in the trace too. Only the first process traces: all of
    them run the same program, and its devices stand for the others'.

    Args:
      directory: for plugins/profile/<time>/.
      steps: how many; 0 for none.
      start_step, total_steps: finished steps, and those of the run when it is done.
      note: is told where the trace is, or that the run is too short for one.
    """

    def __init__(
        self, directory: pathlib.Path, *, steps: int, start_step: int, total_steps: int, note: Callable[[str], None]
    ):
        self._directory, self._note, self._running = directory, note, False
        self._first = start_step + WARM_UP_STEPS + 1
        self._last = self._first + steps - 1
        self._wanted = steps > 0 and jax.process_index() == 0
        if self._wanted and self._last > total_steps:
            self._wanted = False
            note(
                f"No profile: {steps} steps after {WARM_UP_STEPS} of warm-up want {steps + WARM_UP_STEPS} steps, the run "
                f"has {total_steps - start_step} left."
            )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._running:  # stopped by an error: what there is may say why
            self._stop()

    def before(self, step: int) -> None:
        """To be called before the step, counted from 1."""
        if self._wanted and step == self._first:
            jax.profiler.start_trace(str(self._directory))
            self._running = True

    def after(self, step: int, results) -> None:
        """To be called after the step; waits for its results where it is the last one."""
        if self._running and step == self._last:
            jax.block_until_ready(results)
            self._stop()
            self._note(f"Profile of the steps {self._first} to {self._last} in {self._directory}.")

    def _stop(self):
        jax.profiler.stop_trace()
        self._running = False
