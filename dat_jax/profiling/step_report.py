"""The compiler's report of a configuration's steps, for a device that need not be attached.

It contains memory, FLOPs, bytes, collectives, gathers, scatters and loops.
"""

import dataclasses
import importlib.metadata
import logging
import math
import pathlib
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from dat_jax.cli.console import format_size
from dat_jax.config.validation import validate
from dat_jax.errors import UserError
from dat_jax.ops.dispatch import compiling_for, compute_dtype
from dat_jax.parallel import sharding
from dat_jax.profiling import hlo
from dat_jax.profiling.flops import count_product_flops
from dat_jax.profiling.memory import peak_bytes
from dat_jax.profiling.slices import split_collectives
from dat_jax.profiling.topologies import TARGET_CONFIG, Chip, find_devices, first_line
from dat_jax.tasks.registry import get_task_class, make_task
from dat_jax.training.compilation import known_options
from dat_jax.training.memory_budget import choose_remat
from dat_jax.training.trainer import Trainer
from dat_jax.tuning.choices import get_names, read_choices

logger = logging.getLogger(__name__)

STEPS = ("train", "eval")
# Matrix products on a GPU use cuBLAS: the compiler selects Triton tiles by timing them, and without a device it may select
# invalid ones.
COMPILER_OPTIONS = {"gpu": {"xla_gpu_enable_triton_gemm": False}}
_TRAFFIC = ("bytes", "padded_bytes", "hbm_bytes")  # keys of ``hlo.traffic``
_BATCH_UNIT = 8  # examples per chip, for ``find_batch``
_LARGEST_BATCH = 2**14


@dataclasses.dataclass(frozen=True)
class StandIn:
    """Placeholder for a data set: what a run needs to know of it before the first step.

    Attributes:
      examples: number of examples.
      class_names: names of the classes.
      has_masks: whether objects have masks.
    """

    examples: int
    class_names: tuple[str, ...]
    has_masks: bool = True

    @property
    def category_ids(self) -> tuple[int, ...]:
        """Category ids of the classes."""
        return tuple(range(len(self.class_names)))

    def __len__(self) -> int:
        return self.examples


def compile_report(
    config: ConfigDict,
    *,
    topology: str,
    slices: int = 1,
    steps: Sequence[str] = STEPS,
    sources: tuple[Any, Any] | None = None,
    target_config: str | pathlib.Path = TARGET_CONFIG,
    top: int = 0,
    choices_file: str | None = None,
) -> dict[str, Any]:
    """Compile the steps of a run and collect the compiler's report. Every number is per chip.

    Args:
      config: configuration of the run. Its batch sizes are totals over all chips.
      topology, slices: see ``find_devices``. Batch sizes are totals over all slices.
      steps: "train", "eval" or both. The "eval" step is the prediction for a batch, which dominates the time of an
        evaluation.
      sources: training and validation data, such as StandIns; by default those that ``config.data`` names.
      target_config: see ``find_devices``.
      top: number of rows in the tables of bytes by op and by module.
      choices_file: file of choices of implementations of ops, see ``tuning.choices``, or None.

    Returns:
      {"topology", "slices", "chips": number in all slices, "device", "model", "images", "dtype", "versions", "steps": step ->
      report}, see ``report_step``.

    Raises:
      UserError: settings do not fit together, or compilation fails for another reason than memory.
    """
    chip, devices = find_devices(topology, slices=slices, target_config=target_config)
    config = _without_files(config)
    validate(config)
    with compiling_for(chip.platform):
        trainer = Trainer(config, devices=devices, sources=sources)
        if choices_file is not None:
            trainer.choices = _read_choices(choices_file, trainer, steps)
        if "train" in steps:
            trainer.check_train_batch()
            trainer = choose_remat(trainer, compiler_options=known_options(COMPILER_OPTIONS.get(chip.platform, {})))
        return {
            "topology": topology,
            "slices": sharding.count_slices(trainer.mesh),
            "chips": len(devices),
            "device": devices[0].device_kind,
            "model": config.model.name,
            "images": trainer.task.describe_images(),
            "dtype": str(compute_dtype(config.model.dtype)),
            "versions": _versions(chip.platform),
            "steps": {step: report_step(trainer, step, chip=chip, top=top) for step in steps},
        }


