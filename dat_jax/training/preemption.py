"""Graceful shutdown on SIGTERM and SIGINT, at the same step in all processes."""

import collections
import logging
import signal
import threading

import jax

from dat_jax.parallel import sharding

logger = logging.getLogger(__name__)
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_STEPS_BEHIND = 2  # the answers of other processes are read this many steps later, so that no step waits for them


class Preemption:
    """Handles SIGTERM and SIGINT. Use as a context manager; the second signal ends the process at once.

    Outside the main thread, which is the only one that gets signals, it handles none.

    Args:
      mesh: mesh over the devices of all processes.

    Attributes:
      signal_name: name of the signal that was received, or None.
    """

    def __init__(self, mesh: jax.sharding.Mesh):
        self._mesh = mesh
        self.signal_name: str | None = None
        self._previous = {}
        self._logged = False
        self._answers = collections.deque()
        self._any = jax.jit(lambda flags: flags.any(), out_shardings=sharding.replicated(mesh))

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        return self

    def __exit__(self, *_):
        self._restore()

    def should_stop(self) -> bool:
        """Return whether the run has to end at this step. Every process calls this once per step; all get the same answer.

        A run of one process knows at once. Several processes ask each other through their devices, two steps later.
        """
        received = self.signal_name is not None
        if received and not self._logged:
            self._logged = True
            logger.warning(
                "%s received: the run is saved and then ends. Another signal ends it at once, without saving.",
                self.signal_name,
            )
        if jax.process_count() == 1:
            return received
        self._answers.append(self._any(sharding.fill_batch(received, self._mesh)))
        stop = len(self._answers) > _STEPS_BEHIND and bool(self._answers.popleft())
        if stop and not received:
            self.signal_name = "a signal to another process"
        return stop

    def _receive(self, number, _):
        self.signal_name = signal.Signals(number).name
        self._restore()

    def _restore(self):
        while self._previous:
            signal.signal(*self._previous.popitem())
