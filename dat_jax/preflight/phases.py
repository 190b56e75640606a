"""The parts of a check, in their order: what each process measures, and what it means."""

import dataclasses
import hashlib
import importlib.metadata
import logging
import math
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax

from dat_jax.checkpoints import compatibility
from dat_jax.checkpoints.directory import find_complete_steps, read_meta
from dat_jax.checkpoints.loading import check_exists
from dat_jax.checkpoints.manager import Checkpoints
from dat_jax.checkpoints.restore import initialize_state
from dat_jax.cli.console import format_size
from dat_jax.errors import UserError, name_some
from dat_jax.preflight import measurements
from dat_jax.preflight.session import Outcome, Session, Values, count_cores
from dat_jax.storage import Path, download, is_in_bucket, os_errors, remove, upload
from dat_jax.training.compilation import enable_cache
from dat_jax.training.implementations import choose_implementations
from dat_jax.training.memory_budget import choose_remat
from dat_jax.training.state import TrainState, copy_state
from dat_jax.training.trainer import Trainer

logger = logging.getLogger(__name__)
_PROBE_BYTES = 2**25
_SAMPLES = 64  # examples of each split that a process reads
_TOLERANCE = 1e-3  # relative difference of the gradient in float32; correct algorithms differ by 1e-6 to 1e-5
_FULL_MEMORY = 0.95


# Devices


def measure_devices(session: Session) -> dict[str, Any]:
    """Devices and versions of this process."""
    devices = jax.local_devices()
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib", "flax", "orbax-checkpoint")]
    text = session.config.to_json_best_effort(sort_keys=True)
    return {
        "devices": len(devices),
        "kind": devices[0].device_kind,
        "versions": ", ".join(versions),
        "configuration": hashlib.sha256(text.encode()).hexdigest()[:8],
    }


def describe_devices(session: Session, values: Values) -> Outcome:
    """All processes must have the same number of the same devices, the same versions and the same configuration."""
    total = sum(value["devices"] for value in values)
    problems = []
    if session.expected_devices not in (None, total):
        problems.append(
            f"Expected {session.expected_devices} devices, and jax found {total} of kind {values[0]['kind']} in "
            f"{len(values)} process{'es' * (len(values) != 1)}. "
            "Check that all processes were started, and that jax is installed for this platform."
        )
    for name, values_of_it in (
        ("devices", "numbers of devices"),
        ("kind", "kinds of devices"),
        ("versions", "versions"),
        ("configuration", "configurations"),
    ):
        found = list(dict.fromkeys(str(value[name]) for value in values))
        if len(found) > 1:
            problems.append(f"The processes have different {values_of_it}: {name_some(found)}.")
    rows = {
        "devices": f"{total} x {values[0]['kind']}",
        "processes": str(len(values)),
        "versions": values[0]["versions"],
    }
    return Outcome(rows, problems)


# Storage


def measure_storage(session: Session) -> dict[str, Any]:
    """Become the run of the scratch directory, and write and read a file there."""
    session.scratch.open_for_writing()
    try:
        write_seconds, read_seconds = _time_file(session.scratch.path / f"probe-{jax.process_index()}")
    except OSError as error:
        raise UserError(f"{session.workdir} cannot be used: {error.strerror or error}.") from error
    checkpoints = session.workdir / "checkpoints"
    with os_errors(checkpoints):
        complete = find_complete_steps(checkpoints) if checkpoints.is_dir() else []
        if not checkpoints.is_dir() and checkpoints.exists():
            raise UserError(f"{checkpoints} is a file: expected the folder of the checkpoints, or nothing.")
    cache = session.cache = enable_cache(session.config.compilation_cache)
    free = None if is_in_bucket(session.workdir) else shutil.disk_usage(session.scratch.path).free
    return {
        "write": _PROBE_BYTES / write_seconds,
        "read": _PROBE_BYTES / read_seconds,
        "free": free,
        "cache": None if cache is None else str(cache),
        "steps_done": max(complete, default=0),
        "checkpoints": len(complete),
    }


