"""The training loop and the evaluation of a checkpoint, for any task."""

import contextlib
import math
import pathlib

import jax
import numpy as np
from ml_collections import ConfigDict
from rich.console import Console

from dat_jax import plots
from dat_jax.errors import UserError
from dat_jax.training import compilation_cache
from dat_jax.training import metrics as metrics_lib
from dat_jax.training.checkpoint import Checkpoints
from dat_jax.training.profiling import StepProfiler
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


def train(config: ConfigDict, workdir: str) -> dict[str, float]:
    """Trains as configured, or goes on where the work directory left off.

    Leaves in the work directory: checkpoints/, config.json, metrics.jsonl, tensorboard/, pictures, and profile/ where
    ``config.profile`` asks for one.

    Args:
      config: see configs/common.py.
      workdir: made if missing.

    Returns:
      Evaluation metrics of the best checkpoint.

    Raises:
      UserError: a mistake in the configuration or the work directory, or a loss that is not a finite number.
    """
    run, console = make_run(config), _console()
    check_train_batch(run)
    directory = _make_directory(workdir)
    kept = compilation_cache.enable(config.compilation_cache, note=console.print)
    places = {"work directory": str(directory), "compiled programs": "not kept" if kept is None else f"kept in {kept}"}
    metrics_lib.print_table(console, "dat_jax", {**describe(run), **places})
    with Checkpoints(directory / "checkpoints", metric=run.metric) as checkpoints:
        # A checkpoint in the work directory is gone on from; otherwise the run starts from the weights that
        # config.init_from names; otherwise from scratch.
        latest = checkpoints.latest_step()
        if latest is None:
            state = start_state(run, note=console.print)
        else:
            state, position = checkpoints.restore(latest, run.abstract_state)
            _check_data_position(position, config)
            console.print(f"Resumed at step {latest} of {run.total_steps}.")
        if int(state.step) >= run.total_steps:
            console.print(f"All {config.epochs} epochs are done; set --config.epochs for more.")
        else:
            state = own_memory(state)
            with _make_writer(config, directory) as writer, _make_profiler(run, state, directory, console) as profiler:
                _train_steps(run, state, checkpoints, writer, profiler, console)
        del state  # its memory is for the best one
        best, _ = checkpoints.restore(checkpoints.best_step(), run.abstract_state)
    result = run.evaluate(best.eval_variables, eval_batches(run))
    if jax.process_index() == 0:
        plots.save_curves(directory / "curves.png", metrics_lib.read_metrics(directory / "metrics.jsonl"))
    save_pictures(run, best, directory)
    _print_result(console, result, f"step {int(best.step)} in {directory / 'checkpoints'}")
    return result


def evaluate(config: ConfigDict, workdir: str) -> dict[str, float]:
    """Evaluates a checkpoint of a work directory, or the weights that ``config.init_from`` names where it has none.

    ``config.eval.checkpoint`` chooses the best or the latest. Beside the validation images every set of
    ``config.eval.sets`` is evaluated.

    Returns:
      Evaluation metrics, those of the sets under "set/metric". The work directory is only read.

    Raises:
      UserError: no checkpoint, or one of another model.
    """
    run, console, directory = make_run(config), _console(), pathlib.Path(workdir)
    compilation_cache.enable(config.compilation_cache, note=console.print)
    if (directory / "checkpoints").is_dir():
        with Checkpoints(directory / "checkpoints", metric=run.metric, read_only=True) as checkpoints:
            best = config.eval.checkpoint == "best"
            step = checkpoints.best_step() if best else checkpoints.latest_step()
            if step is None:
                raise UserError(f"There is no complete checkpoint in {directory / 'checkpoints'}.")
            state, _ = checkpoints.restore(step, run.abstract_state)
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
    _print_result(console, result, origin)
    return result


