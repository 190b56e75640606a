"""The training loop, and the evaluation of a checkpoint."""

import contextlib
import dataclasses
import functools
import logging
import math
import pathlib
import time
from collections.abc import Callable

import jax
import numpy as np
from rich.console import Console

from dat_jax.checkpoints import compatibility
from dat_jax.checkpoints.class_names import CLASS_NAMES
from dat_jax.checkpoints.directory import find_complete_steps
from dat_jax.checkpoints.loading import check_exists
from dat_jax.checkpoints.manager import Checkpoints
from dat_jax.checkpoints.restore import initialize_state, restore_for_evaluation, restore_or_initialize
from dat_jax.cli.console import configure_logging, make_console, print_table
from dat_jax.errors import UserError
from dat_jax.parallel import multihost
from dat_jax.storage import exists
from dat_jax.training import report
from dat_jax.training.compilation import enable_cache
from dat_jax.training.implementations import choose_implementations
from dat_jax.training.memory_budget import choose_remat
from dat_jax.training.monitoring import sinks
from dat_jax.training.monitoring.hooks import Hook
from dat_jax.training.monitoring.input import ImageCounter, StallWarning
from dat_jax.training.monitoring.metrics import METRICS, MetricWriter, NullWriter, read_records
from dat_jax.training.monitoring.profiler import StepProfiler
from dat_jax.training.monitoring.spikes import SpikeReport
from dat_jax.training.monitoring.summary import SUMMARY, list_commands
from dat_jax.training.monitoring.throughput import Progress, Throughput, Usage, format_duration
from dat_jax.training.monitoring.time_shares import Clock, TimeShares, format_shares, name_metrics, read_earlier
from dat_jax.training.optimizers.clipping import global_norm
from dat_jax.training.preemption import Preemption
from dat_jax.training.state import TrainState, copy_state
from dat_jax.training.trainer import Trainer
from dat_jax.training.workdir import Uploads, WorkDirectory

logger = logging.getLogger(__name__)
_LOWER_RATE = "Lower config.schedule.base_lr, or lengthen the warm-up."


def train(
    config, workdir: str, *, quiet: bool = False, command_flags: str = "--config=FILE", started: float | None = None
) -> dict[str, float]:
    """Train as configured, or resume the run of the work directory.

    Writes to the work directory: checkpoints/, config.json, classes.txt, for detectors categories.json, metrics.jsonl, the
    sinks of ``config.logs``, results of each class, figures, summary.md and, if ``config.profile`` is set, profile/.

    Args:
      config: a configuration (ConfigDict), see dat_jax.config.
      workdir: the work directory; made if missing.
      quiet: print only warnings and the result.
      command_flags: command line flags of the configuration, for the printed commands that resume or evaluate the run.
      started: when the program started, by ``time.monotonic()``; the time since then belongs to the run. By default now.

    Returns:
      Evaluation metrics of the best checkpoint; {} if a signal ended the run before its last step.

    Raises:
      UserError: a mistake in the configuration or the work directory, too many steps in a row whose loss or gradient is not
        finite, or too many damaged images.
    """
    multihost.check_started()
    sinks.check_sinks(config.get("logs", ()))
    console = _configure_console(quiet)
    with WorkDirectory(workdir) as directory:
        return _train(config, directory, console=console, command_flags=command_flags, started=started)