def _time_file(path: Path) -> tuple[float, float]:
    """Seconds to write and to read a file, which is removed afterwards.

    Raises:
      OSError: it cannot be written or read.
      UserError: its content has changed.
    """
    with tempfile.TemporaryDirectory(prefix="dat_jax_") as folder:
        source, copy = pathlib.Path(folder, "source", "data"), pathlib.Path(folder, "copy", "data")
        source.parent.mkdir()
        copy.parent.mkdir()
        source.write_bytes(os.urandom(_PROBE_BYTES))
        start = time.monotonic()
        if is_in_bucket(path):
            upload(source.parent, path)
            written = time.monotonic()
            download(path, copy.parent)
            remove(path)
        else:
            shutil.copyfile(source, path)
            _drop_from_cache(path)
            written = time.monotonic()
            shutil.copyfile(path, copy)
            path.unlink()
        end = time.monotonic()
        if copy.read_bytes() != source.read_bytes():
            raise UserError(f"A file that was written to {path.parent.parent} has another content when it is read.")
    return written - start, end - written


def _drop_from_cache(path: pathlib.Path) -> None:
    """Wait until a file is on the disk, and remove it from the memory of the operating system where that is possible."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):  # not on macOS
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def describe_storage(session: Session, values: Values) -> Outcome:
    """Speeds of the slowest process."""
    slowest = {name: min(value[name] for value in values) for name in ("write", "read")}
    free, done = values[0]["free"], values[0]["steps_done"]
    rows = {
        "work directory": str(session.workdir) + (f", to be resumed at step {done}" if done else ""),
        "a file of 32 MiB": f"written at {slowest['write'] / 1e6:,.0f} MB/s, read at {slowest['read'] / 1e6:,.0f} MB/s",
        **({} if free is None else {"free on the disk": format_size(free)}),
        "compiled programs": values[0]["cache"] or "not kept",
    }
    return Outcome(rows)


# Data


def measure_data(session: Session) -> dict[str, Any]:
    """Build the run, and read some examples."""
    trainer = session.trainer = Trainer(session.config)
    trainer.check_train_batch()
    trainer.task.check_data()
    for sentence in trainer.plan.warnings:
        logger.warning(sentence)
    _check_start(session)
    return {
        "train": len(trainer.task.train_source),
        "validation": len(trainer.task.eval_source),
        "damaged": measurements.find_damaged(trainer, _SAMPLES),
    }


def _check_start(session: Session) -> None:
    """Raise a UserError if the run in the work directory has another model or other data, or the initial weights are missing."""
    trainer: Trainer = session.trainer
    if step := session.steps_done:
        metadata = read_meta(session.workdir / "checkpoints" / str(step)).get("metadata", {})
        compatibility.check(metadata, trainer.config, class_names=trainer.task.class_names)
    elif trainer.config.init_from:
        try:
            check_exists(trainer.config.init_from)
        except UserError as error:
            raise UserError(f"config.init_from: {error}") from None


def describe_data(session: Session, values: Values) -> Outcome:
    """All processes must see the same data."""
    trainer: Trainer = session.trainer
    described = trainer.describe()
    problems = []
    counts = list(dict.fromkeys(f"{value['train']:,} and {value['validation']:,}" for value in values))
    if len(counts) > 1:
        problems.append(f"The processes see different numbers of training and validation images: {name_some(counts)}.")
    damaged = [reason for value in values for reason in value["damaged"]]
    if damaged:
        problems.append(f"{len(damaged)} of the examples that were read are damaged: {name_some(damaged)}")
    read = sum(min(_SAMPLES, value[split]) for value in values for split in ("train", "validation"))
    names = ("model", "data", "skipped or repaired", "mesh", "batch", "length")
    rows = {name: described[name] for name in names if name in described}
    return Outcome(rows | {"examples read": f"{read:,}, {len(damaged)} of them damaged"}, problems)


# Input


def measure_input(session: Session) -> dict[str, Any]:
    """Load images."""
    rate, count, session.batch = measurements.measure_input(session.trainer, session.seconds)
    return {"input_rate": rate, "batches": count}


def describe_input(session: Session, values: Values) -> Outcome:
    """Rates of the processes."""
    rates = [value["input_rate"] for value in values]
    slowest = "" if len(rates) == 1 else f" by the slowest process, {max(rates):,.0f} by the fastest"
    workers = session.config.data.workers
    how = f"{workers} worker processes" if workers else "threads of the process"
    count = min(value["batches"] for value in values)
    text = f"{min(rates):,.0f}{slowest}, by {how} on {count_cores()} cores, measured with {count} batches"
    return Outcome({"images/s loaded": text})


# Compilation


def measure_compilation(session: Session) -> dict[str, Any]:
    """Choose implementations of ops as the run will, and compile the training step."""
    choices = choose_implementations(session.trainer, "train", cache=session.cache)
    session.trainer = choose_remat(session.trainer)
    step = session.step = measurements.compile_train_step(session.trainer)
    return {"compile_seconds": step.seconds, "peak": step.peak, "available": step.available, "choices": choices}


def describe_compilation(session: Session, values: Values) -> Outcome:
    """The step must fit."""
    peak, available = (max(value[name] or 0 for value in values) for name in ("peak", "available"))
    rows = {"compilation": f"{max(value['compile_seconds'] for value in values):.1f} s"}
    rows["memory needed by a device"] = format_size(peak) + (f" of {format_size(available)}" if available else "")
    problems = []
    rows["implementations of ops"] = values[0]["choices"]
    if available and peak > _FULL_MEMORY * available:
        problems.append(
            f"The training step needs {format_size(peak)} of the {format_size(available)} of a device: set "
            "--config.accumulate_steps=2 or more, --config.model.remat=blocks, a smaller --config.batch_size, or a larger "
            "--config.mesh.fsdp."
        )
    del session
    return Outcome(rows, problems)


# Steps


def measure_steps(session: Session) -> dict[str, Any]:
    """Run training steps with real images."""
    state = copy_state(_make_state(session))
    seconds, loss, session.state = measurements.time_steps(session.trainer, session.step, state, session.batch)
    return {"step_seconds": seconds, "loss": loss}


def _make_state(session: Session) -> TrainState:
    """The state that the run would start from."""
    trainer: Trainer = session.trainer
    config, class_names = trainer.config, trainer.task.class_names
    if step := session.steps_done:
        directory = session.workdir / "checkpoints"
        with Checkpoints(directory, metric=trainer.task.metric, read_only=True) as checkpoints:
            return checkpoints.restore(step, trainer.abstract_state)[0]
    return initialize_state(
        config,
        class_names=class_names,
        initialize=trainer.initialize,
        initialize_from=trainer.initialize_from,
    )


def _describe_start(session: Session) -> str:
    if session.steps_done:
        return f"from the checkpoint of step {session.steps_done}"
    return f"from the weights of {session.config.init_from}" if session.config.init_from else "from new weights"


def describe_steps(session: Session, values: Values) -> Outcome:
    """The loss must be finite."""
    seconds, loss = max(value["step_seconds"] for value in values), values[0]["loss"]
    rate = session.trainer.config.batch_size / seconds
    rows = {
        "a step": f"{seconds:.4g} s, {rate:,.0f} images/s, median of three",
        "images/s to load": f"{rate / len(values):,.0f} in each process, to keep its devices busy",
        "loss after four steps": f"{loss:.4g}, {_describe_start(session)}",
    }
    problems = [] if math.isfinite(loss) else [f"The loss after four steps is {loss}."]
    return Outcome(rows, problems)


# Evaluation


def measure_evaluation(session: Session) -> dict[str, Any]:
    """Predict a batch."""
    seconds = measurements.time_prediction(session.trainer, session.state.eval_variables)
    batches = math.ceil(len(session.trainer.task.eval_source) / session.trainer.config.eval.batch_size)
    return {
        "evaluation_seconds": batches * seconds,
        "evaluation_rate": session.trainer.config.eval.batch_size / seconds,
    }


def describe_evaluation(session: Session, values: Values) -> Outcome:
    """Duration of an evaluation."""
    rate, seconds = (values[0][name] for name in ("evaluation_rate", "evaluation_seconds"))
    task = session.trainer.task
    programs = len(task.count_eval_arrays(task.eval_buckets))
    how = "" if programs == 1 else f", by {programs} programs that are compiled in the first one"
    rows = {"an evaluation": f"about {seconds:,.1f} s, {rate:,.0f} images/s{how}"}
    return Outcome(rows)


# Communication


def measure_communication(session: Session) -> dict[str, Any]:
    """Sum an array over all devices."""
    size, seconds = measurements.measure_reduction(session.trainer)
    return {"bytes": size, "seconds": seconds}


def describe_communication(session: Session, values: Values) -> Outcome:
    """Bandwidth of a ring, whose devices send and receive the array almost twice."""
    devices = session.trainer.mesh.size
    if devices == 1:
        return Outcome({"sum of the gradient": "not needed, there is one device"})
    size, seconds = values[0]["bytes"], max(value["seconds"] for value in values)
    sent = 2 * (devices - 1) / devices * size
    return Outcome(
        {"sum of the gradient": f"{size / 1e6:,.1f} MB in {1e3 * seconds:.1f} ms, {sent / seconds / 1e9:.3g} GB/s"}
    )


# Checkpoint


def measure_checkpoint(session: Session) -> dict[str, Any]:
    """Save and restore the state."""
    place: Path = session.scratch.checkpoints
    size, save, restore = measurements.measure_checkpoint(session.trainer, session.state, place)
    return {"size": size, "save_seconds": save, "restore_seconds": restore}


def describe_checkpoint(session: Session, values: Values) -> Outcome:
    """Speed, and whether the disk can hold the checkpoints of the run."""
    size = values[0]["size"]
    save, restore = (max(value[name] for value in values) for name in ("save_seconds", "restore_seconds"))
    rows = {
        "checkpoint": f"{format_size(size)}, saved in {save:.1f} s ({size / save / 1e6:,.0f} MB/s), restored in {restore:.1f} s",
        "arrays restored": "all as they were saved",
    }
    storage = session.values["storage"][0]
    # The best one and the one being written are added. Those that are there already take no further memory.
    count = max(session.config.checkpoint.keep + 2 - storage["checkpoints"], 1)
    problems = []
    if storage["free"] is not None and count * size > storage["free"]:
        problems.append(
            f"The disk of {session.workdir} has {format_size(storage['free'])} free, and the run needs up to "
            f"{format_size(count * size)} for {count} more checkpoints."
        )
    return Outcome(rows, problems)


# Algorithms


def measure_algorithms(session: Session) -> dict[str, Any]:
    """Compare fast algorithms with plain ones."""
    loss, gradient = measurements.compare_algorithms(session.trainer, session.batch)
    return {"loss": loss, "gradient": gradient}


def describe_algorithms(session: Session, values: Values) -> Outcome:
    """They must agree."""
    del session
    loss, gradient = (max(value[name] for value in values) for name in ("loss", "gradient"))
    rows = {
        "fast and plain algorithms": f"differ by {loss:.1e} in the loss and {gradient:.1e} in the gradient (float32, relative)"
    }
    wrong = not gradient <= _TOLERANCE or not loss <= _TOLERANCE
    problem = (
        f"The fast algorithms give another loss or gradient on these devices than the plain ones: relative differences "
        f"{loss:.1e} and {gradient:.1e}, expected at most {_TOLERANCE:g}. "
        "Set --config.model.implementation=plain, and report this."
    )
    return Outcome(rows, [problem] if wrong else [])


@dataclasses.dataclass(frozen=True)
class Phase:
    """A part of the check.

    Attributes:
      measure: called in every process; returns values that JSON can store.
      describe: (session, values of all processes) -> Outcome.
      needs: parts that must have succeeded.
    """

    measure: Callable[[Session], dict[str, Any]]
    describe: Callable[[Session, Values], Outcome]
    needs: tuple[str, ...] = ()


PHASES = {
    "devices": Phase(measure_devices, describe_devices),
    "storage": Phase(measure_storage, describe_storage),
    "data": Phase(measure_data, describe_data),
    "input": Phase(measure_input, describe_input, ("data",)),
    "compilation": Phase(measure_compilation, describe_compilation, ("data",)),
    "steps": Phase(measure_steps, describe_steps, ("input", "compilation")),
    "evaluation": Phase(measure_evaluation, describe_evaluation, ("steps",)),
    "communication": Phase(measure_communication, describe_communication, ("data",)),
    "checkpoint": Phase(measure_checkpoint, describe_checkpoint, ("storage", "steps")),
    "algorithms": Phase(measure_algorithms, describe_algorithms, ("input",)),
}
