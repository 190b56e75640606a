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
from dat_jax.evaluation import neighbors
from dat_jax.evaluation.results import Evaluation
from dat_jax.ops.calls import OpCall, chosen_implementations, recorded_calls
from dat_jax.ops.dispatch import check_name, check_platform, compute_dtype, target_platform
from dat_jax.ops.triton import call as triton_kernels
from dat_jax.parallel import sharding
from dat_jax.profiling.flops import count_product_flops
from dat_jax.tasks.objective import Guides, Objective
from dat_jax.tasks.registry import make_task
from dat_jax.training.adapters import with_adapters
from dat_jax.training.averaging import make_average, make_further_averages
from dat_jax.training.compilation import known_options, release_unused_memory
from dat_jax.training.model_defaults import resolve_model
from dat_jax.training.monitoring.input import without_damaged
from dat_jax.training.optimizers.named import make_optimizer
from dat_jax.training.optimizers.parameter_groups import describe_groups, find_groups, merge, select, without_frozen
from dat_jax.training.schedule import plan_run
from dat_jax.training.state import TrainState, make_state
from dat_jax.training.step import make_train_step
from dat_jax.training.teachers import Teacher, load_teacher

_MOST_SHAPES = 8  # of images in an evaluation, whose ops are listed
_INIT_STREAM = 0  # random keys: fold_in(seed, stream)