def _train(
    config, directory: WorkDirectory, *, console: Console, command_flags: str, started: float | None
) -> dict[str, float]:
    """See ``train``."""
    start_time, clock = time.monotonic(), Clock(started=started)
    _check_initial_weights(config, directory)
    trainer = Trainer(config)
    trainer.check_train_batch()
    trainer.task.check_data()
    _ = trainer.teacher  # so that a teacher that does not fit ends the run before anything is written
    for sentence in trainer.plan.warnings:
        logger.warning(sentence)
    directory.open_for_writing()
    cache = enable_cache(trainer.config.compilation_cache)
    description = {
        **trainer.describe(),
        "work directory": str(directory),
        "compiled programs": "not kept" if cache is None else f"kept in {cache}",
    }
    print_table(console, "dat_jax", description)
    print_table(console, "Parameters", trainer.describe_groups())
    choose_implementations(trainer, "train", cache=cache)

    with _open_checkpoints(trainer, directory) as checkpoints:
        options = dict(abstract_state=trainer.abstract_state, **_state_options(trainer))
        state = restore_or_initialize(checkpoints, trainer.config, **options)
        if int(state.step):
            logger.info("Resumed at step %d of %d.", int(state.step), trainer.plan.total_steps)
        _add_earlier_calls(clock, directory.files, step=int(state.step))
        finished, ended_by = int(state.step) >= trainer.plan.total_steps, None
        if finished:
            unit = "steps" if trainer.config.steps else "epochs"
            logger.info("All %d %s are done; set --config.%s for more.", trainer.config[unit], unit, unit)
        else:
            with clock.measure("compilation"):
                trainer = choose_remat(trainer)
            state = copy_state(state)  # the only reference, so that its memory is free for the first step
            state, ended_by = _run_steps(trainer, state, checkpoints, directory, clock)
            with clock.measure("saving"):
                checkpoints.wait()

        step = int(state.step)
        clock.switch("other")
        save_summary = functools.partial(
            report.save_summary, trainer, directory, description=description, command_flags=command_flags, clock=clock
        )
        if ended_by is not None:
            command = next(iter(list_commands(str(directory), command_flags=command_flags).values()))
            _log_end(ended_by, step, checkpoints.latest_step(), directory, command)
            seconds = time.monotonic() - start_time
            save_summary(step=step, ended_by=ended_by, seconds=seconds)
            _log_time_shares(clock)
            report.append_time(clock, step, directory.files)
            return {}
        if checkpoints.latest_step() is not None:  # otherwise no checkpoint could be saved, which was logged
            del state  # free its memory for the best one
            state = _restore_best(trainer, checkpoints)
    with clock.measure("evaluation"):
        evaluation = trainer.evaluate_state(state)
    report.save_class_results(trainer, evaluation, directory.files)
    report.save_figures(trainer, state, directory.files)
    report.save_adapter(trainer, state, directory.files)
    if not finished or not (directory.files / SUMMARY).exists():  # an existing summary has the duration of the training
        seconds = time.monotonic() - start_time
        save_summary(step=trainer.plan.total_steps, ended_by=None, seconds=seconds)
        _log_time_shares(clock)
        report.append_time(clock, trainer.plan.total_steps, directory.files)
    report.print_result(
        console,
        evaluation,
        class_names=trainer.task.class_names,
        weights=f"step {int(state.step)} in {checkpoints.directory}",
    )
    return evaluation.metrics


def evaluate(config, workdir: str, *, quiet: bool = False) -> dict[str, float]:
    """Evaluate a checkpoint of a work directory, and write the results of each class there.

    ``config.eval.checkpoint`` selects the best or the latest one. Without checkpoints, the weights that
    ``config.init_from`` names are evaluated. Besides the validation data, every set of ``config.eval.sets`` is evaluated.

    Args:
      config, workdir, quiet: as in ``train``.

    Returns:
      Evaluation metrics; those of further sets are named "set/metric".

    Raises:
      UserError: there is no checkpoint, or it is of another model or of other classes.
    """
    multihost.check_started()
    console = _configure_console(quiet)
    with WorkDirectory(workdir) as directory:
        return _evaluate(config, directory, console=console)


def _evaluate(config, directory: WorkDirectory, *, console: Console) -> dict[str, float]:
    """See ``evaluate``."""
    trainer, state, weights = _prepare_evaluation(config, directory, same_classes=True)
    evaluation = trainer.evaluate_state(state)
    report.save_class_results(trainer, evaluation, directory.files)
    metrics = dict(evaluation.metrics)
    for name, (source, classes) in trainer.extra_eval_sets.items():
        extra = trainer.evaluate(state.eval_variables, source=source, classes=classes)
        report.save_class_results(trainer, extra, directory.files, name=name)
        metrics |= {f"{name}/{metric}": value for metric, value in extra.metrics.items()}
    evaluation = dataclasses.replace(evaluation, metrics=metrics)
    report.print_result(console, evaluation, class_names=trainer.task.class_names, weights=weights)
    return metrics


def evaluate_neighbors(config, workdir: str, *, quiet: bool = False) -> dict[str, float]:
    """Evaluate the frozen features of a checkpoint by nearest neighbors, see ``Trainer.evaluate_neighbors``.

    The weights are those that ``evaluate`` uses, but those of ``config.init_from`` may have been trained on other classes.

    Args:
      config, workdir, quiet: as in ``train``.

    Returns:
      {"knn_top1", "knn_top5": percent, "examples": number of validation images}.

    Raises:
      UserError: there is no checkpoint, it is of another model, or the task is not classification.
    """
    multihost.check_started()
    console = _configure_console(quiet)
    with WorkDirectory(workdir) as directory:
        trainer, state, weights = _prepare_evaluation(config, directory, same_classes=False)
        evaluation = trainer.evaluate_neighbors(state.eval_variables)
        report.print_result(console, evaluation, class_names=trainer.task.class_names, weights=weights)
        return evaluation.metrics


