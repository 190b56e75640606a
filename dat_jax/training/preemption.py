"""The end of a run that is asked for from outside: by a signal, at the same step in all processes."""

import collections
import signal
import threading
from collections.abc import Callable

import jax

from dat_jax.parallel import sharding

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_STEPS_BEHIND = 2  # after so many steps what the processes said is read, so that none waits for it


class Preemption:
    """Notices SIGTERM and SIGINT. Use as a context manager; the second signal ends the process at once.

    In another thread than the main one, which alone gets signals, it notices none.

    Args:
      mesh: over the devices of all processes.
      note: is told of the signal.

    Attributes:
      signal_name: what was noticed, or None.
    """

    def __init__(self, mesh: jax.sharding.Mesh, *, note: Callable[[str], None]):
        self._mesh, self._note = mesh, note
        self.signal_name, self._previous = None, {}
        self._said = False
        self._asked = collections.deque()
        self._any = jax.jit(lambda flags: flags.any(), out_shardings=sharding.replicated(mesh))

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        return self

    def __exit__(self, *_):
        self._restore()

    def should_stop(self) -> bool:
        """Whether the run has to end at this step. Every process has to ask, once a step; all get the same answer.

        The answer of one process is its own. Several ask their devices, which takes two more steps.
        """
        received = self.signal_name is not None
        if received and not self._said:
            self._said = True
            self._note(f"{self.signal_name}: saving, then ending. Another signal ends at once, without saving.")
        if jax.process_count() == 1:
            return received
        self._asked.append(self._any(sharding.fill_batch(received, self._mesh)))
        stop = len(self._asked) > _STEPS_BEHIND and bool(self._asked.popleft())
        if stop and not received:
            self.signal_name = "a signal to another process"
        return stop

    def _receive(self, number, _):
        self.signal_name = signal.Signals(number).name
        self._restore()

    def _restore(self):
        while self._previous:
            signal.signal(*self._previous.popitem())