class Trainer:
    """Builds what a configuration determines, once, in this order: mesh, task and data, length, model, optimizer, state.

    Attributes:
      config: the configuration, checked, with ``model.deformable_form`` and derived values (-1) resolved.
      mesh: devices of the run.
      task: data, model, evaluation and figures, see ``tasks.task.Task``.
      plan: length of the run and its learning rates, see ``training.schedule.RunPlan``.
      groups: which parameters learn, and how fast, see ``training.optimizers.parameter_groups``.
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

        parts = math.lcm(self.mesh.size * config.accumulate_steps, config.augmentation.get("repeats", 1))
        self.plan = plan_run(self.task.config, examples=len(self.task.train_source), parts=parts)
        self.config = self.task.config = config = self.plan.config
        _check_eval_batch(config, self.mesh)

        try:
            _check_implementation(config.model.get("implementation", "auto"))
            objective = self.task.make_objective()
            # Kernels need at least one example per device; without them the same parameters need one example.
            objective = dataclasses.replace(objective, init=self.task.make_objective(implementation="auto").init)
            objective = with_adapters(objective, config.lora)
            variables = jax.eval_shape(self._make_variables(objective), jax.random.key(0))
        except (ValueError, TypeError, ArithmeticError, LookupError, StopIteration) as error:
            # Settings that do not fit together, or images that the model cannot take.
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise UserError(f"config.model cannot be built: {reason}") from error
        if config.data.get("train_sizes"):
            self._check_train_sizes(objective, variables)
        self.groups = find_groups(variables["params"], config.optimizer)
        self.optimizer = make_optimizer(self.plan.schedule, self.groups, config.optimizer)
        self._average, self._further_averages = make_average(config), make_further_averages(config)
        abstract = jax.eval_shape(self._make_state, variables)
        self.state_sharding = sharding.state_sharding(abstract, self.mesh)
        self.abstract_state = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            abstract,
            self.state_sharding,
        )
        self.objective = dataclasses.replace(
            objective,
            loss=sharding.with_whole_params(objective.loss, self.state_sharding.params, self.mesh),
            predict=self._on_mesh(objective.predict),
            embed=objective.embed and self._on_mesh(objective.embed),
        )
        self.extra_eval_sets = self.task.load_extra_eval_sets()

    def _check_train_sizes(self, objective: Objective, variables: Any) -> None:
        sizes = self.config.data.train_sizes
        if len(sizes) > self.plan.total_steps:
            raise UserError(f"config.data.train_sizes has {len(sizes)} sizes for {self.plan.total_steps} steps.")
        try:
            for batch in self.task.train_examples(1):
                jax.eval_shape(objective.predict, variables, batch)
        except (ValueError, TypeError) as error:
            raise UserError(f"config.data.train_sizes {tuple(sizes)}: {str(error).partition(chr(10))[0]}") from error

    def with_remat(self, policy: str) -> "Trainer":
        """The same run with another ``config.model.remat``, and the same data and choices."""
        config = self.config.copy_and_resolve_references()
        with config.unlocked():
            config.model.remat = policy
        sources = self.task.train_source, self.task.eval_source
        trainer = Trainer(config, devices=self.mesh.devices.ravel().tolist(), sources=sources)
        trainer.choices = self.choices
        return trainer

    def initialize(self) -> TrainState:
        """Make the state before the first step, on the mesh."""
        key = jax.random.fold_in(jax.random.key(self.config.seed), _INIT_STREAM)
        # It runs once and mostly draws random numbers: on CPU, optimizing it would take half of its compile time.
        on_cpu = jax.default_backend() == "cpu"
        options = known_options({"xla_backend_optimization_level": 0}) if on_cpu else None
        init = self._make_variables(self.objective)
        return jax.jit(
            lambda key: self._make_state(init(key)), out_shardings=self.state_sharding, compiler_options=options
        )(key)

    def initialize_from(self, variables: Mapping[str, Any]) -> TrainState:
        """Make the state before the first step from variables of the model, on the mesh.

        Args:
          variables: {"params": ..., and others}, arrays of the host or of devices.
        """
        places = {"params": self.state_sharding.params, **self.state_sharding.model_state}
        variables = jax.device_put(dict(variables), places)
        return jax.jit(self._make_state, out_shardings=self.state_sharding)(variables)

    @functools.cached_property
    def teacher(self) -> Teacher | None:
        """The model that ``config.distillation`` names, with its variables on the mesh.

        Raises:
          UserError: it cannot be loaded, or does not fit the student.
        """
        keys = self.config.get("distillation")
        if keys is None or not keys.teacher:
            return None
        assert self.objective.outputs is not None  # of a classifier
        data = self.config.data
        images = jax.ShapeDtypeStruct((1, data.image_size, data.image_size, data.channels), jnp.float32)
        outputs = jax.eval_shape(self.objective.outputs, self.abstract_state.eval_variables, images)
        teacher = load_teacher(
            keys.teacher,
            kind=keys.kind,
            class_names=self.task.class_names,
            data=data,
            batch_size=self.config.batch_size // self.config.accumulate_steps,
            tokens=outputs["tokens"].shape[1:3],
            dtype=compute_dtype(self.config.model.dtype),
        )
        places = jax.tree.map(lambda leaf: sharding.replicated(self.mesh), teacher.variables)
        return dataclasses.replace(teacher, variables=jax.device_put(teacher.variables, places))

    def bind_teacher(self, step: Callable) -> Callable[[TrainState, dict], tuple[TrainState, dict]]:
        """A training step, jitted or compiled, as a function of (state, batch): its teacher's variables are added."""
        return step if self.teacher is None else lambda *arguments: step(*self.step_arguments(*arguments))

    @functools.cached_property
    def train_step(self) -> Callable[[TrainState, dict], tuple[TrainState, dict]]:
        """The training step on the mesh: (state, batch) -> (state, metrics). It donates the state's memory."""
        return self.bind_teacher(self.jitted_train_step)

    @functools.cached_property
    def jitted_train_step(self) -> jax.stages.Wrapped:
        """The jitted training step: (state, batch), and the variables of the teacher if there is one."""
        config = self.config
        step = make_train_step(
            objective=self.objective,
            optimizer=self.optimizer,
            frozen=self.groups.frozen,
            schedule=self.plan.schedule,
            seed=config.seed,
            accumulate_steps=config.accumulate_steps,
            average=self._average,
            further_averages=self._further_averages,
            guide=self._make_guide(),
        )
        on_cpu = target_platform() == "cpu"
        # By default XLA's CPU backend starts ops as early as possible, without regard to the memory this takes.
        options = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"} if on_cpu else {}
        # On one CPU device jax 0.7.2 computes other losses from the second step on if the state is donated.
        donate = () if on_cpu and jax.__version_info__ < (0, 9, 1) else 0
        return jax.jit(
            # Around the step, since the backward pass is traced in it.
            self._with_choices(sharding.with_split_kernels(step, self.mesh), differentiated=True),
            in_shardings=(
                self.state_sharding,
                sharding.batch_sharding(self.mesh),
                *([] if self.teacher is None else [sharding.replicated(self.mesh)]),
            ),
            out_shardings=(self.state_sharding, sharding.replicated(self.mesh)),
            donate_argnums=donate,
            compiler_options=known_options(options),
        )

    def compile_train_step(self, state: TrainState, batch: dict) -> None:
        """Compile the training step for its arguments, so that the memory of the compiler is free before the first step."""
        self.jitted_train_step.lower(*self.step_arguments(state, batch)).compile()
        release_unused_memory()

    def step_arguments(self, state: TrainState, batch: dict) -> tuple:
        """The arguments of ``jitted_train_step``."""
        return (state, batch) if self.teacher is None else (state, batch, self.teacher.variables)

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
        batches = self._eval_batches(self.task.eval_source if source is None else source)
        options = {} if classes is None else {"classes": classes}
        evaluation = self._evaluator(variables, (self.put_batch(batch) for batch in batches), **options)
        _release_batches()
        return evaluation

    def evaluate_state(self, state: TrainState) -> Evaluation:
        """Evaluate the weights of a state and each of its further averages on the validation data.

        Args:
          state: a state of the run.

        Returns:
          As ``evaluate``, with the metrics of each further average, named ema_<decay>/<metric>; counts are left out.
        """
        evaluation = self.evaluate(state.eval_variables)
        metrics = dict(evaluation.metrics)
        for name, variables in state.further_variables.items():
            others = self.evaluate(variables).metrics
            metrics |= {f"ema_{name}/{metric}": value for metric, value in others.items() if isinstance(value, float)}
        return dataclasses.replace(evaluation, metrics=metrics)

    def _eval_batches(self, source: Any) -> Iterator[dict]:
        """Batches of this process (numpy) with every example of a source."""
        if not len(source):
            raise UserError("The data set to evaluate on is empty: expected at least one example.")
        return without_damaged(
            self.task.make_eval_batches(source, rows=sharding.local_rows(self.config.eval.batch_size, self.mesh)),
            count=len(source),
            max_damaged=self.config.data.max_damaged,
            describe=functools.partial(self.task.describe_damage, source),
        )

    def evaluate_neighbors(self, variables: Any) -> Evaluation:
        """Evaluate the nearest neighbors of frozen features: the training images vote for the classes of the validation images.

        Both are prepared as for an evaluation. See ``evaluation.neighbors``.

        Args:
          variables: variables of the model.

        Raises:
          UserError: the task has no feature vector per image, or the run has several processes.
        """
        embed, count = self.objective.embed, len(self.task.class_names)
        if embed is None:
            raise UserError(f"--mode=knn is for classification, got config.task {self.task.name}.")
        if jax.process_count() > 1:
            raise UserError(f"--mode=knn is for a single process, got {jax.process_count()} processes.")
        train, validation = (
            (self.put_batch(batch) for batch in self._eval_batches(source))
            for source in (self.task.report_damage(self.task.train_source), self.task.eval_source)
        )
        features, labels = neighbors.collect_features(embed, variables, train)
        predict = neighbors.make_predict(embed, neighbors=self.config.eval.neighbors, num_classes=count)
        evaluator = self.task.make_evaluator(predict)
        known = jax.device_put({"features": features, "labels": labels}, sharding.replicated(self.mesh))
        evaluation = evaluator({"model": variables, **known}, validation)
        _release_batches()
        metrics = {f"knn_{name}": value for name, value in evaluation.metrics.items() if name in ("top1", "top5")}
        return dataclasses.replace(evaluation, metrics={**metrics, "examples": evaluation.metrics["examples"]})

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

    def _make_guide(self) -> Callable[..., Guides] | None:
        """See ``training.step``."""
        mesa, teacher = self.config.get("mesa"), self.teacher
        learns_from_average = mesa is not None and mesa.weight > 0
        if teacher is None and not learns_from_average:
            return None
        assert self.objective.outputs is not None  # of a classifier
        outputs = sharding.with_whole_params(self.objective.outputs, self.state_sharding.params, self.mesh)

        def guide(state, *teacher_variables):
            return Guides(
                progress=state.step / self.plan.total_steps,
                teacher=functools.partial(teacher.outputs, *teacher_variables) if teacher is not None else None,
                average=functools.partial(outputs, state.eval_variables) if learns_from_average else None,
            )

        return guide

    def _on_mesh(self, function: Callable) -> Callable:
        """A function of an evaluation, as the devices of the mesh run it."""
        whole = sharding.with_whole_params(function, self.state_sharding.params, self.mesh)
        return self._with_choices(sharding.with_split_kernels(whole, self.mesh), differentiated=False)

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
        pass. If parameters are frozen, those of the traced backward pass count instead of two. Recomputation (``remat``) and
        products that only a fast algorithm has are not counted: the model is traced with its plain implementations. Teachers
        are not counted either.
        """
        objective = self.task.make_objective(implementation="plain", remat="none")
        batch, key = self.task.example_batch(1), jax.random.key(0)
        variables, frozen = self.abstract_state.eval_variables, self.groups.frozen

        def loss(learned, variables, batch):
            params = merge(learned, variables["params"])
            return objective.loss({**variables, "params": params}, batch, key)[0]

        learned = select(variables["params"], frozen)
        if any(jax.tree.leaves(frozen)):
            return count_product_flops(jax.make_jaxpr(jax.grad(loss))(learned, variables, batch).jaxpr)
        return 3 * count_product_flops(jax.make_jaxpr(loss)(learned, variables, batch).jaxpr)

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
            "optimizer": config.optimizer.name,
            "batch": f"{config.batch_size} images{parts}, {self.plan.steps_per_epoch} steps per epoch",
            "length": f"{self.plan.total_steps / self.plan.steps_per_epoch:.4g} epochs, {self.plan.total_steps} steps",
        }

    def get_learned_variables(self, state: TrainState) -> dict[str, Any]:
        """The variables that are evaluated, without the frozen parameters: numpy arrays in every process."""
        variables = state.eval_variables
        learned = {**variables, "params": without_frozen(variables["params"], self.groups.frozen)}
        gather = jax.jit(lambda tree: tree, out_shardings=sharding.replicated(self.mesh))
        return jax.device_get(gather(learned))

    def describe_groups(self) -> dict[str, str]:
        """Describe which parameters learn, and how fast, in the rows of a table."""
        rates: Any = jax.vmap(self.plan.schedule)(jnp.arange(self.plan.total_steps))
        return describe_groups(self.abstract_state.params, self.groups, peak_rate=float(rates.max()))

    def _make_variables(self, objective):
        image = self.task.example_batch(1)["image"]
        return lambda key: objective.init(key, {"image": jnp.zeros(image.shape, image.dtype)})

    def _make_state(self, variables):
        return make_state(
            variables,
            optimizer=self.optimizer,
            frozen=self.groups.frozen,
            averaged=self._average is not None,
            further_averages=self._further_averages,
        )


def _release_batches() -> None:
    """Release the arrays of the batches that were used, which JAX does at a garbage collection.

    Those of data workers are in shared memory, and Python warns of a leak if they are still there at its end.
    """
    release_unused_memory()


def _check_implementation(name: str) -> None:
    """Raise a ValueError if the model has no such implementation, or its kernels cannot run on these devices."""
    check_name(name)
    check_platform(name)
    if name == "triton":
        triton_kernels.check()


def _check_eval_batch(config: ConfigDict, mesh: jax.sharding.Mesh) -> None:
    if config.eval.batch_size % mesh.size:
        raise UserError(f"config.eval.batch_size {config.eval.batch_size} is not a multiple of {mesh.size} devices.")
