"""Measurements before a run: speed of input, compilation, steps, communication and checkpoints, and errors of fast algorithms."""

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dat_jax.checkpoints import compatibility
from dat_jax.checkpoints.manager import Checkpoints
from dat_jax.data.sources import spread_indices
from dat_jax.errors import UserError
from dat_jax.parallel import sharding
from dat_jax.profiling.memory import peak_bytes
from dat_jax.profiling.step_report import step_function
from dat_jax.profiling.topologies import find_chip, first_line
from dat_jax.storage import Path
from dat_jax.training.state import TrainState
from dat_jax.training.trainer import Trainer

_TIMED = 3  # repetitions; the median counts
_MAX_INPUT_SECONDS = 120.0
_MIN_INPUT_BATCHES = 5
_BUFFERED_BATCHES = 5  # that the loader has loaded ahead, besides two of each worker


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """A compiled training step.

    Attributes:
      run: (state, batch) -> (state, metrics), on the devices.
      seconds: of tracing and compilation.
      peak: bytes of one device in use at most, by the compiler's analysis.
      available: bytes of memory of one device, None if that is unknown.
    """

    run: Callable[[TrainState, dict], tuple[TrainState, dict]]
    seconds: float
    peak: int
    available: int | None


def find_damaged(trainer: Trainer, count: int) -> list[str]:
    """Read examples that are spread over the training and the validation data. Returns why some cannot be read.

    Args:
      trainer: the run.
      count: number of examples of each.
    """
    found = []
    for source in (trainer.task.train_source, trainer.task.eval_source):
        reasons = (trainer.task.describe_damage(source, index) for index in spread_indices(len(source), count))
        found += [reason for reason in reasons if reason]
    return found


def measure_input(trainer: Trainer, seconds: float) -> tuple[float, int, dict]:
    """Load training batches, while the devices do nothing.

    Args:
      trainer: the run.
      seconds: for how long at least; longer until five batches were loaded, but not much longer than two minutes. Before that,
        the batches that were loaded ahead are taken, for the same time at most.

    Returns:
      Images per second of this process, the number of batches, and the last batch of this process (numpy).
    """
    with contextlib.closing(trainer.train_batches(start_step=0)) as batches:  # pyright: ignore[reportArgumentType] (a generator)
        batch = next(batches)
        start = time.monotonic()
        for _ in range(_BUFFERED_BATCHES + 2 * trainer.config.data.workers):
            if time.monotonic() - start > max(seconds, 1.0):
                break
            batch = next(batches)
        start, count = time.monotonic(), 0
        while True:
            batch = next(batches)
            count += 1
            spent = time.monotonic() - start
            if spent > _MAX_INPUT_SECONDS or (spent > seconds and count >= _MIN_INPUT_BATCHES):
                break
    names = trainer.task.example_batch(1).keys()  # the others are counts of damaged images
    return count * len(batch["image"]) / spent, count, {name: batch[name] for name in names}


def compile_train_step(trainer: Trainer) -> CompiledStep:
    """Compile the training step.

    Raises:
      UserError: it does not fit in the memory of the devices, or cannot be compiled.
    """
    function, arguments, _ = step_function(trainer, "train")
    start = time.monotonic()
    try:
        compiled: Any = function.lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise UserError(f"The training step does not fit in the memory of a device: {first_line(error)}") from error
        raise UserError(f"The training step cannot be compiled: {first_line(error)}") from error
    return CompiledStep(
        run=trainer.bind_teacher(compiled),
        seconds=time.monotonic() - start,
        peak=peak_bytes(compiled.memory_analysis()),
        available=_find_memory(trainer.mesh.devices.ravel()[0]),
    )


def _find_memory(device: Any) -> int | None:
    stats = device.memory_stats() if device.process_index == jax.process_index() else None
    chip = find_chip(device.device_kind)
    known = chip.memory_bytes if chip is not None else None
    return int((stats or {}).get("bytes_limit") or known or 0) or None


def time_steps(trainer: Trainer, step: CompiledStep, state: TrainState, batch: dict) -> tuple[float, float, TrainState]:
    """Run four training steps and time the last three.

    Args:
      trainer: the run.
      step: its compiled step.
      state: the state before the steps, whose memory is reused.
      batch: a batch of this process (numpy).

    Returns:
      Seconds of a step (median), the loss of the last one, and the state after it.

    Raises:
      UserError: the memory of the devices is exhausted.
    """
    on_devices = trainer.put_batch(batch)
    seconds: list[float] = []
    metrics: dict[str, Any] = {}
    with _memory_errors("The training step"):
        for _ in range(1 + _TIMED):
            start = time.monotonic()
            state, metrics = step.run(state, on_devices)
            jax.block_until_ready((state, metrics))
            seconds.append(time.monotonic() - start)
    return statistics.median(seconds[1:]), float(metrics["loss"]), state


