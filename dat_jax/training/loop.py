"""The training loop and the evaluation of a checkpoint, for any task."""

import contextlib
import math
import pathlib
import time
from collections.abc import Callable, Mapping

import jax
import numpy as np
from ml_collections import ConfigDict
from rich.console import Console

from dat_jax.checkpoints import compatibility
from dat_jax.checkpoints.class_names import CLASS_NAMES
from dat_jax.checkpoints.manager import Checkpoints
from dat_jax.cli.console import configure_logging, make_console, print_table
from dat_jax.errors import UserError
from dat_jax.parallel import multihost as distributed
from dat_jax.parallel import sharding
from dat_jax.storage import atomic_write_text, check_writable
from dat_jax.training import compilation_cache
from dat_jax.training.monitoring import health, logs
from dat_jax.training.monitoring import metrics as metrics_lib
from dat_jax.training.monitoring import summary as summary_lib
from dat_jax.training.monitoring.profiler import StepProfiler
from dat_jax.training.optimizer import global_norm
from dat_jax.training.preemption import Preemption
from dat_jax.training.run import (
    Run,
    check_train_batch,
    count_model_flops,
    describe,
    eval_batches,
    make_jitted_step,
    make_run,
    save_pictures,
    start_state,
    train_batches,
)
from dat_jax.training.state import TrainState, own_memory
from dat_jax.visualization import charts as plots


def train(
    config: ConfigDict, workdir: str, *, quiet: bool = False, command_flags: str = "--config=FILE"
) -> dict[str, float]:
    """Trains as configured, or goes on where the work directory left off.

    Leaves in the work directory: checkpoints/, config.json, classes.txt, metrics.jsonl, what ``config.logs`` names, pictures,
    summary.md, and profile/ where ``config.profile`` asks for one.

    Args:
      config: see configs/common.py.
      workdir: made if missing.
      quiet: prints warnings and the result only.
      command_flags: that say the configuration on a command line, for what is printed of how to go on.

    Returns:
      Evaluation metrics of the best checkpoint; {} if a signal ended the run before its last step.

    Raises:
      UserError: a mistake in the configuration or the work directory, too many steps in a row whose loss or gradient is not
        a finite number, or too many images that cannot be read.
    """
    distributed.check_started()
    configure_logging(quiet=quiet, enabled=jax.process_index() == 0)
    logs.check_logs(config.get("logs", ()))
    run, console, warn = make_run(config), _console(quiet), _console().print
    began = time.monotonic()
    check_train_batch(run)
    directory = _make_directory(workdir)
    kept = compilation_cache.enable(config.compilation_cache, note=warn)
    places = {"work directory": str(directory), "compiled programs": "not kept" if kept is None else f"kept in {kept}"}
    print_table(console, "dat_jax", {**describe(run), **places})
    options = dict(metric=run.metric, keep=config.checkpoint.keep)

    def summarize(step, ended=None):
        how = {"ended": ended, "seconds": time.monotonic() - began, "command_flags": command_flags}
        _write_summary(run, directory, step, described={**describe(run), **places}, note=warn, **how)

    with Checkpoints(directory / "checkpoints", **options) as checkpoints:
        # A checkpoint in the work directory is gone on from; otherwise the run starts from the weights that
        # config.init_from names; otherwise from scratch.
        found = checkpoints.restore_newest(run.abstract_state)
        if found is None:
            state = start_state(run, note=console.print)
        else:
            state, metadata = found
            del found  # which would keep the state's memory beside that of its copy
            compatibility.check(metadata, run.config, classes=len(run.train_source.class_names))
            console.print(f"Resumed at step {int(state.step)} of {run.total_steps}.")
        ended, done = None, int(state.step) >= run.total_steps
        if done:
            name = "steps" if config.steps else "epochs"
            console.print(f"All {config[name]} {name} are done; set --config.{name} for more.")
        else:
            state = own_memory(state)
            with (
                _make_writer(run, directory, warn) as writer,
                _make_profiler(run, state, directory, console) as profiler,
                Preemption(run.mesh, note=warn) as preemption,
            ):
                state, ended = _train_steps(
                    run, state, checkpoints, writer, profiler, preemption, directory, console, warn
                )
        if ended is not None:
            checkpoints.wait()
            step = int(state.step)
            commands = summary_lib.list_commands(config.task, workdir, command_flags=command_flags)
            warn(_say_ended(ended, step, checkpoints.latest_step(), directory, next(iter(commands.values()))))
            summarize(step, ended)
            return {}
        if checkpoints.latest_step() is not None:  # else nothing could be saved, which was said
            del state  # its memory is for the best one
            found = checkpoints.restore_newest(run.abstract_state, first=checkpoints.best_step())
            if found is None:
                raise UserError(f"No checkpoint is left in {directory / 'checkpoints'}: all were damaged.")
            state, _ = found
    result = run.evaluate(state.eval_variables, eval_batches(run))
    try:
        if jax.process_index() == 0:
            plots.save_curves(directory / "curves.png", metrics_lib.read_metrics(directory / "metrics.jsonl"))
        save_pictures(run, state, directory)
    except OSError as error:
        warn(f"WARNING: the pictures could not be saved in {directory}: {error.strerror}.")
    if not done or not (directory / summary_lib.SUMMARY).exists():  # else it says how long the run took
        summarize(run.total_steps)
    _print_result(console, warn, result, f"step {int(state.step)} in {directory / 'checkpoints'}")
    return result