def _prepare_evaluation(config, directory: WorkDirectory, *, same_classes: bool) -> tuple[Trainer, TrainState, str]:
    """The run of a configuration, the state with the weights to evaluate, and where they are from."""
    _check_initial_weights(config, directory)
    trainer = Trainer(config)
    cache = enable_cache(trainer.config.compilation_cache)
    state, weights = _restore_weights(trainer, directory, same_classes=same_classes)
    choose_implementations(trainer, "eval", cache=cache)
    return trainer, state, weights


def _restore_weights(trainer: Trainer, directory: WorkDirectory, *, same_classes: bool) -> tuple[TrainState, str]:
    """The state with the weights to evaluate, and where they are from."""
    config = trainer.config
    directory.open_for_reading()
    if _has_checkpoints(directory):
        with _open_checkpoints(trainer, directory, read_only=True) as checkpoints:
            options = dict(class_names=trainer.task.class_names, abstract_state=trainer.abstract_state)
            state, step = restore_for_evaluation(checkpoints, config, **options)
            return state, f"step {step} in {checkpoints.directory}"
    if config.init_from:
        state = initialize_state(config, **_state_options(trainer), same_classes=same_classes)
        state = dataclasses.replace(state, further_averages=None)  # of nothing: no step was done
        return state, config.init_from
    raise UserError(
        f"There are no checkpoints in {directory}. Train first, name another --workdir, or name weights with "
        "--config.init_from."
    )


def _has_checkpoints(directory: WorkDirectory) -> bool:
    try:
        return exists(directory.checkpoints)
    except OSError as error:
        raise UserError(f"{directory} cannot be read: {error.strerror}.") from error


def _check_initial_weights(config, directory: WorkDirectory) -> None:
    """Check, before the model is built, that the weights of ``config.init_from`` exist, if the run starts from them."""
    if not config.get("init_from"):
        return
    try:
        resumes = bool(find_complete_steps(directory.checkpoints))
    except OSError as error:
        raise UserError(f"{directory} cannot be read: {error.strerror}.") from error
    if not resumes:
        try:
            check_exists(config.init_from)
        except UserError as error:
            raise UserError(
                f"config.init_from: {error} To train from scratch, set --config.init_from= to nothing."
            ) from None


def _run_steps(
    trainer: Trainer, state: TrainState, checkpoints: Checkpoints, directory: WorkDirectory, clock: Clock
) -> tuple[TrainState, str | None]:
    """Run the remaining steps. Returns the state, and the name of the signal that ended the run early, if any."""
    config, start = trainer.config, int(state.step)
    hooks, throughput = _make_hooks(trainer, directory, clock, start_step=start)
    save = functools.partial(_save, trainer, checkpoints=checkpoints, clock=clock)
    pending = []  # metrics of the steps since the last log line, still on the devices
    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(_make_writer(trainer, directory.files, resumed=start > 0))
        preemption = stack.enter_context(Preemption(trainer.mesh))
        train_batches = trainer.train_batches(start_step=start)
        batches = stack.enter_context(contextlib.closing(train_batches))  # pyright: ignore[reportArgumentType] (a generator)
        for hook in hooks:
            stack.callback(hook.close)
        logger.info("Compiling the training step; the first numbers follow.")
        for step in range(start + 1, trainer.plan.total_steps + 1):
            for hook in hooks:
                hook.before_batch(step)
            batch = next(batches)
            for hook in hooks:
                hook.on_batch(step, batch)
            batch = trainer.put_batch(batch)
            if step == start + 1:
                trainer.compile_train_step(state, batch)
            state, metrics = trainer.train_step(state, batch)
            for hook in hooks:
                hook.after_step(step, metrics)
            pending.append(metrics)

            last = step == trainer.plan.total_steps
            stop = preemption.should_stop()  # called in every step, by every process
            evaluation_due = step % trainer.plan.eval_steps == 0 or last
            if step % config.log_every == 0 or evaluation_due or stop:
                values, pending = jax.device_get(pending), []
                clock.switch("other")
                measured = {}
                for hook in hooks:
                    measured |= hook.on_log(step, values)
                _check_skipped_steps(trainer, state, values, checkpoints, save)
                summary = _summarize(values)
                writer.write(step, {**summary, **measured}, prefix="train")
                _log_step(trainer, step, summary, throughput)
            if stop and not last:
                save(state)
                writer.write(step, name_metrics(clock.read()), prefix="time")
                return state, preemption.signal_name
            checkpoint_due = config.checkpoint.every and step % config.checkpoint.every == 0
            if evaluation_due or checkpoint_due:
                directory.check_owner()
            if evaluation_due:
                try:
                    with clock.measure("evaluation"):
                        metrics = trainer.evaluate_state(state).metrics
                except Exception:  # such as images that cannot be read: the steps since the last checkpoint are kept
                    save(state)
                    raise
                _check_finite_evaluation(metrics, state, checkpoints)  # before anything is saved
                writer.write(step, metrics, prefix="eval")
                save(state, metrics={trainer.task.metric: metrics[trainer.task.metric]})
                logger.info("  evaluation: %s", report.format_metrics(metrics))
                for hook in hooks:
                    hook.after_evaluation(step)
            elif checkpoint_due:
                save(state)
            if not pending:  # metrics were logged
                writer.write(step, name_metrics(clock.read()), prefix="time")
    return state, None


