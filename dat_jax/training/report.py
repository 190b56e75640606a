"""Reports of a run: figures, summary.md and the table of results."""

import logging
import pathlib
from collections.abc import Mapping, Sequence

import jax
from flax.traverse_util import flatten_dict
from rich.console import Console

from dat_jax.checkpoints import adapters
from dat_jax.cli.console import make_console, print_table
from dat_jax.errors import UserError
from dat_jax.evaluation import results
from dat_jax.evaluation.results import Evaluation
from dat_jax.storage import atomic_write_text
from dat_jax.training.monitoring import summary as summary_lib
from dat_jax.training.monitoring.metrics import METRICS, MetricWriter, read_metrics
from dat_jax.training.monitoring.time_shares import Clock, name_metrics
from dat_jax.training.state import TrainState
from dat_jax.training.trainer import Trainer
from dat_jax.training.workdir import WorkDirectory
from dat_jax.visualization import charts

logger = logging.getLogger(__name__)


def save_figures(trainer: Trainer, state: TrainState, workdir: pathlib.Path) -> None:
    """Save learning curves, by the first process, and the task's figures. A failure to write is logged as a warning."""
    try:
        if jax.process_index() == 0:
            charts.save_curves(workdir / "curves.png", read_metrics(workdir / METRICS))
        if jax.process_count() == 1:  # with several processes, none has all of the weights
            trainer.task.save_figures(trainer.objective.predict, jax.device_get(state.eval_variables), workdir)
    except OSError as error:
        logger.warning("The figures could not be saved in %s: %s.", workdir, error.strerror)


def save_adapter(trainer: Trainer, state: TrainState, workdir: pathlib.Path) -> None:
    """Save what a run with adapters has learned, by the first process. A failure to write is logged as a warning."""
    keys = trainer.config.lora
    if not keys.rank:
        return
    variables = trainer.get_learned_variables(state)
    base = adapters.describe_base(state.params, flatten_dict(variables["params"], sep="."))
    if jax.process_index() > 0:
        return
    try:
        adapters.save_adapter(
            workdir / adapters.FILE_NAME, variables=variables, alpha=keys.alpha, rank=keys.rank, base=base
        )
    except UserError as error:
        logger.warning("The adapters could not be saved: %s", error)


def save_summary(
    trainer: Trainer,
    directory: WorkDirectory,
    *,
    step: int,
    ended_by: str | None,
    seconds: float,
    clock: Clock,
    description: Mapping[str, str],
    command_flags: str,
) -> None:
    """Save summary.md, by the first process. A failure to write is logged as a warning.

    Args:
      trainer: the run.
      directory: the work directory.
      step: number of finished steps.
      ended_by: name of the signal that ended the run before its last step, or None.
      seconds: duration of this call.
      clock: where the time of the run went.
      description: rows of the table at the start of the run.
      command_flags: command line flags of the configuration.
    """
    if jax.process_index() > 0:
        return
    workdir = directory.files
    text = summary_lib.format_summary(
        name=workdir.resolve().name,
        description={"configuration": command_flags, **description},
        step=step,
        total_steps=trainer.plan.total_steps,
        steps_per_epoch=trainer.plan.steps_per_epoch,
        ended_by=ended_by,
        series=read_metrics(workdir / METRICS),
        metric=trainer.task.metric,
        seconds=seconds,
        activities=clock.read(),
        figures=summary_lib.find_figures(workdir),
        commands=summary_lib.list_commands(str(directory), command_flags=command_flags),
    )
    try:
        summary_lib.write_summary(workdir, text)
    except OSError as error:
        logger.warning("The summary could not be written in %s: %s.", directory, error.strerror)


def append_time(clock: Clock, step: int, workdir: pathlib.Path) -> None:
    """Append where the time of the run went to metrics.jsonl, by the first process."""
    if jax.process_index() == 0:
        with MetricWriter(workdir, sinks=[]) as writer:
            writer.write(step, name_metrics(clock.read()), prefix="time")


def save_class_results(trainer: Trainer, evaluation: Evaluation, workdir: pathlib.Path, *, name: str = "") -> None:
    """Save the results of each class, by the first process. A failure to write is logged as a warning.

    Args:
      trainer: the run.
      evaluation: the result of ``Trainer.evaluate``.
      workdir: the work directory.
      name: name of the data set; "" for the validation data.
    """
    if jax.process_index() > 0:
        return
    try:
        results.save_class_results(evaluation, class_names=trainer.task.class_names, directory=workdir, name=name)
    except OSError as error:
        logger.warning("The results of each class could not be saved in %s: %s.", workdir, error.strerror)


def print_result(console: Console, evaluation: Evaluation, *, class_names: Sequence[str], weights: str) -> None:
    """Print the metrics of an evaluation, in one line if the console is quiet, by the first process.

    Args:
      console: the console of the run.
      evaluation: the result of ``Trainer.evaluate``.
      class_names: names of the classes, of which the worst three are printed.
      weights: which weights were evaluated.
    """
    metrics = evaluation.metrics
    rows = {name: f"{value:,}" if isinstance(value, int) else f"{value:.4g}" for name, value in metrics.items()}
    if console.quiet:
        line = "  ".join([*(" ".join(row) for row in rows.items()), weights])
        make_console(quiet=jax.process_index() > 0).print(line)
    else:
        worst = results.describe_worst_classes(evaluation, class_names=class_names)
        print_table(console, "Result", {**rows, **({"lowest classes": worst} if worst else {}), "weights": weights})


def format_metrics(metrics: Mapping[str, float]) -> str:
    """Format as "loss 0.1234  top1 98.7 ...", in the order of the metrics."""
    return "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())


def write_config(trainer: Trainer, workdir: pathlib.Path) -> None:
    """Write config.json and the files of ``Task.description_files``. A failure to write is logged as a warning."""
    _write_text(workdir / "config.json", trainer.config.to_json_best_effort(indent=2) + "\n")
    for name, text in trainer.task.description_files().items():
        _write_text(workdir / name, text)


def write_class_names(trainer: Trainer, path: pathlib.Path) -> None:
    """Write the names of the classes, one per line. A failure to write is logged as a warning."""
    _write_text(path, "".join(f"{name}\n" for name in trainer.task.class_names))


def _write_text(path: pathlib.Path, text: str) -> None:
    try:
        atomic_write_text(path, text)
    except OSError as error:
        logger.warning("%s could not be written: %s.", path, error.strerror)
