"""How long a run will take, what limits it, and what to change: computed from what was measured."""

import dataclasses
import math

from dat_jax.training.monitoring.throughput import format_duration

_LARGE_SHARE = 0.2  # of the time of a run, for what is neither a step nor small


@dataclasses.dataclass(frozen=True)
class Measured:
    """Measurements of a check that the estimate of a run is computed from.

    Attributes:
      devices, processes: their numbers.
      batch_size: images of a step, over all devices.
      steps_left: steps until the end of the run.
      evaluations_left: evaluations until its end.
      steps_between_saves: steps from one checkpoint to the next, on average.
      step_seconds: a training step.
      compile_seconds: compilation of the step.
      evaluation_seconds: an evaluation of all validation images, without compilation.
      save_seconds: from the start of a save until the checkpoint is complete.
      input_rate: images per second that the slowest process loads.
      workers: ``config.data.workers``.
      cores: cores of the machine of this process.
    """

    devices: int
    processes: int
    batch_size: int
    steps_left: int
    evaluations_left: int
    steps_between_saves: float
    step_seconds: float
    compile_seconds: float
    evaluation_seconds: float
    save_seconds: float
    input_rate: float
    workers: int
    cores: int


@dataclasses.dataclass(frozen=True)
class Estimate:
    """An estimate for a run.

    Attributes:
      steps_per_second: with the input as it is.
      seconds: until the end of the run.
      device_hours: of all devices until the end of the run.
      limit: what limits the run, in words.
      advice: what to change, in sentences.
    """

    steps_per_second: float
    seconds: float
    device_hours: float
    limit: str
    advice: tuple[str, ...]

    def describe(self) -> dict[str, str]:
        """Rows of a table."""
        return {
            "steps/s": f"{self.steps_per_second:.4g}",
            "time to the end": f"{format_duration(self.seconds)} ({self.seconds / 3600:.3g} hours)",
            "device-hours": f"{self.device_hours:.3g}" if self.device_hours < 100 else f"{self.device_hours:,.0f}",
            "limited by": self.limit,
        }


def estimate_run(measured: Measured) -> Estimate:
    """Estimate a run.

    Steps and loading overlap, so that a step takes as long as the slower of both. Evaluations are added. Checkpoints are written
    while the training goes on, unless they take longer than the steps between them.
    """
    input_seconds = measured.batch_size / measured.processes / measured.input_rate
    save_seconds = measured.save_seconds / measured.steps_between_saves
    per_step = {"the devices": measured.step_seconds, "the input": input_seconds, "saving": save_seconds}
    slowest = max(per_step, key=lambda name: per_step[name])
    steps = measured.steps_left * per_step[slowest]
    evaluations = measured.evaluations_left * measured.evaluation_seconds
    total = measured.compile_seconds + steps + evaluations
    advice = []
    if input_seconds > measured.step_seconds:
        advice.append(_advise_input(measured))
    if save_seconds > max(measured.step_seconds, input_seconds):
        between = math.ceil(measured.save_seconds / max(measured.step_seconds, input_seconds))
        advice.append(
            f"A checkpoint takes {measured.save_seconds:.1f} s, longer than the {measured.steps_between_saves:.0f} steps from "
            f"one to the next: save every {between} steps or more rarely (config.checkpoint.every, config.eval.every)."
        )
    if evaluations > _LARGE_SHARE * total:
        advice.append(
            f"Evaluations take {100 * evaluations / total:.0f} % of the time: evaluate more rarely (config.eval.every or "
            "config.eval.every_steps; config.checkpoint.every saves in between)."
        )
    limit = "evaluations" if evaluations > steps else slowest
    return Estimate(
        steps_per_second=1 / per_step[slowest],
        seconds=total,
        device_hours=total / 3600 * measured.devices,
        limit=limit,
        advice=tuple(advice),
    )


def _advise_input(measured: Measured) -> str:
    needed = measured.batch_size / measured.processes / measured.step_seconds
    facts = (
        f"Each process loads {measured.input_rate:,.0f} images/s, and its devices could use {needed:,.0f}. It has "
        f"{measured.cores} cores and config.data.workers={measured.workers}."
    )
    if measured.workers >= measured.cores:
        return f"{facts} All cores are busy: use machines with more cores, or less augmentation."
    workers = min(
        measured.cores, max(measured.workers + 1, math.ceil(measured.workers * needed / measured.input_rate), 2)
    )
    workers = measured.cores if measured.workers == 0 else workers
    return f"{facts} Try --config.data.workers={workers}."