def _read_choices(path: str, trainer: Trainer, steps: Sequence[str]) -> dict[str, str]:
    """Names of the chosen implementations. It is said for how many of the calls of the steps there are choices."""
    if (implementation := trainer.config.model.get("implementation", "auto")) != "auto":
        raise UserError(f"Choices have no effect with config.model.implementation={implementation}; set it to auto.")
    choices = get_names(read_choices(path, device_kind=trainer.mesh.devices.ravel()[0].device_kind))
    calls = {key for step in steps for key in trainer.list_op_calls(step, every_shape=False)}
    found = len(calls & choices.keys())
    if not found:
        raise UserError(
            f"{path} has no choice for any of the {len(calls)} calls of ops in this run: `dat-jax tune` needs the same flags."
        )
    logger.info("%s has choices for %d of the %d calls of ops.", path, found, len(calls))
    return choices


def _without_files(config: ConfigDict) -> ConfigDict:
    """Copy of a configuration without the paths of files that the steps do not read."""
    config = ConfigDict(config.to_dict())
    if isinstance(config.get("eval"), ConfigDict) and isinstance(config.eval.get("sets"), ConfigDict):
        config.eval.sets = {name: "" for name in config.eval.sets}
    return config


def report_step(trainer: Trainer, step: str, *, chip: Chip, top: int = 0) -> dict[str, Any]:
    """Lower and compile one step of a run, within ``compiling_for`` of the chip's platform.

    Returns:
      A dict with bytes and FLOPs per chip:
        "batch_size": total over all chips.
        "batch_size_per_chip": batch size per chip.
        "fits": whether the peak memory is available. If compilation ran out of memory, "message" is the compiler's message,
          and the keys from "cost" on are missing.
        "lower_seconds", "compile_seconds": times of tracing with lowering, and of compilation.
        "memory": sizes by use, in bytes.
        "cost": FLOPs and bytes by the compiler's estimate, by the traced program, and by the compiled program.
        "roofline": lower bounds of the time per step, empty for an unknown chip.
        "collectives", "gather", "scatter": see ``hlo.collectives`` and ``hlo.count_indexed``. On several slices, "collectives"
          are those inside a slice, and "collectives_between_slices" the others, see ``slices.split_collectives``.
        "loops": trip count of each loop, None if it is unknown.
        "top": tables of bytes by op and by module, if ``top`` is not 0.
      If the compiled program cannot be read, "unread" is the reason, the keys from "roofline" on are missing, and "cost"
      lacks the counts of the compiled program.
    """
    function, arguments, batch_size = step_function(trainer, step)
    start = time.perf_counter()
    traced = function.trace(*arguments)
    lowered = traced.lower()
    lowered_at = time.perf_counter()
    report = {
        "batch_size": batch_size,
        "batch_size_per_chip": batch_size // trainer.mesh.size,
        "fits": False,
        "memory": {**_state_bytes(trainer, step), "available": chip.memory_bytes},
        "lower_seconds": lowered_at - start,
    }
    try:
        compiled = lowered.compile(known_options(COMPILER_OPTIONS.get(chip.platform, {})))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise UserError(f"Compilation of the {step} step failed: {first_line(error)}") from error
        return {**report, "message": _memory_message(error), "compile_seconds": time.perf_counter() - lowered_at}
    report["compile_seconds"] = time.perf_counter() - lowered_at
    memory = report["memory"] = _memory(
        compiled.memory_analysis(), _state_bytes(trainer, step), available=chip.memory_bytes
    )
    report["fits"] = chip.memory_bytes is None or memory["peak"] <= chip.memory_bytes
    product_flops = count_product_flops(traced.jaxpr.jaxpr) / trainer.mesh.size
    try:
        module = hlo.parse(compiled.as_text() or "")
    except jax.errors.JaxRuntimeError as error:  # with libtpu 0.0.52, for large programs on v5p
        report["unread"] = first_line(error)
        report["cost"] = _cost(compiled, None, product_flops)
        return report
    by_opcode, by_path = hlo.traffic(module)
    report["cost"] = _cost(compiled, by_opcode, product_flops)
    report["roofline"] = _roofline(report["cost"], chip, report["batch_size_per_chip"])
    report |= _collectives(module, trainer.mesh)
    report |= {opcode: hlo.count_indexed(module, opcode) for opcode in ("gather", "scatter")}
    report["loops"] = [hlo.trip_count(module, i) for _, i in module if i.opcode == "while"]
    if top:
        report["top"] = {"op": _largest(by_opcode, top), "module": _largest(by_path, top)}
    return report