def evaluate(config: ConfigDict, workdir: str, *, quiet: bool = False) -> dict[str, float]:
    """Evaluates a checkpoint of a work directory, or the weights that ``config.init_from`` names where it has none.

    ``config.eval.checkpoint`` chooses the best or the latest. Beside the validation images every set of
    ``config.eval.sets`` is evaluated.

    Returns:
      Evaluation metrics, those of the sets under "set/metric". The work directory is only read.

    Raises:
      UserError: no checkpoint, or one of another model.
    """
    distributed.check_started()
    configure_logging(quiet=quiet, enabled=jax.process_index() == 0)
    run, console, directory = make_run(config), _console(quiet), pathlib.Path(workdir)
    warn = _console().print
    compilation_cache.enable(config.compilation_cache, note=warn)
    if (directory / "checkpoints").is_dir():
        with Checkpoints(directory / "checkpoints", metric=run.metric, read_only=True) as checkpoints:
            best = config.eval.checkpoint == "best"
            step = checkpoints.best_step() if best else checkpoints.latest_step()
            if step is None:
                raise UserError(f"There is no complete checkpoint in {directory / 'checkpoints'}.")
            state, metadata = checkpoints.restore(step, run.abstract_state)
            compatibility.check_model(metadata, run.config, classes=len(run.train_source.class_names))
            origin = f"step {step} in {directory / 'checkpoints'}"
    elif config.init_from:
        state, origin = start_state(run, note=console.print), config.init_from
    else:
        raise UserError(
            f"There are no checkpoints in {directory}; train first, name another --workdir, or weights with "
            "--config.init_from."
        )
    result = run.evaluate(state.eval_variables, eval_batches(run))
    for name, (source, classes) in run.eval_sets.items():
        metrics = run.evaluate(state.eval_variables, eval_batches(run, source), classes=classes)
        result |= {f"{name}/{metric}": value for metric, value in metrics.items()}
    _print_result(console, warn, result, origin)
    return result


