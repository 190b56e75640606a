"""What a configuration determines before the first step: data, task, optimizer, mesh, and the functions on them.

This is where a task is put together with its data and its evaluation; the loop only sees the result.
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from dat_jax.checkpoints.loading import load_for_finetuning
from dat_jax.config.validation import validate
from dat_jax.errors import UserError
from dat_jax.models.registry import create_model
from dat_jax.ops.dispatch import compute_dtype, target_platform
from dat_jax.parallel import sharding
from dat_jax.profiling.flops import count_product_flops
from dat_jax.tasks import Task
from dat_jax.training.compiler_options import known_options
from dat_jax.training.optimizer import make_optimizer
from dat_jax.training.schedule import warmup_cosine, warmup_poly, warmup_step
from dat_jax.training.setups import SETUPS
from dat_jax.training.state import TrainState, init_state
from dat_jax.training.step import make_train_step

_INIT_STREAM = 0  # random streams: fold_in(seed, stream)


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything that a configuration determines.

    Attributes:
      setup: the module of ``training.setups``.
      metric: of the evaluation, what the best checkpoint is best in.
      evaluate: (variables, batches) -> metrics.
      eval_sets: name -> (source, indices of its classes or None for all), beside the validation images.
      state_sharding, abstract_state: of the training state, with the structure of a TrainState.
    """

    config: ConfigDict
    setup: Any
    mesh: jax.sharding.Mesh
    task: Task
    train_source: Any
    eval_source: Any
    eval_sets: dict[str, tuple[Any, Any]]
    steps_per_epoch: int
    optimizer: Any
    schedule: Any
    state_sharding: TrainState
    abstract_state: TrainState
    metric: str
    evaluate: Callable

    @property
    def total_steps(self) -> int:
        """Of the whole run."""
        return _count_steps(self.config, self.steps_per_epoch)

    @property
    def eval_steps(self) -> int:
        """Between evaluations."""
        return self.config.eval.every_steps or self.config.eval.every * self.steps_per_epoch


def make_run(
    config: ConfigDict, *, devices: Sequence[jax.Device] | None = None, sources: tuple[Any, Any] | None = None
) -> Run:
    """Builds what the configuration determines and checks that it fits together.

    Args:
      config: see configs/common.py.
      devices: of the mesh; all of this platform, unless given.
      sources: to train and to evaluate; those that ``config.data`` names, unless given.

    Raises:
      UserError: says what does not fit.
    """
    validate(config)
    config = _with_deformable_form(config)
    mesh = sharding.make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp, devices=devices)
    setup = SETUPS[config.task]
    train_source, eval_source = sources or setup.load_sources(config)
    if config.eval.batch_size % mesh.size:
        raise UserError(f"config.eval.batch_size {config.eval.batch_size} is not a multiple of {mesh.size} devices.")
    if config.batch_size > len(train_source):
        raise UserError(
            f"config.batch_size {config.batch_size} is more than the {len(train_source)} training examples."
        )
    steps_per_epoch = len(train_source) // config.batch_size

    schedule = _make_schedule(config, steps_per_epoch)
    optimizer = make_optimizer(schedule, **config.optimizer.to_dict())
    try:
        task = setup.make_task(config, classes=len(train_source.class_names))
        # Kernels want as many examples as devices; parameters are the same without them.
        init = setup.make_task(config, classes=len(train_source.class_names), implementation="auto").init
        task = dataclasses.replace(task, init=init)
        abstract = jax.eval_shape(_init_function(config, task, optimizer), jax.random.key(0))
    except (ValueError, TypeError) as error:  # settings that do not fit together, or images that the model cannot take
        raise UserError(f"config.model cannot be built: {str(error).splitlines()[0]}") from error
    shardings = sharding.state_sharding(abstract, mesh)
    predict, loss = (sharding.with_whole_params(f, shardings.params, mesh) for f in (task.predict, task.loss))
    task = dataclasses.replace(task, predict=sharding.with_split_kernels(predict, mesh), loss=loss)
    return Run(
        config=config,
        setup=setup,
        mesh=mesh,
        task=task,
        train_source=train_source,
        eval_source=eval_source,
        eval_sets=setup.load_eval_sets(config, eval_source),
        steps_per_epoch=steps_per_epoch,
        optimizer=optimizer,
        schedule=schedule,
        state_sharding=shardings,
        abstract_state=jax.tree.map(
            lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), abstract, shardings
        ),
        metric=setup.evaluation.METRIC,
        evaluate=setup.make_evaluate(config, task.predict, eval_source),
    )