def _make_hooks(
    trainer: Trainer, directory: WorkDirectory, clock: Clock, *, start_step: int
) -> tuple[list[Hook], Throughput]:
    """Monitoring of the run, and of it the hook that measures throughput."""
    config, task, total_steps = trainer.config, trainer.task, trainer.plan.total_steps

    def make_progress(step):
        return Progress(start_step=step, total_steps=total_steps, batch_size=config.batch_size)

    sizes_vary = bool(config.data.get("train_sizes"))  # then the work of a step does, too
    count_flops = None if sizes_vary else trainer.count_model_flops
    usage = Usage(trainer.mesh.devices.ravel().tolist(), count_flops=count_flops)
    throughput = Throughput(make_progress, usage)
    spikes = directory.files / "loss_spikes.jsonl"
    hooks = [
        TimeShares(clock, workers=config.data.workers),
        StallWarning(config.data.stall_seconds),
        throughput,
        ImageCounter(
            config.data.max_damaged,
            count=len(task.train_source),
            example_indices=trainer.local_example_indices,
            describe=functools.partial(task.describe_damage, task.train_source),
        ),
        SpikeReport(spikes, task.example_indices, factor=config.spike_factor),
        StepProfiler(directory.files / "profile", steps=config.profile, start_step=start_step, total_steps=total_steps),
        Uploads(directory),
    ]
    return hooks, throughput


def _save(trainer: Trainer, state: TrainState, *, checkpoints: Checkpoints, clock: Clock, metrics=None) -> None:
    """Save the state, unless its last steps were skipped: it would replace an older checkpoint that can be resumed."""
    if skipped := int(state.skipped_in_a_row):
        logger.warning("Step %d is not saved: it is one of %d skipped steps in a row.", int(state.step), skipped)
        return
    metadata = compatibility.describe(trainer.config, step=int(state.step), class_names=trainer.task.class_names)
    with clock.measure("saving"):
        checkpoints.save(state, metadata=metadata, metrics=metrics)


def _check_skipped_steps(
    trainer: Trainer,
    state: TrainState,
    values: list[dict],
    checkpoints: Checkpoints,
    save: Callable[[TrainState], None],
) -> None:
    """End the run if too many steps in a row were skipped, with the state before them saved.

    Raises:
      UserError: ``config.max_skipped_steps`` is reached.
    """
    in_a_row = max(int(metrics["skipped_in_a_row"]) for metrics in values)
    if in_a_row < trainer.config.max_skipped_steps:
        return
    count = int(state.skipped_in_a_row)
    step = int(state.step) - count
    message = f"The loss or the gradient of {in_a_row} steps in a row was not a finite number"
    if count:  # the skipped steps are the last ones, so the state is that before them
        before = dataclasses.replace(
            state, step=state.step - count, skipped=state.skipped - count, skipped_in_a_row=state.skipped_in_a_row * 0
        )
        if step not in checkpoints.steps() and step > 0:
            save(before)
            checkpoints.wait()
        message += f", from step {step + 1} on. The checkpoint of step {step} has the state before them"
    raise UserError(f"{message}. {_LOWER_RATE}")


