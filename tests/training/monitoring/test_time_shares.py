"""Where the time of a run goes."""

import threading
import time

import jax
import numpy as np
import pytest

from dat_jax.training.monitoring.time_shares import (
    ACTIVITIES,
    Clock,
    TimeShares,
    format_shares,
    name_metrics,
    read_earlier,
)
from tests.helpers.logs import collect_logs


class StandInTime:
    """A clock that is set by hand."""

    def __init__(self):
        self.value = 100.0

    def __call__(self):
        return self.value


def test_every_second_belongs_to_one_activity():
    now = StandInTime()
    clock = Clock(now)
    now.value += 3
    assert clock.switch("steps") == "start"
    now.value += 5
    with clock.measure("evaluation"):
        now.value += 7
        with clock.measure("saving"):
            now.value += 2
    now.value += 1
    clock.move(0.5, source="steps", target="input")
    clock.add({"steps": 10.0, "lost": 4.0})
    seconds = clock.read()
    assert seconds == {
        **dict.fromkeys(ACTIVITIES, 0.0),
        "start": 3.0,
        "steps": 15.5,
        "input": 0.5,
        "evaluation": 7.0,
        "saving": 2.0,
        "lost": 4.0,
    }
    assert sum(seconds.values()) == now.value - 100.0 + 14.0
    assert clock.read() == seconds
    with pytest.raises(ValueError, match="evaluation"), clock.measure("evaluation"):
        raise ValueError("no evaluation")
    now.value += 1
    assert clock.read()["steps"] == 16.5
    assert format_shares(seconds) == "steps 48 %, evaluation 22 %, lost 12 %, start 9 %, saving 6 %, input 2 %"
    assert name_metrics({"steps": 1.23456, "lost": 0.0}) == {"steps": 1.235}


class Steps:
    """The training loop and its devices, with times that are set by hand."""

    def __init__(self):
        self.now = StandInTime()
        self.clock = Clock(self.now)
        self.hook = TimeShares(self.clock, workers=0)
        self._running = []

    def wait(self, seconds, *, finish_after=None):
        """Wait for images, while the devices finish the oldest step after ``finish_after`` seconds; and dispatch a step."""
        self.hook.before_batch(1)
        if finish_after is not None:
            self.now.value += finish_after
            self.finish()
        self.now.value += seconds - (finish_after or 0.0)
        self.hook.on_batch(1, {})
        self._running.append(Outputs())
        self.hook.after_step(1, self._running[-1])

    def finish(self):
        """The devices finish the oldest step, which is noticed."""
        before = self.hook._finished._finished
        self._running.pop(0).finished.set()
        while self.hook._finished._finished == before:
            time.sleep(0.001)

    def read(self):
        seconds = self.clock.read()
        return seconds["input"], seconds["steps"]


class Outputs:
    """Outputs of a step that the devices have not finished yet."""

    def __init__(self):
        self.finished = threading.Event()

    def block_until_ready(self):
        assert self.finished.wait(60)
        return self


def test_a_wait_for_images_counts_only_while_the_devices_are_idle():
    steps = Steps()
    steps.wait(2)  # nothing was dispatched
    assert steps.read() == (2, 0)
    steps.wait(2)  # the devices compute the first step all the time
    assert steps.read() == (2, 2)
    steps.finish()
    steps.wait(5, finish_after=2)  # idle for 3 s
    assert steps.read() == (5, 4)
    steps.now.value += 1  # the loop waits for the step
    steps.finish()
    steps.wait(2)  # idle all the time
    assert steps.read() == (7, 5)
    steps.finish()
    steps.hook.close()


def test_the_first_step_is_compilation():
    now = StandInTime()
    hook = TimeShares(clock := Clock(now), workers=0)
    hook.before_batch(1)
    hook.on_batch(1, {})
    now.value += 3
    hook.after_step(1, {"loss": jax.numpy.zeros(())})
    now.value += 2
    assert name_metrics(clock.read()) == {"compilation": 3, "steps": 2}
    hook.close()


def test_a_run_that_waits_for_images_is_warned_once():
    now = StandInTime()
    clock = Clock(now)
    hook = TimeShares(clock, workers=3)
    measured = []

    def log(*, steps, waited):
        clock.add({"steps": steps, "input": waited})
        measured.append(hook.on_log(1, []).get("input_wait"))

    with collect_logs() as messages:
        log(steps=1.0, waited=9.0)  # the pipeline starts
        for _ in range(2):
            log(steps=3.0, waited=1.0)
            log(steps=9.0, waited=1.0)
        assert messages == []
        for _ in range(2):  # a burst
            log(steps=1.0, waited=9.0)
            log(steps=10.0, waited=0.0)
    assert measured == [None, 25, 10, 25, 10, 90, 0, 90, 0]
    (message,) = messages
    assert "wait for images for 34 % of the time" in message  # 13 of 38 seconds
    assert "--config.data.workers than 3" in message
    hook.close()


def test_time_of_earlier_calls():
    records = [
        {"step": 10, "train/loss": 1.0},
        {"step": 10, "time/start": 4.0, "time/steps": 10.0},
        {"step": 20, "time/start": 4.0, "time/steps": 20.0, "time/saving": 1.0},
        {"step": 30, "time/start": 4.0, "time/steps": 30.0, "time/saving": 1.0},
    ]
    assert read_earlier(records, step=30) == {"start": 4.0, "steps": 30.0, "saving": 1.0, "lost": 0.0}
    assert read_earlier(records, step=20) == {"start": 4.0, "steps": 20.0, "saving": 1.0, "lost": 10.0}
    assert read_earlier(records, step=0) == {"lost": 35.0}
    # Resumed at 20, it was killed before it had saved, and is resumed at 20 again.
    resumed = [*records, {"step": 25, "time/start": 6.0, "time/steps": 25.0, "time/saving": 1.0, "time/lost": 10.0}]
    assert read_earlier(resumed, step=20) == {"start": 4.0, "steps": 20.0, "saving": 1.0, "lost": 17.0}
    assert read_earlier([{"step": 10, "train/loss": 1.0}], step=10) == {}
    assert np.isclose(sum(read_earlier(resumed, step=20).values()), 42.0)


def test_edited_files_of_metrics_do_not_hurt():
    for value in (None, "x", [1.0], True, float("nan"), float("inf"), -1.0, 10**400):
        assert read_earlier([{"step": 10, "time/steps": value, "time/start": 1.0}], step=10) == {
            "start": 1.0,
            "lost": 0.0,
        }
    fewer = [{"step": 5, "time/steps": 100.0}, {"step": 10, "time/steps": 50.0}]
    assert read_earlier(fewer, step=7) == {"steps": 100.0, "lost": 0.0}