def time_prediction(trainer: Trainer, variables: Any) -> float:
    """Seconds to predict a batch of an evaluation, with arrays of its usual size.

    Raises:
      UserError: the memory of the devices is exhausted.
    """
    function, (_, shapes), _ = step_function(trainer, "eval")
    rows = len(sharding.local_rows(trainer.config.eval.batch_size, trainer.mesh))
    batch = {name: np.zeros((rows, *leaf.shape[1:]), leaf.dtype) for name, leaf in shapes.items()}
    on_devices = trainer.put_batch(batch)
    with _memory_errors("The evaluation"):
        jax.block_until_ready(function(variables, on_devices))
        return _time(lambda: function(variables, on_devices))


@contextlib.contextmanager
def _memory_errors(what: str) -> Iterator[None]:
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"{what} fails on the devices: {first_line(error)}") from error


def measure_reduction(trainer: Trainer) -> tuple[int, float]:
    """Sum an array of the size of the gradient over all devices, as every training step does. Returns its bytes and seconds."""
    mesh = trainer.mesh
    parameters = sum(leaf.size for leaf in jax.tree.leaves(trainer.abstract_state.params))
    local = sum(device.process_index == jax.process_index() for device in mesh.devices.ravel())
    gradients = sharding.put_batch(np.ones((local, parameters), np.float32), mesh)
    reduce = jax.jit(lambda array: array.sum(0), out_shardings=sharding.replicated(mesh))
    jax.block_until_ready(reduce(gradients))
    return 4 * parameters, _time(lambda: reduce(gradients))


def _time(function: Callable[[], Any]) -> float:
    """Median of the seconds of a function whose results are on devices."""
    seconds = []
    for _ in range(_TIMED):
        start = time.monotonic()
        jax.block_until_ready(function())
        seconds.append(time.monotonic() - start)
    return statistics.median(seconds)


def measure_checkpoint(trainer: Trainer, state: TrainState, directory: Path) -> tuple[int, float, float]:
    """Save a checkpoint and restore it. Every array that is restored is compared with what was saved.

    Args:
      trainer: the run.
      state: the state to save.
      directory: an empty folder of all processes.

    Returns:
      Bytes of the state, and seconds to save and to restore it.

    Raises:
      UserError: it cannot be saved or restored, or was damaged.
    """
    metadata = compatibility.describe(trainer.config, step=int(state.step), class_names=trainer.task.class_names)
    start = time.monotonic()
    with Checkpoints(directory, metric=trainer.task.metric) as checkpoints:
        checkpoints.save(state, metadata=metadata)
        steps = checkpoints.steps()  # waits until it is written
        saved = time.monotonic()
        if int(state.step) not in steps:
            raise UserError(f"A checkpoint cannot be saved in {directory}, see the warning above.")
        checkpoints.restore(int(state.step), trainer.abstract_state)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(trainer.abstract_state))
    return size, saved - start, time.monotonic() - saved


def compare_algorithms(trainer: Trainer, batch: dict) -> tuple[float, float]:
    """Compare the fast algorithms with the plain ones, on these devices.

    Loss and gradient of one image per device are computed in float32, with random weights. The fast algorithms are the defaults,
    or the kernels of ``config.model.implementation``. Choices by measurement are for the batch and dtype of the run, so they do
    not apply here; they were compared with the plain implementations when they were made.

    Args:
      trainer: the run.
      batch: a batch of this process (numpy).

    Returns:
      Relative differences of the loss, and of the gradient of all parameters (Euclidean norms).
    """
    local = sum(device.process_index == jax.process_index() for device in trainer.mesh.devices.ravel())
    few = trainer.put_batch({name: array[:local] for name, array in batch.items()})
    key = jax.random.key(0)
    variables = trainer.initialize().eval_variables

    def compute(**settings):
        objective = trainer.task.make_objective(dtype="float32", **settings)

        def loss(params, rest, batch):
            return objective.loss({**rest, "params": params}, batch, key)[0]

        function = sharding.with_split_kernels(jax.value_and_grad(loss), trainer.mesh)
        params, rest = variables["params"], {name: tree for name, tree in variables.items() if name != "params"}
        with jax.default_matmul_precision("highest"):
            return jax.jit(function)(params, rest, few)

    loss, gradient = compute()
    plain_loss, plain_gradient = compute(implementation="plain", remat="none")

    @jax.jit
    def compare(first, second):
        squares = [(jnp.sum((a - b) ** 2), jnp.sum(b**2)) for a, b in zip(first, second, strict=True)]
        return jnp.sqrt(sum(a for a, _ in squares) / sum(b for _, b in squares))

    difference = compare(jax.tree.leaves(gradient), jax.tree.leaves(plain_gradient))
    return abs(float(loss) - float(plain_loss)) / abs(float(plain_loss)), float(difference)
