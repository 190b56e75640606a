"""Where the wall time of a run goes: how long the devices compute, wait for images, and everything else."""

import collections
import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax

from dat_jax.training.monitoring.hooks import Hook

logger = logging.getLogger(__name__)
# What the time of a run is spent on, in the order of the summary.
ACTIVITIES = {
    "start": "start: loading libraries, reading the data's index, building the model, restoring a checkpoint",
    "compilation": "compilation of the training step",
    "steps": "training steps",
    "input": "waiting for images, with idle devices",
    "evaluation": "evaluation, with the compilation of its programs",
    "saving": "saving, as far as the training waits for it",
    "other": "logging and figures",
    "lost": "steps that a restart repeats, with all that was done between them",
}
_PREFIX = "time/"
_MOST_SECONDS = 1e10  # of an activity, 300 years
_MUCH_WAITING = 20.0  # percent of the time of the steps
_LOGS_BEFORE_WARNING, _LOGS_FOR_WARNING = (
    5,
    10,
)  # fewest and most log lines that are looked at; batches may come in bursts


class Clock:
    """Assigns time to activities, exactly one at a time. It starts with the activity "start".

    Args:
      now: returns the time in seconds.
      started: the time at which it starts; by default now.

    Attributes:
      now: returns the time in seconds.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic, *, started: float | None = None):
        self.now = now
        self._seconds = dict.fromkeys(ACTIVITIES, 0.0)
        self._activity, self._since = "start", now() if started is None else started

    def switch(self, activity: str) -> str:
        """Assign the time from now on to an activity. Returns the one before it."""
        before, now = self._activity, self.now()
        self._seconds[before] += now - self._since
        self._activity, self._since = activity, now
        return before

    @contextlib.contextmanager
    def measure(self, activity: str) -> Iterator[None]:
        """Assign the time of a block to an activity, and the time after it to the activity before it."""
        before = self.switch(activity)
        try:
            yield
        finally:
            self.switch(before)

    def move(self, seconds: float, *, source: str, target: str) -> None:
        """Assign time that was assigned to ``source`` to ``target`` instead."""
        self._seconds[source] -= seconds
        self._seconds[target] += seconds

    def add(self, seconds: Mapping[str, float]) -> None:
        """Add the time of earlier calls, by activity."""
        for activity, value in seconds.items():
            self._seconds[activity] += value

    def read(self) -> dict[str, float]:
        """Seconds of each activity, whose sum is the time since the clock was made and what was added."""
        self.switch(self._activity)
        return dict(self._seconds)


class TimeShares(Hook):
    """Tells the clock which activity the training loop is at, and warns if the devices often wait for images.

    The loop runs a few steps ahead of the devices. While it waits for a batch, they may still compute an earlier step: only the
    part of the wait after that step counts as "input", and the rest as "steps".

    Args:
      clock: the clock of the run.
      workers: ``config.data.workers``, for the warning.
    """

    def __init__(self, clock: Clock, *, workers: int):
        self._clock, self._workers = clock, workers
        self._finished = _FinishTimes(clock.now)
        self._wait_start = 0.0
        self._before: dict[str, float] | None = None  # the clock at the last log
        self._recent: collections.deque[tuple[float, float]] = collections.deque(maxlen=_LOGS_FOR_WARNING)
        self._warned = False

    def before_batch(self, step: int) -> None:
        """The loop waits for images."""
        del step
        self._clock.switch("input")
        self._wait_start = self._clock.now()

    def on_batch(self, step: int, batch: dict[str, Any]) -> None:
        """The loop waited for images; it compiles the first step, and dispatches the others."""
        del step, batch
        before = self._clock.switch("steps" if self._finished.count else "compilation")
        assert before == "input"
        end = self._clock.now()
        idle = end - max(self._wait_start, min(self._finished.last(), end))
        self._clock.move(end - self._wait_start - idle, source="input", target="steps")

    def after_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """The step is dispatched; from now on the loop waits for steps, if it waits at all."""
        del step
        self._finished.follow(metrics)
        self._clock.switch("steps")

    def on_log(self, step: int, metrics: Sequence[Mapping[str, Any]]) -> Mapping[str, float]:
        """{"input_wait": percent of the time since the last log in which the devices waited for images}.

        Evaluations, saving and compilation are left out.
        """
        del step, metrics
        now = self._clock.read()
        before, self._before = self._before, now
        if before is None:  # the first images take longer, because the pipeline starts
            return {}
        waited, computed = (now[name] - before[name] for name in ("input", "steps"))
        self._recent.append((waited, waited + computed))
        self._warn_if_much()
        return {"input_wait": 100 * waited / max(waited + computed, 1e-9)}

    def close(self) -> None:
        """End the thread that follows the steps."""
        self._finished.close()

    def _warn_if_much(self) -> None:
        waited, total = (sum(values) for values in zip(*self._recent, strict=True))
        percent = 100 * waited / max(total, 1e-9)
        if self._warned or len(self._recent) < _LOGS_BEFORE_WARNING or percent <= _MUCH_WAITING:
            return
        self._warned = True
        logger.warning(
            "The devices wait for images for %.0f %% of the time. Set a larger --config.data.workers than %d, up to the number "
            "of cores of each host, and read the data from a faster disk.",
            *(percent, self._workers),
        )


class _FinishTimes:
    """Notes, in a thread, when the devices have finished the last step.

    Attributes:
      count: number of steps that were followed.
    """

    def __init__(self, now: Callable[[], float]):
        self.count = 0
        self._now = now
        self._finished: tuple[int, float] = (0, 0.0)  # the last finished step, and when
        self._steps: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def follow(self, outputs: Any) -> None:
        """Follow a step with these outputs."""
        self.count += 1
        self._steps.put(outputs)

    def last(self) -> float:
        """When the last step was finished; infinity if it is not, 0 if there was none."""
        count, moment = self._finished
        return moment if count == self.count else float("inf")

    def close(self) -> None:
        self._steps.put(None)

    def _run(self) -> None:
        count = 0
        while (outputs := self._steps.get()) is not None:
            count += 1
            with contextlib.suppress(Exception):  # the training loop gets the error, too
                jax.block_until_ready(outputs)
            self._finished = count, self._now()


def name_metrics(seconds: Mapping[str, float]) -> dict[str, float]:
    """Metrics of a clock's seconds, for "time" as their prefix, without activities that took none."""
    return {activity: round(value, 3) for activity, value in seconds.items() if value > 0}