def _check_finite_evaluation(metrics: dict[str, float], state: TrainState, checkpoints: Checkpoints) -> None:
    """End the run if the weights are not finite: the losses so far were those of earlier weights.

    Raises:
      UserError: the evaluation's loss or, for tasks whose evaluation has none, the norm of the weights is not finite.
    """
    if "loss" in metrics:
        name, value = "evaluation's loss", metrics["loss"]
    else:
        name, value = "weights' norm", jax.jit(global_norm)(state.eval_variables["params"])
    if not math.isfinite(value):
        step = checkpoints.latest_step()
        kept = "nothing was saved yet" if step is None else f"the checkpoint of step {step} is untouched"
        raise UserError(f"The {name} became {float(value)} at step {int(state.step)}; {kept}. {_LOWER_RATE}")


def _summarize(values: list[dict]) -> dict[str, float]:
    """Mean metrics over the steps that were not skipped, the last learning rate, and the number of skipped steps."""
    applied = [metrics for metrics in values if not metrics["skipped_in_a_row"]]
    names = [name for name in values[0] if name not in ("skipped", "skipped_in_a_row")]
    summary = {name: float(np.mean([metrics[name] for metrics in applied])) for name in names if applied}
    summary["learning_rate"] = float(values[-1]["learning_rate"])
    if values[-1]["skipped"]:
        summary["skipped"] = int(values[-1]["skipped"])
    return summary


def _log_step(trainer: Trainer, step: int, summary: dict[str, float], throughput: Throughput) -> None:
    logger.info(
        "step %d/%d  epoch %.2f  %s%s",
        *(step, trainer.plan.total_steps, step / trainer.plan.steps_per_epoch, report.format_metrics(summary)),
        throughput.describe_pace(),
    )


def _log_end(signal: str, step: int, saved: int | None, directory: WorkDirectory, command: str) -> None:
    """Log what a run that a signal ended has saved, and the command that resumes it."""
    place = "Nothing is saved" if saved is None else f"Saved in {directory.checkpoints / str(saved)}"
    logger.warning("Ended by %s at step %d. %s. To resume, run the same command: %s", signal, step, place, command)


def _add_earlier_calls(clock: Clock, files: pathlib.Path, *, step: int) -> None:
    """Add the time of the earlier calls of a run that was resumed at a step."""
    records = list(read_records(files / METRICS))
    earlier = read_earlier(records, step=step)
    clock.add(earlier)
    if earlier.get("lost"):
        repeated = f"Step {step + 1} and later ones are repeated, of which {records[-1]['step'] - step} were logged."
        logger.info("%s Lost to restarts so far: %s.", repeated, format_duration(earlier["lost"]))


def _log_time_shares(clock: Clock) -> None:
    seconds = clock.read()
    logger.info("Time of all calls: %s; %s.", format_duration(sum(seconds.values())), format_shares(seconds))


def _restore_best(trainer: Trainer, checkpoints: Checkpoints) -> TrainState:
    restored = checkpoints.restore_newest(trainer.abstract_state, first=checkpoints.best_step())
    if restored is None:
        raise UserError(f"All checkpoints in {checkpoints.directory} are damaged.")
    return restored[0]


def _state_options(trainer: Trainer) -> dict:
    return dict(
        class_names=trainer.task.class_names,
        initialize=trainer.initialize,
        initialize_from=trainer.initialize_from,
    )


def _open_checkpoints(trainer: Trainer, directory: WorkDirectory, *, read_only: bool = False) -> Checkpoints:
    keep = trainer.config.checkpoint.keep
    return Checkpoints(directory.checkpoints, metric=trainer.task.metric, keep=keep, read_only=read_only)


def _configure_console(quiet: bool):
    """The first process prints and logs; the others do not."""
    first = jax.process_index() == 0
    configure_logging(quiet=quiet, enabled=first)
    return make_console(quiet=quiet or not first)


def _make_writer(trainer: Trainer, files: pathlib.Path, *, resumed: bool):
    """The first process writes the configuration, the class names and the metrics; the others write nothing."""
    if jax.process_index() > 0:
        return contextlib.nullcontext(NullWriter())
    report.write_config(trainer, files)
    if not resumed or not (files / CLASS_NAMES).exists():
        report.write_class_names(trainer, files / CLASS_NAMES)
    config = trainer.config
    return MetricWriter(files, sinks=sinks.sink_factories(config.logs, files, config=config.to_dict()))
