"""The state that the parts of a check share, and the form of their results."""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from dat_jax.preflight.estimate import Measured
from dat_jax.storage import Path, as_path
from dat_jax.training.workdir import WorkDirectory


def count_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


Values = Sequence[Mapping[str, Any]]  # what each process has measured


@dataclasses.dataclass
class Outcome:
    """Result of one part of a check: values for a table, and problems.

    Attributes:
      rows: measured values, for a table.
      problems: what would end the run or spoil its results, in sentences.
    """

    rows: dict[str, str]
    problems: list[str] = dataclasses.field(default_factory=list)


class Session:
    """State that the parts of a check share, such as the model, a batch and the values that were measured so far.

    Args:
      config: configuration of the run.
      workdir: its work directory, to which nothing is written but ``scratch``.
      scratch: a work directory of the check's own, inside ``workdir``.
      seconds: for how long images are loaded.
      expected_devices: number of devices that the user expects, or None.
    """

    def __init__(
        self, config: ConfigDict, workdir: str, scratch: WorkDirectory, *, seconds: float, expected_devices: int | None
    ):
        self.config, self.workdir, self.scratch = config, as_path(workdir), scratch
        self.seconds, self.expected_devices = seconds, expected_devices
        self.values: dict[str, Values] = {}  # part -> what each process has measured
        self.cache: Path | None = None  # folder of compiled programs, once storage was checked
        self.trainer: Any = None  # a Trainer, once the data were read
        self.batch: Any = None  # a batch of this process, once images were loaded
        self.step: Any = None  # the compiled training step
        self.state: Any = None  # the state after some steps

    @property
    def steps_done(self) -> int:
        """Step of the newest checkpoint in the work directory, 0 without one."""
        return self.values["storage"][0]["steps_done"] if "storage" in self.values else 0

    def collect(self) -> Measured:
        """Collect the measurements for the estimate of the run, from the parts "storage", "input", "steps" and "checkpoint"."""
        plan, config, first = self.trainer.plan, self.trainer.config, {}
        for values in self.values.values():
            first |= values[0]
        total, done = plan.total_steps, self.steps_done
        evaluations = total // plan.eval_steps - done // plan.eval_steps + (total % plan.eval_steps > 0)
        saves_per_evaluation = math.ceil(plan.eval_steps / (config.checkpoint.every or plan.eval_steps))
        return Measured(
            devices=self.trainer.mesh.size,
            processes=jax.process_count(),
            batch_size=config.batch_size,
            steps_left=max(total - done, 0),
            evaluations_left=evaluations + 1,  # the last one is that of the best checkpoint
            steps_between_saves=plan.eval_steps / saves_per_evaluation,
            step_seconds=first["step_seconds"],
            compile_seconds=first["compile_seconds"],
            evaluation_seconds=first.get("evaluation_seconds", 0.0),
            save_seconds=first["save_seconds"],
            input_rate=min(values["input_rate"] for values in self.values["input"]),
            workers=config.data.workers,
            cores=count_cores(),
        )