def read_earlier(records: Iterable[Mapping[str, Any]], *, step: int) -> dict[str, float]:
    """Seconds of each activity in earlier calls of a run that is resumed.

    What was done after the step that was restored is "lost". The time between the last record and the end of the process is
    unknown and left out.

    Args:
      records: those of metrics.jsonl, in the order of the file, see ``metrics.read_records``.
      step: the step that was restored.
    """
    last: dict[str, float] = {}
    kept: dict[str, float] = {}
    for record in records:
        seconds = {name: record[_PREFIX + name] for name in ACTIVITIES if _is_duration(record.get(_PREFIX + name))}
        if seconds:
            last = seconds
            if record["step"] <= step:
                kept = seconds
    lost = max(sum(last.values()) - sum(kept.values()), 0.0)
    return {**kept, "lost": kept.get("lost", 0.0) + lost} if last else {}


def _is_duration(value: Any) -> bool:
    """Whether a value of a file, which may have been edited, can be a number of seconds."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < _MOST_SECONDS


def format_shares(seconds: Mapping[str, float]) -> str:
    """Format as "steps 71 %, compilation 20 %, ...", the largest share first, without those below 0.5 %."""
    total = max(sum(seconds.values()), 1e-9)
    shares = sorted(((100 * value / total, name) for name, value in seconds.items()), reverse=True)
    return ", ".join(f"{name} {share:.0f} %" for share, name in shares if share >= 0.5)