def _with_deformable_form(config: ConfigDict) -> ConfigDict:
    """The configuration with ``model.deformable_form``, where "auto" becomes that of the named model.

    It is recorded with the run because the parameters do not show which form they were trained with.
    """
    if config.model.get("deformable_form", "auto") != "auto":
        return config
    try:
        form = create_model(config.model.name).deformable_form
    except ValueError as error:
        raise UserError(f"config.model cannot be built: {error}") from error
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.model.deformable_form = form
    return config


def count_model_flops(run: Run) -> float:
    """FLOPs of a training step for one image as model FLOPs utilization (MFU) counts them: those that the model asks for.

    Three times the products of the forward pass, one for it and two for the backward pass. Neither what ``remat``
    computes again counts, nor products that only a fast algorithm has: it is traced with the plain ones.
    """
    plain = dict(implementation="plain", remat="none")
    task = run.setup.make_task(run.config, classes=len(run.train_source.class_names), **plain)
    batch = run.setup.example_batch(run.config, 1)
    traced = jax.make_jaxpr(task.loss)(run.abstract_state.eval_variables, batch, jax.random.key(0))
    return 3 * count_product_flops(traced.jaxpr)


def check_train_batch(run: Run) -> None:
    """Raises a UserError where the training batch cannot be split over devices and accumulated steps."""
    config = run.config
    parts = run.mesh.size * config.accumulate_steps
    if config.batch_size % parts:
        raise UserError(
            f"config.batch_size {config.batch_size} is not a multiple of {parts}: {run.mesh.size} devices times "
            f"{config.accumulate_steps} accumulated steps."
        )


def initialize(run: Run) -> TrainState:
    """The state at step 0, on the mesh."""
    key = jax.random.fold_in(jax.random.key(run.config.seed), _INIT_STREAM)
    init = _init_function(run.config, run.task, run.optimizer)
    # It runs once, and is mostly random numbers: on CPU half of its compile time goes into making it fast.
    on_cpu = jax.default_backend() == "cpu"
    options = known_options({"xla_backend_optimization_level": 0}) if on_cpu else None
    return jax.jit(init, out_shardings=run.state_sharding, compiler_options=options)(key)


