"""Metrics of a run: metrics.jsonl and further sinks."""

import contextlib
import json
import logging
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from dat_jax.training.monitoring.sinks import Sink, TensorBoardSink

logger = logging.getLogger(__name__)
METRICS = "metrics.jsonl"


class MetricWriter:
    """Appends metrics to metrics.jsonl and to further sinks. Use as a context manager, in one process.

    Lines that cannot be written are kept and written with a later line. The first failure is logged, and the run continues.

    Args:
      directory: where the files go.
      sinks: functions that make the further sinks; by default TensorBoard's. An OSError of theirs is handled as above.
    """

    def __init__(self, directory: pathlib.Path, *, sinks: Sequence[Callable[[], Sink]] | None = None):
        self._path, self._pending, self._warned = directory / METRICS, "", False
        if self._path.exists():  # a killed run may have left an unfinished last line
            os.truncate(self._path, self._path.read_bytes().rfind(b"\n") + 1)
        self._sinks = []
        for make in [lambda: TensorBoardSink(directory)] if sinks is None else sinks:
            with self._failures_logged():
                self._sinks.append(make())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._append("")
        for sink in self._sinks:
            with self._failures_logged():
                sink.close()

    def write(self, step: int, metrics: dict[str, float], *, prefix: str) -> None:
        """Append one line {"step": step, "<prefix>/loss": ..., ...}."""
        named = {f"{prefix}/{name}": value for name, value in metrics.items()}
        self._append(json.dumps({"step": step, **named}) + "\n")
        for sink in self._sinks:
            with self._failures_logged():
                sink.write(step, named)

    def _append(self, line):
        self._pending += line
        size = self._path.stat().st_size if self._path.exists() else 0
        with self._failures_logged():
            try:
                with self._path.open("a") as file:
                    file.write(self._pending)
                self._pending = ""
            except OSError:
                with contextlib.suppress(OSError):  # remove the part of a line that was written
                    os.truncate(self._path, size)
                raise

    @contextlib.contextmanager
    def _failures_logged(self):
        try:
            yield
        except OSError as error:
            if not self._warned:
                logger.warning(
                    "Metrics cannot be written in %s: %s. They are kept and written later.",
                    *(self._path.parent, error.strerror),
                )
            self._warned = True


class NullWriter:
    """Writes nothing, for all processes but the first."""

    def write(self, step: int, metrics: dict[str, float], *, prefix: str) -> None:
        """Do nothing."""


def read_records(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    """Read the lines of a metrics.jsonl in their order, {"step": step, "train/loss": loss, ...}; none if there is no such file.

    Invalid lines, such as a killed run may leave, are ignored.
    """
    if not path.exists():
        return
    for line in path.read_text(errors="replace").splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            yield record


def read_metrics(path: pathlib.Path) -> dict[str, dict[int, float]]:
    """Read a metrics.jsonl. Of a step that was repeated after a resume, the last line counts.

    Returns:
      {metric name: {step: value}}; {} if there is no such file.
    """
    series: dict[str, dict[int, float]] = {}
    for record in read_records(path):
        step = record.pop("step")
        for name, value in record.items():
            series.setdefault(name, {})[step] = value
    return series
