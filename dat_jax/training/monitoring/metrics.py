"""Metrics of a run: a JSONL file, the logs beside it, and what progress is made of what."""

import contextlib
import json
import os
import pathlib
import resource
import sys
import time
from collections.abc import Callable, Sequence

import jax

from dat_jax.profiling.topologies import find_chip
from dat_jax.training.monitoring.logs import Log, TensorBoardLog


class MetricWriter:
    """Appends to metrics.jsonl in ``directory``, and to other logs. Use as a context manager, in one process.

    What cannot be written is kept and written with a later line; the first time it is said, and the run goes on.

    Args:
      directory: of the files.
      logs: functions that make the other logs; TensorBoard's, unless given. They say themselves what fails beside an OSError.
      note: is told what could not be written.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        *,
        logs: Sequence[Callable[[], Log]] | None = None,
        note: Callable[[str], None] = print,
    ):
        self._path, self._note, self._waiting, self._said = directory / "metrics.jsonl", note, "", False
        if self._path.exists():  # a killed run may have left an unfinished last line
            os.truncate(self._path, self._path.read_bytes().rfind(b"\n") + 1)
        self._logs = []
        for make in [lambda: TensorBoardLog(directory)] if logs is None else logs:
            with self._said_once():
                self._logs.append(make())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._append("")
        for log in self._logs:
            with self._said_once():
                log.close()

    def write(self, step: int, metrics: dict[str, float], *, prefix: str) -> None:
        """One line {"step": step, "train/loss": ..., ...}."""
        named = {f"{prefix}/{name}": value for name, value in metrics.items()}
        self._append(json.dumps({"step": step, **named}) + "\n")
        for log in self._logs:
            with self._said_once():
                log.write(step, named)

    def _append(self, line):
        self._waiting += line
        size = self._path.stat().st_size if self._path.exists() else 0
        with self._said_once():
            try:
                with self._path.open("a") as file:
                    file.write(self._waiting)
                self._waiting = ""
            except OSError:
                with contextlib.suppress(OSError):  # no half lines
                    os.truncate(self._path, size)
                raise

    @contextlib.contextmanager
    def _said_once(self):
        try:
            yield
        except OSError as error:
            if not self._said:
                self._note(
                    f"WARNING: metrics cannot be written in {self._path.parent}: {error.strerror}. They wait meanwhile."
                )
            self._said = True


class NullWriter:
    """Writes nothing: for all processes but the first."""

    def write(self, step: int, metrics: dict[str, float], *, prefix: str) -> None:
        """Nothing."""


def read_metrics(path: pathlib.Path) -> dict[str, dict[int, float]]:
    """{metric name: {step: value}} of a metrics.jsonl; the last line counts where a step was repeated after a resume.

    A line that is not one of these, as a killed run may leave, is passed over; without a file there are no metrics.
    """
    if not path.exists():
        return {}
    series: dict[str, dict[int, float]] = {}
    for line in path.read_text(errors="replace").splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if not isinstance(record, dict) or not isinstance(step := record.pop("step", None), int):
            continue
        for name, value in record.items():
            series.setdefault(name, {})[step] = value
    return series


class Progress:
    """Rate and time left.

    Args:
      start_step, total_steps: of the run; the clock starts now.
      batch_size: examples a step.
    """

    def __init__(self, *, start_step: int, total_steps: int, batch_size: int):
        self._step, self._total, self._batch_size = start_step, total_steps, batch_size
        self._time = time.monotonic()

    def update(self, step: int) -> tuple[float, float]:
        """Images a second since the last call, and seconds left at that rate."""
        now = time.monotonic()
        seconds_a_step = (now - self._time) / max(step - self._step, 1)
        self._step, self._time = step, now
        return self._batch_size / max(seconds_a_step, 1e-9), (self._total - step) * seconds_a_step

    def skip(self) -> None:
        """Leaves the time since the last call (evaluation, saving) out of the rate."""
        self._time = time.monotonic()


class Usage:
    """What a run makes of its devices.

    Args:
      devices: of all processes, of one kind.
      count_flops: gives the model's FLOPs of a training step for one image; called once, and only where the peak of the
        devices is known.
    """

    def __init__(self, devices: Sequence[jax.Device], *, count_flops: Callable[[], float]):
        self._local = [device for device in devices if device.process_index == jax.process_index()]
        chip = find_chip(devices[0].device_kind)
        self._peak_images = None if chip is None else len(devices) * chip.flops_per_second / count_flops()

    def measure(self, images_per_second: float) -> dict[str, float]:
        """Of these:

        "flop_utilization": model FLOPs utilization, % of the devices' bfloat16 peak, where that is known.
        "device_memory_gib": the most that a device of this process had in use so far, where devices say it, or
        "host_memory_gib": likewise of this process, on CPU.
        """
        measured = {}
        if self._peak_images is not None:
            measured["flop_utilization"] = 100 * images_per_second / self._peak_images
        stats = [device.memory_stats() or {} for device in self._local]
        peaks = [found["peak_bytes_in_use"] for found in stats if "peak_bytes_in_use" in found]
        if peaks:
            measured["device_memory_gib"] = max(peaks) / 2**30
        elif self._local[0].platform == "cpu":
            measured["host_memory_gib"] = peak_host_memory() / 2**30
        return measured


def peak_host_memory() -> int:
    """The most bytes of memory that this process had in use so far (its resident set)."""
    try:  # getrusage's figure starts at what the process that started this one had
        status = pathlib.Path("/proc/self/status").read_text()
        return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    except (OSError, StopIteration):  # not Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def format_duration(seconds: float) -> str:
    """1:02:03, or 2:03 below an hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