def _train_steps(
    run: Run,
    state: TrainState,
    checkpoints: Checkpoints,
    writer,
    profiler: StepProfiler,
    preemption: Preemption,
    directory: pathlib.Path,
    console: Console,
    warn: Callable[[str], None],
) -> tuple[TrainState, str | None]:
    """The loop itself. Returns the state, and the signal that ended it, if one did."""
    config, start = run.config, int(state.step)
    train_step = make_jitted_step(run)
    batches = health.watch(train_batches(run, start_step=start), seconds=config.data.stall_seconds, note=warn)
    images = health.ImageCounter(config.data.max_damaged, note=warn)
    spikes = health.SpikeReport(directory / "loss_spikes.jsonl", run, factor=config.spike_factor, note=warn)
    usage = metrics_lib.Usage(run.mesh.devices.ravel(), count_flops=lambda: count_model_flops(run))
    progress = None
    pending = []  # metrics of the steps since the last line, still on the devices

    def save(step, metrics=None):
        if int(state.skipped_in_a_row):  # it would take the place of the last one that goes on
            warn(f"  not saved: step {step} is one of {int(state.skipped_in_a_row)} in a row that were skipped")
        else:
            checkpoints.save(state, metadata=_describe_state(run, step), metrics=metrics)

    for step in range(start + 1, run.total_steps + 1):
        batch = next(batches)
        images.count(batch)
        profiler.before(step)
        state, metrics = train_step(state, sharding.put_batch(batch, run.mesh))
        profiler.after(step, metrics)
        pending.append(metrics)
        if progress is None:  # compiling is not counted into the rate
            jax.block_until_ready(metrics)
            progress = metrics_lib.Progress(start_step=step, total_steps=run.total_steps, batch_size=config.batch_size)
        stop = preemption.should_stop()
        due = step % run.eval_steps == 0 or step == run.total_steps
        if step % config.log_every == 0 or due or stop:
            values, pending = jax.device_get(pending), []
            spikes.report(step, values)
            _check_skipped(run, state, values, checkpoints)
            summary = _summarize(values)
            rate, seconds_left = progress.update(step)
            measured = {"images_per_second": rate, **usage.measure(rate), **images.summary()}
            writer.write(step, {**summary, **measured}, prefix="train")
            console.print(
                f"step {step}/{run.total_steps}  epoch {step / run.steps_per_epoch:.2f}  {_format(summary)}  "
                f"{rate:.0f} images/s  {metrics_lib.format_duration(seconds_left)} left"
            )
        if stop and not (due and step == run.total_steps):
            save(step)
            return state, preemption.signal_name
        if due:
            result = run.evaluate(state.eval_variables, eval_batches(run))
            # The losses before this were of earlier weights; these are what would be saved. No loss is evaluated of detectors.
            known = "loss" in result
            value = result["loss"] if known else jax.jit(global_norm)(state.eval_variables["params"])
            _check_finite(value, "evaluation's loss" if known else "weights' norm", step, checkpoints)
            writer.write(step, result, prefix="eval")
            save(step, {run.metric: result[run.metric]})
            console.print(f"  evaluation: {_format(result)}")
            progress.skip()
        elif config.checkpoint.every and step % config.checkpoint.every == 0:
            save(step)
    return state, None


def _check_skipped(run: Run, state: TrainState, values: list[dict], checkpoints: Checkpoints) -> None:
    """Ends the run, with the state before them saved, where as many steps in a row as are allowed were skipped.

    Raises:
      UserError: says so.
    """
    in_a_row, limit = max(int(metrics["skipped_in_a_row"]) for metrics in values), run.config.max_skipped_steps
    if in_a_row < limit:
        return
    count = int(state.skipped_in_a_row)
    step = int(state.step) - count
    message = f"The loss or the gradient of {in_a_row} steps in a row was not a finite number"
    if count:  # they are the last ones, and left the state as it was before them
        before = state.replace(
            step=state.step - count, skipped=state.skipped - count, skipped_in_a_row=state.skipped_in_a_row * 0
        )
        if step not in checkpoints.steps() and step > 0:
            checkpoints.save(before, metadata=_describe_state(run, step))
            checkpoints.wait()
        message += f", from step {step + 1} on. The checkpoint of step {step} has the state before them"
    raise UserError(f"{message}. Lower config.schedule.base_lr, or lengthen the warm-up.")


def _describe_state(run: Run, step: int) -> dict:
    return compatibility.describe(run.config, step=step, classes=len(run.train_source.class_names))


def _summarize(values: list[dict]) -> dict[str, float]:
    """Means over the steps since the last line that were not skipped; the last one's learning rate, and steps skipped."""
    taken = [metrics for metrics in values if not metrics["skipped_in_a_row"]]
    counters = ("skipped", "skipped_in_a_row")
    summary = {
        name: float(np.mean([metrics[name] for metrics in taken]))
        for name in values[0]
        if taken and name not in counters
    }
    summary["learning_rate"] = float(values[-1]["learning_rate"])
    if values[-1]["skipped"]:
        summary["skipped"] = int(values[-1]["skipped"])
    return summary


