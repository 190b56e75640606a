"""Metrics of a run: a JSONL file, TensorBoard, and lines with progress on the console."""

import json
import pathlib
import time

import tensorboardX
from rich.console import Console
from rich.table import Table


class MetricWriter:
    """Appends to metrics.jsonl and to TensorBoard files in ``directory``. Use as a context manager, in one process."""

    def __init__(self, directory: pathlib.Path):
        path = directory / "metrics.jsonl"
        if path.exists():  # a killed run may have left an unfinished last line
            text = path.read_text()
            path.write_text(text[: text.rfind("\n") + 1])
        self._file = path.open("a")  # closed by __exit__
        self._tensorboard = tensorboardX.SummaryWriter(str(directory / "tensorboard"))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()
        self._tensorboard.close()

    def write(self, step: int, metrics: dict[str, float], *, prefix: str) -> None:
        """One line {"step": step, "train/loss": ..., ...}."""
        named = {f"{prefix}/{name}": value for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, **named}) + "\n")
        self._file.flush()
        for name, value in named.items():
            self._tensorboard.add_scalar(name, value, step)


class NullWriter:
    """Writes nothing: for all processes but the first."""

    def write(self, step: int, metrics: dict[str, float], *, prefix: str) -> None:
        """Nothing."""


def read_metrics(path: pathlib.Path) -> dict[str, dict[int, float]]:
    """{metric name: {step: value}} of a metrics.jsonl; the last line counts where a step was repeated after a resume.

    A line that is not JSON, as a killed run may leave, is passed over; without a file there are no metrics.
    """
    if not path.exists():
        return {}
    series: dict[str, dict[int, float]] = {}
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        step = record.pop("step")
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


def format_duration(seconds: float) -> str:
    """1:02:03, or 2:03 below an hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def print_table(console: Console, title: str, rows: dict[str, str]) -> None:
    """A two-column table."""
    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
