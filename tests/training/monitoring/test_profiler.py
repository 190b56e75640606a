"""Which steps of a run are traced."""

import contextlib
import subprocess
import sys

import jax
import pytest

from dat_jax.training.monitoring.profiler import StepProfiler
from tests.helpers.logs import collect_logs


@pytest.fixture
def calls(monkeypatch):
    """What the profiler was told, in order."""
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda directory: calls.append(f"start {directory}"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    return calls


def run_steps(calls, *, steps, start_step, total_steps, stop_at=None):
    options = dict(steps=steps, start_step=start_step, total_steps=total_steps)
    with collect_logs() as messages, contextlib.closing(StepProfiler("profile", **options)) as profiler:
        for step in range(start_step + 1, total_steps + 1):
            profiler.on_batch(step, {})
            calls.append(step)
            if step == stop_at:
                raise KeyboardInterrupt
            profiler.after_step(step, {})
    return messages


def test_steps_after_the_warm_up_are_traced_also_of_a_resumed_run(calls):
    assert run_steps(calls, steps=2, start_step=20, total_steps=26) == [
        "Profile of steps 24 to 25 in profile/ of the work directory."
    ]
    assert calls == [21, 22, 23, "start profile", 24, 25, "stop", 26]


def test_without_a_number_nothing_is_traced(calls):
    assert run_steps(calls, steps=0, start_step=0, total_steps=5) == []
    assert calls == [1, 2, 3, 4, 5]


def test_a_run_that_is_too_short_says_so(calls):
    (message,) = run_steps(calls, steps=3, start_step=5, total_steps=10)
    assert "No profile: 3 steps after 3 warm-up steps need 6 steps" in message
    assert calls == [6, 7, 8, 9, 10]


def test_a_run_that_ends_in_the_middle_leaves_what_was_traced(calls):
    with pytest.raises(KeyboardInterrupt):
        run_steps(calls, steps=3, start_step=0, total_steps=10, stop_at=5)
    assert calls == [1, 2, 3, "start profile", 4, 5, "stop"]


def test_the_trace_is_what_a_profiler_reads(tmp_path):
    program = (
        "import jax, sys, pathlib; from dat_jax.training.monitoring.profiler import StepProfiler\n"
        "from dat_jax.cli.console import configure_logging; configure_logging()\n"
        "profiler = StepProfiler(pathlib.Path(sys.argv[1]), steps=1, start_step=0, total_steps=4)\n"
        "for step in range(1, 5): profiler.on_batch(step, {}); profiler.after_step(step, jax.numpy.ones(3) + step)\n"
    )
    printed = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert printed.stdout == f"Profile of steps 4 to 4 in {tmp_path.name}/ of the work directory.\n"
    assert list(tmp_path.glob("plugins/profile/*/*.xplane.pb"))
