"""Sinks of metrics beside metrics.jsonl, chosen by ``config.logs``: TensorBoard and Weights & Biases."""

import contextlib
import importlib.util
import logging
import os
import pathlib
import secrets
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from tensorboardX import event_file_writer, summary
from tensorboardX.proto import event_pb2

from dat_jax.errors import UserError

logger = logging.getLogger(__name__)
WANDB_ID = "wandb_id.txt"  # in the work directory: id of the Weights & Biases run that a resumed run continues
_PROJECT = "dat_jax"  # unless WANDB_PROJECT is set
_FINISH_SECONDS = 60.0


class Sink(Protocol):
    """Takes metrics. Methods raise an OSError if they cannot be written."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of a step, named with their prefixes."""

    def close(self) -> None:
        """Write what is pending and close."""


class TensorBoardSink:
    """Event files in ``directory``/tensorboard, flushed at each write."""

    def __init__(self, directory: pathlib.Path):
        (directory / "tensorboard").mkdir(exist_ok=True)
        # Not tensorboardX.SummaryWriter: its thread dies when the disk is full, and then every call blocks.
        self._events = event_file_writer.EventsWriter(str(directory / "tensorboard" / "events"))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """See ``Sink``."""
        for name, value in metrics.items():
            event = event_pb2.Event(step=step, wall_time=time.time(), summary=summary.scalar(name, value))  # pyright: ignore[reportAttributeAccessIssue] (made by protobuf at import)
            self._events.write_event(event)
        self._events.flush()

    def close(self) -> None:
        """See ``Sink``."""
        self._events.close()


class WandbSink:
    """A run of Weights & Biases with the name of the work directory. A resumed run continues the same one.

    A failure never ends the training run: it is logged once, and nothing more is sent. The step is logged as a metric,
    because wandb drops values of its own step counter that a resumed run repeats.

    Args:
      directory: the work directory, which also gets the run's id and wandb's files.
      config: configuration of the run.
      finish_seconds: longest time to wait for the last metrics to be sent.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        *,
        config: Mapping[str, Any],
        finish_seconds: float = _FINISH_SECONDS,
    ):
        import wandb  # pyright: ignore[reportMissingImports] (an optional dependency that is slow to import)

        self._run, self._finish_seconds = None, finish_seconds
        options = dict(project=os.environ.get("WANDB_PROJECT") or _PROJECT, name=directory.resolve().name)
        with self._disabled_on_failure():
            identifier = _read_id(directory / WANDB_ID)
            self._run = wandb.init(**options, id=identifier, resume="allow", dir=str(directory), config=dict(config))
            for group in ("train", "eval"):
                self._run.define_metric(f"{group}/*", step_metric="step")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """See ``Sink``."""
        if self._run is not None:
            with self._disabled_on_failure():
                self._run.log({"step": step, **metrics})

    def close(self) -> None:
        """Wait until everything was sent, at most ``finish_seconds``."""
        if self._run is None:
            return
        run, failed = self._run, []

        def finish():
            try:
                run.finish()
            except Exception as error:
                failed.append(error)

        thread = threading.Thread(target=finish, daemon=True)
        thread.start()
        thread.join(self._finish_seconds)
        if thread.is_alive() or failed:
            reason = _first_line(failed[0]) if failed else f"it took more than {self._finish_seconds:g} s"
            logger.warning(
                "Weights & Biases may lack the last metrics: %s. `wandb sync` sends those that are stored locally.",
                reason,
            )

    @contextlib.contextmanager
    def _disabled_on_failure(self):
        try:
            yield
        except Exception as error:  # its network and server fail in many ways
            self._run = None
            logger.warning(
                "Weights & Biases gets no more metrics of this run: %s. metrics.jsonl has all of them; "
                "WANDB_MODE=offline stores them for `wandb sync`.",
                _first_line(error),
            )


def check_sinks(names: Sequence[str]) -> None:
    """Raise a UserError if the package of a sink is not installed."""
    if "wandb" in names and "wandb" not in sys.modules and importlib.util.find_spec("wandb") is None:
        raise UserError(
            "config.logs contains wandb, which is not installed: run `pip install wandb`, or remove it from config.logs."
        )


def sink_factories(
    names: Sequence[str], directory: pathlib.Path, *, config: Mapping[str, Any]
) -> list[Callable[[], Sink]]:
    """Functions that make the sinks of ``config.logs``, for a ``MetricWriter``."""
    factories = {
        "tensorboard": lambda: TensorBoardSink(directory),
        "wandb": lambda: WandbSink(directory, config=config),
    }
    return [factories[name] for name in dict.fromkeys(names)]


def _read_id(path: pathlib.Path) -> str:
    """Read the id that an earlier call wrote, or write a new one."""
    if path.is_file() and (identifier := path.read_text().strip()):
        return identifier
    identifier = secrets.token_hex(8)
    path.write_text(identifier + "\n")
    return identifier


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