def start_state(run: Run, *, note: Callable[[str], None]) -> TrainState:
    """The state at step 0 with the weights that ``config.init_from`` names, or as initialised where it is "".

    Args:
      run: the run.
      note: is told what was adapted.

    Raises:
      UserError: weights that are missing, damaged, or do not fit.
    """
    config = run.config
    head_rows = _read_head_rows(config, run.train_source)
    state = initialize(run)
    if not config.init_from:
        return state
    fresh = {"params": state.params, **state.model_state}
    variables, notes = load_for_finetuning(
        config.init_from,
        fresh_variables=fresh,
        deformable_form=config.model.deformable_form,
        head_rows=head_rows,
    )
    for sentence in [f"Starting from the weights of {config.init_from}.", *notes]:
        note(sentence)
    params = jax.device_put(variables.pop("params"), run.state_sharding.params)
    model_state = jax.device_put(variables, run.state_sharding.model_state)
    return state.replace(
        params=params, model_state=model_state, ema_params=None if state.ema_params is None else params
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
    on_cpu, recent = target_platform() == "cpu", jax.__version_info__ >= (0, 9, 1)
    # XLA's CPU backend starts ops as early as it can unless told to mind what stays in memory meanwhile.
    options = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"} if on_cpu else {}
    return jax.jit(
        sharding.with_split_kernels(step, run.mesh),  # of the step, as the backward pass is traced after the loss
        in_shardings=(run.state_sharding, sharding.batch_sharding(run.mesh)),
        out_shardings=(run.state_sharding, sharding.replicated(run.mesh)),
        # On one CPU device jax 0.7.2 computes other losses from the second step on where the state is donated.
        donate_argnums=() if on_cpu and not recent else 0,
        compiler_options=known_options(options),
    )


def train_batches(run: Run, *, start_step: int) -> Iterator[dict]:
    """Endless batches, this process's part of them (numpy), from a step on."""
    rows = sharding.local_rows(run.config.batch_size, run.mesh)
    return run.setup.make_train_batches(run.config, run.train_source, start_step=start_step, rows=rows)


def eval_batches(run: Run, source=None) -> Iterator[dict]:
    """Every example of the evaluation, or of another source, once, in global batches on the devices."""
    source = run.eval_source if source is None else source
    rows = sharding.local_rows(run.config.eval.batch_size, run.mesh)
    batches = run.setup.make_eval_batches(run.config, source, rows=rows)
    return (sharding.put_batch(batch, run.mesh) for batch in batches)


def save_pictures(run: Run, state: TrainState, directory: pathlib.Path) -> None:
    """What the task draws of some examples of the evaluation."""
    if jax.process_count() > 1:  # no process can draw from another's part of the weights
        return
    variables = jax.device_get(state.eval_variables)
    run.setup.save_pictures(run.config, run.task.predict, variables, run.eval_source, directory)


def describe(run: Run) -> dict[str, str]:
    """The table that a run starts with."""
    config, devices = run.config, jax.devices()
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(run.abstract_state.params))
    skipped = {name: count for name, count in getattr(run.train_source, "skipped", {}).items() if count}
    left_out = ", ".join(f"{count:,} {name}" for name, count in skipped.items())
    return {
        "model": f"{config.model.name}, {parameters:,} parameters, {compute_dtype(config.model.dtype)}",
        "data": f"{config.data.name}: {len(run.train_source):,} to train, {len(run.eval_source):,} to validate, "
        f"{run.setup.describe_images(config)}",
        **({"left out or mended": left_out} if left_out else {}),
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "mesh": " x ".join(f"{axis}={size}" for axis, size in run.mesh.shape.items()),
        "batch": f"{config.batch_size} in {config.accumulate_steps} part(s), {run.steps_per_epoch} steps an epoch",
        "length": f"{run.total_steps / run.steps_per_epoch:.4g} epochs, {run.total_steps} steps",
    }


def _read_head_rows(config, source):
    if not config.get("init_head_rows"):  # not every task has it
        return None
    try:
        rows = np.loadtxt(config.init_head_rows, dtype=np.int64, ndmin=1)
    except (OSError, ValueError) as error:
        raise UserError(f"config.init_head_rows {config.init_head_rows} cannot be read: {error}.") from error
    if len(rows) != len(source.class_names):
        raise UserError(
            f"config.init_head_rows wants a number for each of the {len(source.class_names)} classes, "
            f"{config.init_head_rows} has {len(rows)}."
        )
    return rows


def _count_steps(config, steps_per_epoch):
    return config.steps or config.epochs * steps_per_epoch


def _make_schedule(config, steps_per_epoch):
    s, total_steps = config.schedule, _count_steps(config, steps_per_epoch)
    if s.kind == "poly":
        return warmup_poly(
            base_lr=s.base_lr,
            power=s.power,
            warmup_steps=s.warmup_steps,
            warmup_ratio=s.warmup_ratio,
            total_steps=total_steps,
        )
    if s.kind == "step":
        return warmup_step(
            base_lr=s.base_lr,
            warmup_steps=s.warmup_steps,
            warmup_ratio=s.warmup_ratio,
            drops=s.drops,
            factor=s.factor,
            steps_per_epoch=steps_per_epoch,
        )
    scale = config.batch_size / s.reference_batch_size
    return warmup_cosine(
        base_lr=s.base_lr * scale,
        warmup_lr=s.warmup_lr * scale,
        min_lr=s.min_lr * scale,
        warmup_steps=round(s.warmup_epochs * steps_per_epoch),
        total_steps=total_steps,
    )


def _init_function(config, task, optimizer):
    image = SETUPS[config.task].example_batch(config, 1)["image"]

    def init(key):
        batch = {"image": jnp.zeros(image.shape, image.dtype)}
        return init_state(key, batch, task=task, optimizer=optimizer, ema=config.ema_decay > 0)

    return init
