"""The training loop and the evaluation of a checkpoint. Knows nothing of pictures: a task and its evaluation do."""

import dataclasses
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from rich.console import Console

from dat_jax import plots
from dat_jax.config import validate
from dat_jax.data.batching import make_eval_batches, make_train_batches
from dat_jax.data.sources import load_source
from dat_jax.data.transforms import make_eval_transform, make_train_transform
from dat_jax.errors import UserError
from dat_jax.evaluation import classification as classification_evaluation
from dat_jax.models.registry import create_model
from dat_jax.tasks import Task
from dat_jax.tasks.classification import make_classification_task
from dat_jax.training import metrics as metrics_lib
from dat_jax.training import sharding
from dat_jax.training.checkpoint import Checkpoints
from dat_jax.training.optimizer import make_optimizer
from dat_jax.training.schedule import warmup_cosine
from dat_jax.training.state import TrainState, init_state
from dat_jax.training.step import make_train_step

_INIT_STREAM = 0  # random streams: fold_in(seed, stream)
_EVALUATIONS = {"classification": classification_evaluation}


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything that a configuration determines, before the first step."""

    config: ConfigDict
    mesh: jax.sharding.Mesh
    task: Task
    train_source: Any
    eval_source: Any
    steps_per_epoch: int
    optimizer: Any
    schedule: Any
    state_sharding: TrainState
    abstract_state: TrainState
    evaluate: Callable
    evaluation: Any  # the module of evaluation/

    @property
    def total_steps(self) -> int:
        """Of all epochs."""
        return self.steps_per_epoch * self.config.epochs


def train(config: ConfigDict, workdir: str) -> dict[str, float]:
    """Trains as configured, or goes on where the work directory left off.

    Leaves in the work directory: checkpoints/, config.json, metrics.jsonl, tensorboard/ and pictures.

    Args:
      config: see configs/common.py.
      workdir: made if missing.

    Returns:
      Evaluation metrics of the best checkpoint.

    Raises:
      UserError: a mistake in the configuration or the work directory, or a loss that is not a finite number.
    """
    run, console, directory = make_run(config), _console(), _make_directory(workdir)
    metrics_lib.print_table(console, "dat_jax", _describe(run, directory))
    with Checkpoints(directory / "checkpoints", metric=run.evaluation.METRIC) as checkpoints:
        # A checkpoint in the work directory is gone on from; otherwise the run starts from scratch.
        latest = checkpoints.latest_step()
        if latest is None:
            state = _initialize(run)
        else:
            state = _restore(run, checkpoints, latest)
            console.print(f"Resumed at step {latest} of {run.total_steps}.")
        if int(state.step) >= run.total_steps:
            console.print(f"All {config.epochs} epochs are done; set --config.epochs for more.")
        else:
            with metrics_lib.MetricWriter(directory) as writer:
                (directory / "config.json").write_text(config.to_json_best_effort(indent=2) + "\n")
                state = _train_steps(run, state, checkpoints, writer, console)
        best = _restore(run, checkpoints, checkpoints.best_step())
        final = run.evaluate(best.eval_variables, _eval_batches(run))
        plots.save_curves(directory / "curves.png", metrics_lib.read_metrics(directory / "metrics.jsonl"))
        _save_pictures(run, best, directory)
    metrics_lib.print_table(console, "Result", _result_rows(final, int(best.step), directory))
    return final


def evaluate(config: ConfigDict, workdir: str) -> dict[str, float]:
    """Evaluates the best or the latest checkpoint of a work directory, as ``config.eval.checkpoint`` says.

    Raises:
      UserError: no checkpoint, or one of another model.
    """
    run, console, directory = make_run(config), _console(), pathlib.Path(workdir)
    if not (directory / "checkpoints").is_dir():
        raise UserError(f"There are no checkpoints in {directory}; train first, or name another --workdir.")
    with Checkpoints(directory / "checkpoints", metric=run.evaluation.METRIC) as checkpoints:
        best = config.eval.checkpoint == "best"
        step = checkpoints.best_step() if best else checkpoints.latest_step()
        if step is None:
            raise UserError(f"There is no complete checkpoint in {directory / 'checkpoints'}.")
        state = _restore(run, checkpoints, step)
    result = run.evaluate(state.eval_variables, _eval_batches(run))
    metrics_lib.print_table(console, "Result", _result_rows(result, step, directory))
    return result


def make_run(config: ConfigDict) -> Run:
    """Builds what the configuration determines and checks that it fits together.

    Raises:
      UserError: says what does not fit.
    """
    validate(config)
    mesh = sharding.make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp)
    train_source = load_source(config.data.name, split="train")
    eval_source = load_source(config.data.name, split="validation")
    _check_batch_sizes(config, mesh.size, len(train_source))
    steps_per_epoch = len(train_source) // config.batch_size

    settings = config.model.to_dict()
    dtype = _compute_dtype(settings.pop("dtype"))
    try:
        model = create_model(settings.pop("name"), dtype=dtype, num_classes=len(train_source.class_names), **settings)
    except (ValueError, TypeError) as error:
        raise UserError(f"config.model: {error}") from error
    task = make_classification_task(model, label_smoothing=config.loss.label_smoothing)
    schedule = _make_schedule(config, steps_per_epoch)
    optimizer = make_optimizer(schedule, **config.optimizer.to_dict())
    try:
        abstract = jax.eval_shape(_init_function(config, task, optimizer), jax.random.key(0))
    except ValueError as error:  # settings of the model that do not fit together, or images it cannot take
        raise UserError(f"The model cannot be built: {error}") from error
    shardings = sharding.state_sharding(abstract, mesh)
    evaluation = _EVALUATIONS[config.task]
    return Run(
        config=config,
        mesh=mesh,
        task=task,
        train_source=train_source,
        eval_source=eval_source,
        steps_per_epoch=steps_per_epoch,
        optimizer=optimizer,
        schedule=schedule,
        state_sharding=shardings,
        abstract_state=jax.tree.map(
            lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), abstract, shardings
        ),
        evaluate=evaluation.make_evaluator(task.predict),
        evaluation=evaluation,
    )


def make_jitted_step(run: Run) -> Callable[[TrainState, dict], tuple[TrainState, dict]]:
    """The training step on the run's mesh. It takes the state's memory for the new state."""
    step = make_train_step(
        task=run.task,
        optimizer=run.optimizer,
        schedule=run.schedule,
        seed=run.config.seed,
        accumulate_steps=run.config.accumulate_steps,
        ema_decay=run.config.ema_decay,
    )
    return jax.jit(
        step,
        in_shardings=(run.state_sharding, sharding.batch_sharding(run.mesh)),
        out_shardings=(run.state_sharding, sharding.replicated(run.mesh)),
        donate_argnums=0,
    )


def train_batches(run: Run, *, start_step: int):
    """Endless global batches on the devices, from a step on."""
    data = run.config.data
    transform = make_train_transform(
        image_size=data.image_size,
        max_rotation=data.max_rotation,
        max_shift=data.max_shift,
        max_scale=data.max_scale,
    )
    batches = make_train_batches(
        run.train_source,
        transform,
        batch_size=run.config.batch_size // jax.process_count(),
        seed=run.config.seed,
        start_step=start_step,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        workers=data.workers,
    )
    return (sharding.put_batch(batch, run.mesh) for batch in batches)


def _train_steps(run, state, checkpoints, writer, console) -> TrainState:
    """The loop itself."""
    config, start = run.config, int(state.step)
    train_step, batches = make_jitted_step(run), train_batches(run, start_step=start)
    progress = metrics_lib.Progress(start_step=start, total_steps=run.total_steps, batch_size=config.batch_size)
    pending = []  # metrics of the steps since the last line, still on the devices
    for step in range(start + 1, run.total_steps + 1):
        state, metrics = train_step(state, next(batches))
        pending.append(metrics)
        last = step == run.total_steps
        due = step % (run.steps_per_epoch * config.eval.every_epochs) == 0 or last
        if step % config.log_every == 0 or due:
            # Before saving: a state whose loss was not finite is never saved.
            summary = _summarize(pending, step, checkpoints)
            pending = []
            rate, seconds_left = progress.update(step)
            writer.write(step, {**summary, "images_per_second": rate}, prefix="train")
            console.print(
                f"step {step}/{run.total_steps}  epoch {step / run.steps_per_epoch:.2f}  loss {summary['loss']:.4f}  "
                f"top-1 {summary['top1']:.1f} %  {rate:.0f} images/s  {metrics_lib.format_duration(seconds_left)} left"
            )
        if due:
            result = run.evaluate(state.eval_variables, _eval_batches(run))
            writer.write(step, result, prefix="eval")
            position = _data_position(config, step)
            checkpoints.save(state, data_position=position, metrics={run.evaluation.METRIC: result["top1"]})
            console.print(f"  evaluation: top-1 {result['top1']:.2f} %  loss {result['loss']:.4f}")
            progress.skip()
    return state


def _summarize(pending: list[dict], step: int, checkpoints: Checkpoints) -> dict[str, float]:
    """Means over the steps since the last line; the learning rate is the last one's.

    Raises:
      UserError: a loss was not a finite number.
    """
    values = jax.device_get(pending)
    summary = {name: float(np.mean([metrics[name] for metrics in values])) for name in values[0]}
    summary["learning_rate"] = float(values[-1]["learning_rate"])
    summary["top1"] *= 100
    first = step - len(values) + 1
    for index, metrics in enumerate(values):
        if not math.isfinite(metrics["loss"]):
            saved = checkpoints.latest_step()
            kept = f"the checkpoint of step {saved} is untouched" if saved is not None else "nothing was saved yet"
            raise UserError(
                f"The loss became {float(metrics['loss'])} at step {first + index}; {kept}. Lower "
                "config.schedule.base_lr, or lengthen the warm-up."
            )
    return summary


def _make_schedule(config, steps_per_epoch):
    s = config.schedule
    scale = config.batch_size / s.reference_batch_size
    return warmup_cosine(
        base_lr=s.base_lr * scale,
        warmup_lr=s.warmup_lr * scale,
        min_lr=s.min_lr * scale,
        warmup_steps=round(s.warmup_epochs * steps_per_epoch),
        total_steps=config.epochs * steps_per_epoch,
    )


def _compute_dtype(name: str):
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jax.numpy.dtype(name)


def _init_function(config, task, optimizer):
    side = config.data.image_size

    def init(key):
        batch = {"image": jax.numpy.zeros((1, side, side, 3), jax.numpy.uint8)}
        return init_state(key, batch, task=task, optimizer=optimizer, ema=config.ema_decay > 0)

    return init


def _initialize(run: Run) -> TrainState:
    key = jax.random.fold_in(jax.random.key(run.config.seed), _INIT_STREAM)
    init = _init_function(run.config, run.task, run.optimizer)
    # It runs once, and is mostly random numbers: on CPU half of its compile time goes into making it fast.
    options = {"xla_backend_optimization_level": "0"} if jax.default_backend() == "cpu" else None
    return jax.jit(init, out_shardings=run.state_sharding, compiler_options=options)(key)


def _restore(run: Run, checkpoints: Checkpoints, step: int) -> TrainState:
    state, position = checkpoints.restore(step, run.abstract_state)
    now = _data_position(run.config, step)
    differing = [
        f"{key} {position[key]}, now {now[key]}" for key in ("batch_size", "seed") if position[key] != now[key]
    ]
    if differing:
        raise UserError(
            f"The run in this work directory was started with {'; '.join(differing)}. Its data would not continue where "
            "it stopped: set it as it was, or take another --workdir."
        )
    return state


def _data_position(config, step) -> dict[str, int]:
    """What says which examples come next."""
    return {"examples": step * config.batch_size, "batch_size": config.batch_size, "seed": config.seed}


def _eval_batches(run: Run):
    batches = make_eval_batches(
        run.eval_source,
        make_eval_transform(image_size=run.config.data.image_size),
        batch_size=run.config.eval.batch_size // jax.process_count(),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    return (sharding.put_batch(batch, run.mesh) for batch in batches)


def _save_pictures(run: Run, state: TrainState, directory: pathlib.Path) -> None:
    if jax.process_count() > 1:  # no process can draw from another's part of the weights
        return
    count = min(32, len(run.eval_source))
    spread = np.linspace(0, len(run.eval_source) - 1, count).astype(int)  # over all classes, where they are sorted
    transform = make_eval_transform(image_size=run.config.data.image_size)
    records = [transform(run.eval_source[int(index)]) for index in np.random.default_rng(0).permutation(spread)]
    batch = {key: np.stack([record[key] for record in records]) for key in records[0]}
    run.evaluation.save_pictures(
        run.task.predict,
        jax.device_get(state.eval_variables),
        batch,
        class_names=run.eval_source.class_names,
        directory=directory,
    )


def _check_batch_sizes(config, devices: int, examples: int) -> None:
    parts = devices * config.accumulate_steps
    if config.batch_size % parts:
        raise UserError(
            f"config.batch_size {config.batch_size} is not a multiple of {parts}: {devices} devices times "
            f"{config.accumulate_steps} accumulated steps."
        )
    if config.eval.batch_size % devices:
        raise UserError(f"config.eval.batch_size {config.eval.batch_size} is not a multiple of {devices} devices.")
    if config.batch_size > examples:
        raise UserError(f"config.batch_size {config.batch_size} is more than the {examples} training examples.")


def _console() -> Console:
    """Prints on the first process only."""
    return Console(quiet=jax.process_index() > 0, highlight=False, soft_wrap=True)


def _make_directory(workdir: str) -> pathlib.Path:
    directory = pathlib.Path(workdir)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"The work directory {directory} cannot be written: {error.strerror}.") from error
    return directory


def _describe(run: Run, directory: pathlib.Path) -> dict[str, str]:
    config, devices = run.config, jax.devices()
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(run.abstract_state.params))
    return {
        "model": f"{config.model.name}, {parameters:,} parameters, {_compute_dtype(config.model.dtype)}",
        "data": f"{config.data.name}: {len(run.train_source):,} to train, {len(run.eval_source):,} to validate, "
        f"{config.data.image_size} x {config.data.image_size}",
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "mesh": " x ".join(f"{axis}={size}" for axis, size in run.mesh.shape.items()),
        "batch": f"{config.batch_size} in {config.accumulate_steps} part(s), {run.steps_per_epoch} steps an epoch",
        "length": f"{config.epochs} epochs, {run.total_steps} steps",
        "work directory": str(directory),
    }


def _result_rows(result: dict[str, float], step: int, directory: pathlib.Path) -> dict[str, str]:
    return {
        "top-1": f"{result['top1']:.2f} %",
        "top-5": f"{result['top5']:.2f} %",
        "examples": f"{result['examples']:,}, each once",
        "checkpoint": f"step {step} in {directory / 'checkpoints'}",
    }
