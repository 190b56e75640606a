"""Throughput, time left, utilization and memory of a run."""

import pathlib
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from dat_jax.profiling.topologies import find_chip
from dat_jax.training.monitoring.hooks import Hook


class Throughput(Hook):
    """Measures images per second, utilization and memory. The first step, which compiles, is excluded from the rate.

    Args:
      progress: makes a ``Progress``, whose clock starts then, from the number of finished steps.
      usage: of the devices.

    Attributes:
      pace: images per second, and estimated seconds until the last step, as of the last ``on_log``; None until a step follows
        the first one.
    """

    def __init__(self, progress: Callable[[int], "Progress"], usage: "Usage"):
        self._make_progress, self._usage = progress, usage
        self._progress: Progress | None = None  # until the first step
        self.pace: tuple[float, float] | None = None

    def after_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Start the clock after the first step."""
        if self._progress is None:
            jax.block_until_ready(metrics)
            self._progress = self._make_progress(step)

    def on_log(self, step: int, metrics: Sequence[Mapping[str, Any]]) -> Mapping[str, float]:
        """{"images_per_second": since the last call, excluding evaluations, if known} and ``Usage.measure``."""
        del metrics
        assert self._progress is not None
        self.pace = self._progress.update(step)
        if self.pace is None:
            return self._usage.measure(None)
        images_per_second, _ = self.pace
        return {"images_per_second": images_per_second, **self._usage.measure(images_per_second)}

    def describe_pace(self) -> str:
        """The end of a log line, such as "  165 images/s  0:12 left"; "" if the pace is unknown."""
        if self.pace is None:
            return ""
        images_per_second, seconds_left = self.pace
        return f"  {images_per_second:.0f} images/s  {format_duration(seconds_left)} left"

    def after_evaluation(self, step: int) -> None:
        """Exclude the evaluation from the rate."""
        del step
        assert self._progress is not None
        self._progress.skip()


class Progress:
    """Rate and time left.

    Args:
      start_step: number of finished steps; the clock starts now.
      total_steps: number of steps of the whole run.
      batch_size: examples per step.
    """

    def __init__(self, *, start_step: int, total_steps: int, batch_size: int):
        self._step, self._total, self._batch_size = start_step, total_steps, batch_size
        self._time = time.monotonic()
        self._start = self._step, self._time

    def update(self, step: int) -> tuple[float, float] | None:
        """Images per second since the last call, and seconds left at the pace since the start, evaluations included.

        Returns None if no step was finished since the last call.
        """
        if step == self._step:
            return None
        now = time.monotonic()
        seconds_per_step = (now - self._time) / (step - self._step)
        self._step, self._time = step, now
        start_step, start = self._start
        pace = (now - start) / (step - start_step)
        return self._batch_size / max(seconds_per_step, 1e-9), (self._total - step) * pace

    def skip(self) -> None:
        """Exclude the time since the last call, such as an evaluation, from the rate."""
        self._time = time.monotonic()


class Usage:
    """Utilization and memory of the devices of a run.

    Args:
      devices: those of all processes, of one kind.
      count_flops: returns the model FLOPs of a training step per image. It is called once, and only if the peak
        performance of the devices is known. None: utilization is not measured.
    """

    def __init__(
        self,
        devices: Sequence[jax.Device],  # pyright: ignore[reportInvalidTypeForm] (jaxlib has no annotations)
        *,
        count_flops: Callable[[], float] | None,
    ):
        self._local = [device for device in devices if device.process_index == jax.process_index()]
        chip = find_chip(devices[0].device_kind)
        self._peak_images: float | None = None
        if count_flops is not None and chip is not None and chip.flops_per_second is not None:
            self._peak_images = len(devices) * chip.flops_per_second / count_flops()

    def measure(self, images_per_second: float | None) -> dict[str, float]:
        """Measure, as far as the devices allow it and the rate is known.

        Returns:
          "flop_utilization": model FLOPs utilization in percent of the devices' bfloat16 peak; "device_memory_gib": peak
          memory of a device of this process so far; or, on CPU, "host_memory_gib": peak memory of this process so far.
        """
        measured = {}
        if self._peak_images is not None and images_per_second is not None:
            measured["flop_utilization"] = 100 * images_per_second / self._peak_images
        stats = [device.memory_stats() or {} for device in self._local]
        peaks = [values["peak_bytes_in_use"] for values in stats if "peak_bytes_in_use" in values]
        if peaks:
            measured["device_memory_gib"] = max(peaks) / 2**30
        elif self._local[0].platform == "cpu":
            measured["host_memory_gib"] = peak_host_memory() / 2**30
        return measured


def peak_host_memory() -> int:
    """Peak resident memory of this process, in bytes."""
    try:  # getrusage starts at the peak of the parent process
        status = pathlib.Path("/proc/self/status").read_text()
        return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    except (OSError, StopIteration):  # not Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def format_duration(seconds: float) -> str:
    """Format as 1:02:03, or 2:03 below an hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