def _train_steps(
    run: Run, state: TrainState, checkpoints: Checkpoints, writer, profiler: StepProfiler, console: Console
) -> None:
    """The loop itself."""
    config, start = run.config, int(state.step)
    train_step, batches = make_jitted_step(run), train_batches(run, start_step=start)
    usage = metrics_lib.Usage(run.mesh.devices.ravel(), count_flops=lambda: count_model_flops(run))
    progress = None
    pending = []  # metrics of the steps since the last line, still on the devices
    for step in range(start + 1, run.total_steps + 1):
        profiler.before(step)
        state, metrics = train_step(state, next(batches))
        profiler.after(step, metrics)
        pending.append(metrics)
        if progress is None:  # compiling is not counted into the rate
            jax.block_until_ready(metrics)
            progress = metrics_lib.Progress(start_step=step, total_steps=run.total_steps, batch_size=config.batch_size)
        due = step % (run.steps_per_epoch * config.eval.every) == 0 or step == run.total_steps
        if step % config.log_every == 0 or due:
            summary = _summarize(pending, step, checkpoints)
            pending = []
            rate, seconds_left = progress.update(step)
            writer.write(step, {**summary, "images_per_second": rate, **usage.measure(rate)}, prefix="train")
            console.print(
                f"step {step}/{run.total_steps}  epoch {step / run.steps_per_epoch:.2f}  {_format(summary)}  "
                f"{rate:.0f} images/s  {metrics_lib.format_duration(seconds_left)} left"
            )
        if due:
            result = run.evaluate(state.eval_variables, eval_batches(run))
            # The losses before this were of earlier weights; these are what would be saved.
            _check_finite(result["loss"], "evaluation's loss", step, checkpoints)
            writer.write(step, result, prefix="eval")
            position = _data_position(config, step)
            checkpoints.save(state, data_position=position, metrics={run.metric: result[run.metric]})
            console.print(f"  evaluation: {_format(result)}")
            progress.skip()


def _summarize(pending: list[dict], step: int, checkpoints: Checkpoints) -> dict[str, float]:
    """Means over the steps since the last line; the learning rate is the last one's.

    Raises:
      UserError: a loss or a gradient was not a finite number.
    """
    values = jax.device_get(pending)
    for index, metrics in enumerate(values, start=step - len(values) + 1):
        _check_finite(metrics["loss"], "loss", index, checkpoints)
        _check_finite(metrics["grad_norm"], "gradient's norm", index, checkpoints)
    summary = {name: float(np.mean([metrics[name] for metrics in values])) for name in values[0]}
    summary["learning_rate"] = float(values[-1]["learning_rate"])
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


def _data_position(config, step) -> dict[str, int | str]:
    """What says which examples come next."""
    return {
        "examples": step * config.batch_size,
        "batch_size": config.batch_size,
        "seed": config.seed,
        "data": config.data.name,
    }


def _check_data_position(position, config) -> None:
    now = _data_position(config, 0)
    keys = ("batch_size", "seed", "data")
    differing = [f"{key} {position.get(key)}, now {now[key]}" for key in keys if position.get(key) != now[key]]
    if differing:
        raise UserError(
            f"The run in this work directory was started with {'; '.join(differing)}. Its data would not continue where it "
            "stopped: set it as it was, or take another --workdir."
        )


def _console() -> Console:
    """Prints on the first process only."""
    return Console(quiet=jax.process_index() > 0, highlight=False, soft_wrap=True)


def _make_directory(workdir: str) -> pathlib.Path:
    directory = pathlib.Path(workdir)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / f".writable-{jax.process_index()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"The work directory {directory} cannot be written: {error.strerror}.") from error
    return directory


def _make_writer(config: ConfigDict, directory: pathlib.Path):
    """The first process writes the configuration and the metrics; the others write nothing."""
    if jax.process_index() > 0:
        return contextlib.nullcontext(metrics_lib.NullWriter())
    (directory / "config.json").write_text(config.to_json_best_effort(indent=2) + "\n")
    return metrics_lib.MetricWriter(directory)


def _make_profiler(run: Run, state: TrainState, directory: pathlib.Path, console: Console) -> StepProfiler:
    steps = dict(steps=run.config.profile, start_step=int(state.step), total_steps=run.total_steps)
    return StepProfiler(directory / "profile", **steps, note=console.print)


def _print_result(console: Console, result: dict[str, float], origin: str) -> None:
    rows = {name: f"{value:,}" if isinstance(value, int) else f"{value:.4g}" for name, value in result.items()}
    metrics_lib.print_table(console, "Result", {**rows, "weights": origin})