def _collectives(module: hlo.Module, mesh: jax.sharding.Mesh) -> dict[str, dict]:
    slices = sharding.count_slices(mesh)
    if slices == 1:
        return {"collectives": hlo.collectives(module)}
    inside, between = split_collectives(module, mesh.size // slices)
    return {"collectives": inside, "collectives_between_slices": between}


def step_function(trainer: Trainer, step: str):
    """A step of a run, "train" or "eval", with the shardings of the run.

    Returns:
      The jitted function, its arguments as ShapeDtypeStructs, and the batch size.
    """
    train = step == "train"
    size = trainer.config.batch_size if train else trainer.config.eval.batch_size
    where = sharding.batch_sharding(trainer.mesh)
    batch = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
        for name, leaf in trainer.task.example_batch(size, train=train).items()
    }
    if train:
        return trainer.jitted_train_step, trainer.step_arguments(trainer.abstract_state, batch), size
    return jax.jit(trainer.objective.predict), (trainer.abstract_state.eval_variables, batch), size


def _state_bytes(trainer, step) -> dict[str, int]:
    def count(tree):
        return sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
        )

    state = trainer.abstract_state
    if step == "eval":
        return {"parameters": count(state.eval_variables)}
    return {
        "parameters": count(state.params),
        "averaged_parameters": count((state.ema_params, state.further_averages)),
        "optimizer_state": count(state.opt_state),
    }


def _memory(stats, state: dict[str, int], *, available: float | None) -> dict[str, Any]:  # only "available" can be None
    """Memory by use, see ``peak_bytes`` for the peak.

    Args:
      stats: result of ``memory_analysis``.
      state: bytes of the parts of the train state.
      available: memory of the chip, or None.
    """
    arguments, outputs = stats.argument_size_in_bytes, stats.output_size_in_bytes
    return {
        **state,
        "other_arguments": max(arguments - sum(state.values()), 0),  # the batch, the model state, and padding
        "outputs": outputs,
        "outputs_in_place": stats.alias_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "generated_code": stats.generated_code_size_in_bytes,
        "peak": peak_bytes(stats),
        "available": available,
    }


def _cost(compiled, by_opcode, product_flops: float) -> dict[str, float | None]:
    """Costs by the compiler's estimate and by our counts.

    The compiler's estimate counts the body of a loop once; on a GPU it is None. Our counts include every iteration; those of
    the compiled program are None if it cannot be read.
    """
    analysis = compiled.cost_analysis() or {}
    return {
        "flops": analysis.get("flops"),
        "bytes_accessed": analysis.get("bytes accessed"),
        "product_flops": product_flops,
        **{key: by_opcode and sum(c[key] for c in by_opcode.values()) for key in _TRAFFIC},
    }


def _roofline(cost, chip: Chip, batch: int) -> dict[str, Any]:
    """Lower bounds of the time per step from peak FLOP/s and from memory bandwidth.

    FLOPs and bytes are the larger of the compiler's estimate, which may be missing or count loops once, and our counts.
    """
    if chip.flops_per_second is None or chip.bytes_per_second is None:
        return {}
    seconds = {
        "compute_seconds": max(cost["flops"] or 0, cost["product_flops"]) / chip.flops_per_second,
        "memory_seconds": max(cost["bytes_accessed"] or 0, cost["padded_bytes"]) / chip.bytes_per_second,
        "hbm_seconds": cost["hbm_bytes"] / chip.bytes_per_second,
    }
    bound = "compute" if seconds["compute_seconds"] >= seconds["memory_seconds"] else "memory"
    slowest = max(seconds["compute_seconds"], seconds["memory_seconds"])
    return {**seconds, "binds": bound, "images_per_second": batch / slowest if slowest else None}


