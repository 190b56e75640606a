"""Where metrics go beside metrics.jsonl: TensorBoard's files, and Weights & Biases. ``config.logs`` chooses."""

import contextlib
import importlib.util
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

WANDB_ID = "wandb_id.txt"  # in the work directory: the run there that a resumed run goes on in
_PROJECT = "dat_jax"  # unless WANDB_PROJECT says another
_FINISH_SECONDS = 60.0


class Log(Protocol):
    """Takes metrics. An OSError says that they could not be written."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of a step, by their whole names."""

    def close(self) -> None:
        """The last call."""


class TensorBoardLog:
    """Files in ``directory``/tensorboard, flushed at each call."""

    def __init__(self, directory: pathlib.Path):
        (directory / "tensorboard").mkdir(exist_ok=True)
        # Not its SummaryWriter, whose thread dies of a full disk, upon which everything waits for it.
        self._events = event_file_writer.EventsWriter(str(directory / "tensorboard" / "events"))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """See ``Log``."""
        for name, value in metrics.items():
            event = event_pb2.Event(step=step, wall_time=time.time(), summary=summary.scalar(name, value))
            self._events.write_event(event)
        self._events.flush()

    def close(self) -> None:
        """See ``Log``."""
        self._events.close()


class WandbLog:
    """A run of Weights & Biases, named as the work directory, that a resumed run goes on in.

    Nothing that fails there ends the training run: it is said once, and nothing more is sent. Steps are logged as a value of
    their own, since those that a resumed run repeats would be dropped otherwise.

    Args:
      directory: the work directory; the run's id and wandb's own files are kept in it.
      config: of the run.
      note: is told what failed.
      finish_seconds: the longest that the last metrics are waited for.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        *,
        config: Mapping[str, Any],
        note: Callable[[str], None],
        finish_seconds: float = _FINISH_SECONDS,
    ):
        import wandb  # late: an extra, and it takes long

        self._note, self._run, self._finish_seconds = note, None, finish_seconds
        options = dict(project=os.environ.get("WANDB_PROJECT") or _PROJECT, name=directory.resolve().name)
        with self._given_up_on_failure():
            identifier = _read_id(directory / WANDB_ID)
            self._run = wandb.init(**options, id=identifier, resume="allow", dir=str(directory), config=dict(config))
            for group in ("train", "eval"):
                self._run.define_metric(f"{group}/*", step_metric="step")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """See ``Log``."""
        if self._run is not None:
            with self._given_up_on_failure():
                self._run.log({"step": step, **metrics})

    def close(self) -> None:
        """Waits until all was sent, but not for ever."""
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
            self._note(
                f"WARNING: Weights & Biases may lack the last metrics: {reason}. `wandb sync` sends what is kept."
            )

    @contextlib.contextmanager
    def _given_up_on_failure(self):
        try:
            yield
        except Exception as error:  # whatever its network and its server make of it
            self._run = None
            self._note(
                f"WARNING: Weights & Biases gets no more metrics of this run: {_first_line(error)}. metrics.jsonl has all; "
                "WANDB_MODE=offline keeps them for `wandb sync`."
            )


def check_logs(names: Sequence[str]) -> None:
    """UserError where one is not installed. It is said before a run starts."""
    if "wandb" in names and "wandb" not in sys.modules and importlib.util.find_spec("wandb") is None:
        raise UserError(
            "config.logs has wandb, which is not installed: `pip install wandb`, or take it out of config.logs."
        )


def choose_logs(
    names: Sequence[str], directory: pathlib.Path, *, config: Mapping[str, Any], note: Callable[[str], None]
) -> list[Callable[[], Log]]:
    """Functions that make the logs of ``config.logs``, for a ``MetricWriter``."""
    known = {
        "tensorboard": lambda: TensorBoardLog(directory),
        "wandb": lambda: WandbLog(directory, config=config, note=note),
    }
    return [known[name] for name in dict.fromkeys(names)]


def _read_id(path: pathlib.Path) -> str:
    """Of an earlier call, else a new one, which is kept."""
    if path.is_file() and (identifier := path.read_text().strip()):
        return identifier
    identifier = secrets.token_hex(8)
    path.write_text(identifier + "\n")
    return identifier


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