def _check_finite(value, what: str, step: int, checkpoints: Checkpoints) -> None:
    if not math.isfinite(value):
        saved = checkpoints.latest_step()
        kept = f"the checkpoint of step {saved} is untouched" if saved is not None else "nothing was saved yet"
        raise UserError(
            f"The {what} became {float(value)} at step {step}; {kept}. Lower config.schedule.base_lr, or lengthen the "
            "warm-up."
        )


def _format(metrics: dict[str, float]) -> str:
    """loss 0.1234  top1 98.70 ..., in the order of the metrics."""
    return "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())


def _console(quiet: bool = False) -> Console:
    """Prints on the first process only."""
    return make_console(quiet=quiet or jax.process_index() > 0)


def _say_ended(signal: str, step: int, saved: int | None, directory: pathlib.Path, command: str) -> str:
    """What a run that a signal ended leaves, and the command that goes on."""
    place = "Nothing is saved" if saved is None else f"Saved is {directory / 'checkpoints' / str(saved)}"
    return f"Ended by {signal} at step {step}. {place}; the same command goes on from there: {command}"


def _write_summary(
    run: Run,
    directory: pathlib.Path,
    step: int,
    *,
    ended: str | None,
    seconds: float,
    described: Mapping[str, str],
    command_flags: str,
    note: Callable[[str], None],
) -> None:
    """summary.md, by the first process; what hinders it is said."""
    if jax.process_index() > 0:
        return
    text = summary_lib.format_summary(
        name=directory.resolve().name,
        described={"configuration": command_flags, **described},
        step=step,
        total_steps=run.total_steps,
        steps_per_epoch=run.steps_per_epoch,
        ended=ended,
        series=metrics_lib.read_metrics(directory / "metrics.jsonl"),
        metric=run.metric,
        seconds=seconds,
        pictures=summary_lib.find_pictures(directory),
        commands=summary_lib.list_commands(run.config.task, str(directory), command_flags=command_flags),
    )
    try:
        summary_lib.write_summary(directory, text)
    except OSError as error:
        note(f"WARNING: the summary could not be written in {directory}: {error.strerror}.")


def _make_directory(workdir: str) -> pathlib.Path:
    directory = pathlib.Path(workdir)
    check_writable(directory)
    return directory


def _make_writer(run: Run, directory: pathlib.Path, warn: Callable[[str], None]):
    """The first process writes the configuration, the names of the classes and the metrics; the others write nothing."""
    if jax.process_index() > 0:
        return contextlib.nullcontext(metrics_lib.NullWriter())
    texts = {
        "config.json": run.config.to_json_best_effort(indent=2) + "\n",
        CLASS_NAMES: "".join(f"{name}\n" for name in run.train_source.class_names),
    }
    for name, text in texts.items():
        try:
            atomic_write_text(directory / name, text)
        except OSError as error:
            warn(f"WARNING: {directory / name} could not be written: {error.strerror}.")
    chosen = logs.choose_logs(run.config.logs, directory, config=run.config.to_dict(), note=warn)
    return metrics_lib.MetricWriter(directory, logs=chosen, note=warn)


def _make_profiler(run: Run, state: TrainState, directory: pathlib.Path, console: Console) -> StepProfiler:
    steps = dict(steps=run.config.profile, start_step=int(state.step), total_steps=run.total_steps)
    return StepProfiler(directory / "profile", **steps, note=console.print)


def _print_result(console: Console, warn: Callable[[str], None], result: dict[str, float], origin: str) -> None:
    rows = {name: f"{value:,}" if isinstance(value, int) else f"{value:.4g}" for name, value in result.items()}
    if console.quiet:
        warn("  ".join([*(" ".join(row) for row in rows.items()), origin]))
    else:
        print_table(console, "Result", {**rows, "weights": origin})