def _largest(table: dict, top: int) -> list[dict]:
    names = sorted(table, key=lambda name: table[name]["padded_bytes"], reverse=True)
    return [{"name": name, **table[name]} for name in names[:top]]


def largest_that_fits(fits: Callable[[int], bool], *, unit: int, limit: int) -> int:
    """Largest multiple of ``unit`` up to ``limit`` that fits, or 0, by doubling and then bisection."""
    low, high = 0, unit
    while high <= limit and fits(high):
        low, high = high, 2 * high
    if high > limit:
        high = limit + unit
    while high - low > unit:
        middle = (low + high) // 2 // unit * unit
        if fits(middle):
            low = middle
        else:
            high = middle
    return low


def find_batch(
    config: ConfigDict, step: str, *, topology: str, slices: int = 1, sources: tuple[Any, Any], **options
) -> dict[str, Any]:
    """Report of a step with the largest batch size that fits. Every batch size that is tried is logged.

    The batch size per chip is a multiple of 8, for the train step of 8 times ``accumulate_steps``.

    Args:
      config: see ``compile_report``.
      step: "train" or "eval".
      topology, slices: see ``compile_report``.
      sources: data whose class names are used; the number of examples is replaced by a sufficient one.
      **options: other arguments of ``compile_report``.

    Raises:
      UserError: the smallest batch size does not fit.
    """
    target_config = options.get("target_config", TARGET_CONFIG)
    chips = len(find_devices(topology, slices=slices, target_config=target_config)[1])
    train_source, eval_source = (StandIn(_LARGEST_BATCH * chips, source.class_names) for source in sources)
    sources = (train_source, eval_source)
    reports: dict[int, dict] = {}

    def fits(batch: int) -> bool:
        candidate = ConfigDict(config.to_dict())
        candidate.batch_size = batch * chips
        candidate.eval.batch_size = batch * chips
        reports[batch] = compile_report(
            candidate, topology=topology, slices=slices, steps=(step,), sources=sources, **options
        )
        report = reports[batch]["steps"][step]
        verdict = f"fits, peak {format_size(report['memory']['peak'])}" if report["fits"] else "does not fit"
        logger.info("%s: batch size %d per chip %s.", step, batch, verdict)
        return report["fits"]

    unit = _BATCH_UNIT * (config.accumulate_steps if step == "train" else 1)
    largest = largest_that_fits(fits, unit=unit, limit=_LARGEST_BATCH)
    if not largest:
        name = f"{slices} x {topology}" if slices > 1 else topology
        raise UserError(f"The {step} step does not fit on {name} even with a batch size of {unit} per chip.")
    return reports[largest]


def _versions(platform: str) -> dict[str, str]:
    packages = {"tpu": ["libtpu"], "gpu": ["jax-cuda12-plugin", "nvidia-cudnn-cu12"], "cpu": []}[platform]
    versions = {}
    for package in ["jax", "jaxlib", *packages]:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "unknown"
    return versions


def _memory_message(error: Exception) -> str:
    """Sentences of the compiler's message that contain sizes, without its list of allocations."""
    lines = [line.strip() for line in str(error).splitlines() if re.search(r"\d(\.\d+)?[KMGT]i?B?\b", line)]
    return " ".join(" ".join(lines or [first_line(error)]).split())[:800]


def make_sources(config: ConfigDict, *, classes: int | None, examples: int) -> tuple[Any, Any]:
    """Training and validation data for ``compile_report``, without reading a data set.

    Args:
      config: configuration of a run.
      classes: number of classes of the data set, by default that of the published models of the task.
      examples: number of examples of the data set.

    Returns:
      StandIns if ``config.data.directory`` names a data set, otherwise the embedded data.
    """
    if config.data.directory:
        classes = classes or get_task_class(config.task).published_classes
        source = StandIn(examples, tuple(map(str, range(classes))))
        return source, source
    task = make_task(config)
    return task.train_source, task.eval_source
