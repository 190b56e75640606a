"""Everything that a configuration determines before the first step."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from dat_jax.config import validate
from dat_jax.errors import UserError
from dat_jax.evaluation.results import Evaluation
from dat_jax.ops.calls import OpCall, chosen_implementations, recorded_calls
from dat_jax.ops.dispatch import check_name, check_platform, compute_dtype, target_platform
from dat_jax.ops.triton import call as triton_kernels
from dat_jax.parallel import sharding
from dat_jax.profiling.flops import count_product_flops
from dat_jax.tasks.registry import make_task
from dat_jax.training.compilation import known_options, release_unused_memory
from dat_jax.training.model_defaults import resolve_model
from dat_jax.training.monitoring.input import without_damaged
from dat_jax.training.optimizer import make_optimizer
from dat_jax.training.schedule import plan_run
from dat_jax.training.state import TrainState, init_state
from dat_jax.training.step import make_train_step

_MOST_SHAPES = 8  # of images in an evaluation, whose ops are listed
_INIT_STREAM = 0  # random keys: fold_in(seed, stream)


class Trainer:
    """Builds what a configuration determines, once, in this order: mesh, task and data, length, optimizer, model, state.

    Attributes:
      config: the configuration, checked, with ``model.deformable_form`` and derived values (-1) resolved.
      mesh: devices of the run.
      task: data, model, evaluation and figures, see ``tasks.task.Task``.
      plan: length of the run and its learning rates, see ``training.schedule.RunPlan``.
      optimizer: the optimizer.
      objective: the model's init, loss and predict on the mesh, see ``tasks.objective.Objective``.
      state_sharding: placement of the training state, with the structure of a TrainState.
      abstract_state: shapes, dtypes and placement of the training state (ShapeDtypeStructs).
      extra_eval_sets: further evaluation sets, name -> (source, indices of its classes or None for all).
      choices: implementations of calls of ops, see ``ops.calls.chosen_implementations``; set them before the first step.
    """

    def __init__(
        self,
        config: ConfigDict,
        *,
        devices: Sequence[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm] (jaxlib has no annotations)
        sources: tuple[Any, Any] | None = None,
    ):
        """Build everything and check that it fits together.

        Args:
          config: a configuration, see dat_jax.config.
          devices: devices of the mesh; by default all devices of the platform.
          sources: training and validation data; by default those that ``config.data`` names.

        Raises:
          UserError: names what does not fit.
        """
        validate(config)
        config = resolve_model(config)
        self.choices: Mapping[str, str] = {}
        self.mesh = sharding.make_mesh(
            data=config.mesh.data, fsdp=config.mesh.fsdp, slices=config.mesh.slices, devices=devices
        )
        self.task = make_task(config, sources=sources)

        parts = self.mesh.size * config.accumulate_steps
        self.plan = plan_run(self.task.config, examples=len(self.task.train_source), parts=parts)
        self.config = self.task.config = config = self.plan.config
        _check_eval_batch(config, self.mesh)

        self.optimizer = make_optimizer(self.plan.schedule, **config.optimizer.to_dict())
        try:
            _check_implementation(config.model.get("implementation", "auto"))
            objective = self.task.make_objective()
            # Kernels need at least one example per device; without them the same parameters need one example.
            objective = dataclasses.replace(objective, init=self.task.make_objective(implementation="auto").init)
            abstract = jax.eval_shape(self._make_init(objective), jax.random.key(0))
        except (ValueError, TypeError, ArithmeticError, LookupError, StopIteration) as error:
            # Settings that do not fit together, or images that the model cannot take.
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise UserError(f"config.model cannot be built: {reason}") from error
        self.state_sharding = sharding.state_sharding(abstract, self.mesh)
        self.abstract_state = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            abstract,
            self.state_sharding,
        )
        predict, loss = (
            sharding.with_whole_params(function, self.state_sharding.params, self.mesh)
            for function in (objective.predict, objective.loss)
        )
        predict = self._with_choices(sharding.with_split_kernels(predict, self.mesh), differentiated=False)
        self.objective = dataclasses.replace(objective, predict=predict, loss=loss)
        self.extra_eval_sets = self.task.load_extra_eval_sets()

    def initialize(self) -> TrainState:
        """Make the state before the first step, on the mesh."""
        key = jax.random.fold_in(jax.random.key(self.config.seed), _INIT_STREAM)
        # It runs once and mostly draws random numbers: on CPU, optimizing it would take half of its compile time.
        on_cpu = jax.default_backend() == "cpu"
        options = known_options({"xla_backend_optimization_level": 0}) if on_cpu else None
        init = jax.jit(self._make_init(self.objective), out_shardings=self.state_sharding, compiler_options=options)
        return init(key)

    @functools.cached_property
    def train_step(self) -> jax.stages.Wrapped:
        """The jitted training step on the mesh: (state, batch) -> (state, metrics). It donates the state's memory."""
        config = self.config
        step = make_train_step(
            objective=self.objective,
            optimizer=self.optimizer,
            schedule=self.plan.schedule,
            seed=config.seed,
            accumulate_steps=config.accumulate_steps,
            ema_decay=config.ema_decay,
        )
        on_cpu = target_platform() == "cpu"
        # By default XLA's CPU backend starts ops as early as possible, without regard to the memory this takes.
        options = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"} if on_cpu else {}
        # On one CPU device jax 0.7.2 computes other losses from the second step on if the state is donated.
        donate = () if on_cpu and jax.__version_info__ < (0, 9, 1) else 0
        return jax.jit(
            # Around the step, since the backward pass is traced in it.
            self._with_choices(sharding.with_split_kernels(step, self.mesh), differentiated=True),
            in_shardings=(self.state_sharding, sharding.batch_sharding(self.mesh)),
            out_shardings=(self.state_sharding, sharding.replicated(self.mesh)),
            donate_argnums=donate,
            compiler_options=known_options(options),
        )

    def compile_train_step(self, state: TrainState, batch: dict) -> None:
        """Compile the training step for its arguments, so that the memory of the compiler is free before the first step."""
        self.train_step.lower(state, batch).compile()
        release_unused_memory()

    def train_batches(self, *, start_step: int) -> Iterator[dict]:
        """Endless training batches of this process (numpy), after ``start_step`` finished steps."""
        rows = sharding.local_rows(self.config.batch_size, self.mesh)
        return self.task.make_train_batches(start_step=start_step, rows=rows)

    def local_example_indices(self, step: int) -> list[int]:
        """Indices into the training data of this process's examples of a step, in the order of ``train_batches``."""
        indices = self.task.example_indices(step)
        return [indices[row] for row in sharding.local_rows(self.config.batch_size, self.mesh)]

    def put_batch(self, batch: dict) -> dict:
        """Place this process's batch (numpy) on the mesh."""
        return sharding.put_batch(batch, self.mesh)

    def evaluate(self, variables: Any, *, source: Any = None, classes: Any = None) -> Evaluation:
        """Evaluate on a whole data set.

        Args:
          variables: variables of the model.
          source: by default the validation data.
          classes: indices of the classes that can be predicted; by default all.

        Returns:
          The result, see ``evaluation.results``. Its metric ``task.metric`` decides which checkpoint is best.
        """
        rows = sharding.local_rows(self.config.eval.batch_size, self.mesh)
        source = self.task.eval_source if source is None else source
        if not len(source):
            raise UserError("The data set to evaluate on is empty: expected at least one example.")
        batches = self.task.make_eval_batches(source, rows=rows)
        batches = without_damaged(
            batches,
            count=len(source),
            max_damaged=self.config.data.max_damaged,
            describe=functools.partial(self.task.describe_damage, source),
        )
        options = {} if classes is None else {"classes": classes}
        evaluation = self._evaluator(variables, (self.put_batch(batch) for batch in batches), **options)
        # JAX releases the arrays of the host that it has used at a garbage collection. Those of data workers are in shared
        # memory, and Python warns of a leak if they are still there at its end.
        release_unused_memory()
        return evaluation

    @functools.cached_property
    def _evaluator(self):
        return self.task.make_evaluator(self.objective.predict)

    def check_train_batch(self) -> None:
        """Raise a UserError if the training batch cannot be split over devices and accumulated steps."""
        config = self.config
        parts = self.mesh.size * config.accumulate_steps
        if config.batch_size % parts:
            raise UserError(
                f"config.batch_size {config.batch_size} is not a multiple of {parts}: {self.mesh.size} devices times "
                f"{config.accumulate_steps} accumulated steps."
            )

    def list_op_calls(self, step: str, *, every_shape: bool = True) -> dict[str, OpCall]:
        """The calls of ops in a step whose implementation can be chosen, by their keys, as one device executes them.

        Args:
          step: "train" or "eval".
          every_shape: for an evaluation, whether the sizes of the images are read, for the shapes of their arrays; of more than
            eight shapes, those with the most images are used.
        """
        train, config = step == "train", self.config
        size = (config.batch_size // config.accumulate_steps if train else config.eval.batch_size) // self.mesh.size
        if train:
            batches = self.task.train_examples(size)
        elif every_shape:
            counts = self.task.count_eval_arrays(self.task.eval_buckets)
            shapes = sorted(counts, key=lambda shape: -counts[shape])[:_MOST_SHAPES]
            batches = [self.task.eval_example(size, shape) for shape in shapes]
        else:
            batches = [self.task.example_batch(size, train=False)]
        variables = self.abstract_state.eval_variables
        with recorded_calls(differentiated=train) as calls:
            for batch in batches:
                objective = self.task.make_objective()  # a new one, since jax keeps what it has traced
                if train:
                    jax.eval_shape(objective.loss, variables, batch, jax.random.key(0))
                else:
                    jax.eval_shape(objective.predict, variables, batch)
        return calls

    def _with_choices(self, function: Callable, *, differentiated: bool) -> Callable:
        """The function, with the implementations of ``choices`` in it."""

        @functools.wraps(function)
        def with_choices(*arguments):
            with chosen_implementations(self.choices, differentiated=differentiated):
                return function(*arguments)

        return with_choices

    def count_model_flops(self) -> float:
        """Count the FLOPs of a training step per image as model FLOPs utilization (MFU) does.

        That is three times the matrix products and convolutions of the forward pass: one for it and two for the backward
        pass. Recomputation (``remat``) and products that only a fast algorithm has are not counted: the model is traced
        with its plain implementations.
        """
        objective = self.task.make_objective(implementation="plain", remat="none")
        batch = self.task.example_batch(1)
        traced = jax.make_jaxpr(objective.loss)(self.abstract_state.eval_variables, batch, jax.random.key(0))
        return 3 * count_product_flops(traced.jaxpr)

    def describe(self) -> dict[str, str]:
        """Describe the run in the rows of a table."""
        config, task, devices = self.config, self.task, jax.devices()
        parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.abstract_state.params))
        skipped = getattr(task.train_source, "skipped", {})
        parts = f" in {config.accumulate_steps} accumulated parts" if config.accumulate_steps > 1 else ""
        changes = ", ".join(f"{count:,} {name}" for name, count in skipped.items() if count)
        data, train, validation = (
            config.data.directory or config.data.name,
            len(task.train_source),
            len(task.eval_source),
        )
        return {
            "model": f"{config.model.name}, {parameters:,} parameters, {compute_dtype(config.model.dtype)}",
            "data": f"{data}: {train:,} to train, {validation:,} to validate, {task.describe_images()}",
            **({"skipped or repaired": changes} if changes else {}),
            "devices": f"{len(devices)} x {devices[0].device_kind}",
            "mesh": " x ".join(f"{axis}={size}" for axis, size in self.mesh.shape.items()),
            "batch": f"{config.batch_size} images{parts}, {self.plan.steps_per_epoch} steps per epoch",
            "length": f"{self.plan.total_steps / self.plan.steps_per_epoch:.4g} epochs, {self.plan.total_steps} steps",
        }

    def _make_init(self, objective):
        image = self.task.example_batch(1)["image"]

        def init(key):
            batch = {"image": jnp.zeros(image.shape, image.dtype)}
            return init_state(key, batch, objective=objective, optimizer=self.optimizer, ema=self.config.ema_decay > 0)

        return init


def _check_implementation(name: str) -> None:
    """Raise a ValueError if the model has no such implementation, or its kernels cannot run on these devices."""
    check_name(name)
    check_platform(name)
    if name == "triton":
        triton_kernels.check()


def _check_eval_batch(config: ConfigDict, mesh: jax.sharding.Mesh) -> None:
    if config.eval.batch_size % mesh.size:
        raise UserError(f"config.eval.batch_size {config.eval.batch_size} is not a multiple of {mesh.size} devices.")
