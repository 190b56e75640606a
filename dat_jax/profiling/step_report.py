"""What a compiler says of a configuration's steps, for a TPU or GPU that is not there: memory, FLOPs, bytes, collectives."""

import dataclasses
import importlib.metadata
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
from dat_jax.profiling.topologies import TARGET_CONFIG, Chip, find_devices, first_line
from dat_jax.tasks.registry import make_task
from dat_jax.training.compilation import known_options
from dat_jax.training.trainer import Trainer

STEPS = ("train", "eval")
# Products of a GPU go to its library: their tiles are chosen by timing, and without a device some are taken that do not work.
_COMPILER_OPTIONS = {"gpu": {"xla_gpu_enable_triton_gemm": False}}
_READ_COSTS = ("bytes", "padded_bytes", "hbm_bytes")  # from the compiled text
_BATCH_UNIT = 8  # of --find_batch, examples a chip
_LARGEST_BATCH = 2**14


@dataclasses.dataclass(frozen=True)
class StandIn:
    """What a run asks of a data set before its first step: how many examples there are, and what they are of."""

    examples: int
    class_names: tuple[str, ...]
    has_masks: bool = True

    @property
    def category_ids(self) -> tuple[int, ...]:
        """Of the classes."""
        return tuple(range(len(self.class_names)))

    def __len__(self) -> int:
        return self.examples


def compile_report(
    config: ConfigDict,
    *,
    topology: str,
    steps: Sequence[str] = STEPS,
    sources: tuple[Any, Any] | None = None,
    target_config: str | pathlib.Path = TARGET_CONFIG,
    top: int = 0,
) -> dict[str, Any]:
    """Compiles the steps of a run and collects what the compiler says, every number for one chip.

    Args:
      config: of a run; batch sizes are over all chips.
      topology, target_config: see ``find_devices``.
      steps: of "train" and "eval". "eval" is the logits of a batch, which is what an evaluation spends its time on.
      sources: of the run, such as StandIns; those that ``config.data`` names, unless given.
      top: rows of the tables of bytes by op.

    Returns:
      {"topology", "chips", "device", "dtype", "versions", "steps": step -> its report}; see ``report_step``.

    Raises:
      UserError: what does not fit together, or what the compiler refuses for another reason than memory.
    """
    chip, devices = find_devices(topology, target_config=target_config)
    config = _without_files(config)
    validate(config)
    with compiling_for(chip.platform):
        trainer = Trainer(config, devices=devices, sources=sources)
        if "train" in steps:
            trainer.check_train_batch()
        return {
            "topology": topology,
            "chips": len(devices),
            "device": devices[0].device_kind,
            "model": config.model.name,
            "images": trainer.task.describe_images(),
            "dtype": str(compute_dtype(config.model.dtype)),
            "versions": _versions(chip.platform),
            "steps": {step: report_step(trainer, step, chip=chip, top=top) for step in steps},
        }


def _without_files(config: ConfigDict) -> ConfigDict:
    """Nothing that is only read before or after the steps has to be there."""
    config = ConfigDict(config.to_dict())
    if isinstance(config.get("eval"), ConfigDict) and isinstance(config.eval.get("sets"), ConfigDict):
        config.eval.sets = {name: "" for name in config.eval.sets}
    return config


def report_step(trainer: Trainer, step: str, *, chip: Chip, top: int = 0) -> dict[str, Any]:
    """Lowers and compiles one step of a run. The caller has set ``compiling_for``.

    Returns:
      Bytes and FLOPs of one chip: "batch_size" over all chips, "fits", "message" of the compiler where
      it does not; "memory", "cost", "roofline", "collectives", "gather", "scatter", "loops", "lower_seconds",
      "compile_seconds", and "top" where asked for. Of a step that does not fit only those up to "memory" are known; where
      the compiled text cannot be read "unread" says why, and of "cost" only the compiler's counts are known.
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
        compiled = lowered.compile(known_options(_COMPILER_OPTIONS.get(chip.platform, {})))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise UserError(f"The compiler refuses the {step} step: {first_line(error)}") from error
        return {**report, "message": _memory_message(error), "compile_seconds": time.perf_counter() - lowered_at}
    report["compile_seconds"] = time.perf_counter() - lowered_at
    report["memory"] = _memory(compiled.memory_analysis(), _state_bytes(trainer, step), available=chip.memory_bytes)
    report["fits"] = chip.memory_bytes is None or report["memory"]["peak"] <= chip.memory_bytes
    product_flops = count_product_flops(traced.jaxpr.jaxpr) / trainer.mesh.size
    try:
        module = hlo.parse(compiled.as_text())
    except jax.errors.JaxRuntimeError as error:  # libtpu 0.0.52 and large programs for v5p
        report["unread"] = first_line(error)
        report["cost"] = _cost(compiled, None, product_flops)
        return report
    by_opcode, by_path = hlo.traffic(module)
    report["cost"] = _cost(compiled, by_opcode, product_flops)
    report["roofline"] = _roofline(report["cost"], chip, report["batch_size_per_chip"])
    report["collectives"] = hlo.collectives(module)
    report |= {opcode: hlo.count_indexed(module, opcode) for opcode in ("gather", "scatter")}
    report["loops"] = [hlo.trip_count(module, i) for _, i in module if i.opcode == "while"]
    if top:
        report["top"] = {"op": _largest(by_opcode, top), "module": _largest(by_path, top)}
    return report


def step_function(trainer: Trainer, step: str):
    """(jitted function, abstract arguments, batch size) of the "train" or the "eval" step, with the run's shardings."""
    train = step == "train"
    size = trainer.config.batch_size if train else trainer.config.eval.batch_size
    where = sharding.batch_sharding(trainer.mesh)
    batch = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
        for name, leaf in trainer.task.example_batch(size, train=train).items()
    }
    if train:
        return trainer.train_step, (trainer.abstract_state, batch), size
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
        "averaged_parameters": count(state.ema_params),
        "optimizer_state": count(state.opt_state),
    }


def _memory(stats, state: dict[str, int], *, available: float | None) -> dict[str, float | None]:
    """Of ``memory_analysis``. The peak: arguments, results that do not take their place, temporaries and code at once."""
    arguments, outputs = stats.argument_size_in_bytes, stats.output_size_in_bytes
    return {
        **state,
        "other_arguments": max(arguments - sum(state.values()), 0),  # the batch, model state, and padding of all
        "outputs": outputs,
        "outputs_in_place": stats.alias_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "generated_code": stats.generated_code_size_in_bytes,
        "peak": arguments
        + outputs
        - stats.alias_size_in_bytes
        + stats.temp_size_in_bytes
        + stats.generated_code_size_in_bytes,
        "available": available,
    }


def _cost(compiled, by_opcode, product_flops: float) -> dict[str, float | None]:
    """The compiler's own count (a loop's body once; None on a GPU) and ours (as often as it runs; None without a text)."""
    analysis = compiled.cost_analysis() or {}
    return {
        "flops": analysis.get("flops"),
        "bytes_accessed": analysis.get("bytes accessed"),
        "product_flops": product_flops,
        **{key: by_opcode and sum(c[key] for c in by_opcode.values()) for key in _READ_COSTS},
    }


def _roofline(cost, chip: Chip, batch: int) -> dict[str, Any]:
    """Least seconds a step, by what binds; "memory" is the compiler's count of bytes, or ours where it has none or loops."""
    if chip.flops_per_second is None:
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
    """The largest multiple of ``unit`` up to ``limit`` that fits, or 0; doubling first, then halving the interval."""
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
    config: ConfigDict, step: str, *, topology: str, sources: tuple[Any, Any], note: Callable[[str], None], **options
) -> dict[str, Any]:
    """The report of a step with the largest batch a chip that fits, a multiple of 8 for each accumulated part.

    Args:
      config, topology, options: of ``compile_report``.
      step: "train" or "eval".
      sources: their classes count; there are always enough examples.
      note: is told of every batch that was tried.

    Raises:
      UserError: not even the smallest fits.
    """
    chips = len(find_devices(topology, target_config=options.get("target_config", TARGET_CONFIG))[1])
    sources = tuple(StandIn(_LARGEST_BATCH * chips, source.class_names) for source in sources)
    reports: dict[int, dict] = {}

    def fits(batch: int) -> bool:
        tried = ConfigDict(config.to_dict())
        tried.batch_size = batch * chips
        tried.eval.batch_size = batch * chips
        reports[batch] = compile_report(tried, topology=topology, steps=(step,), sources=sources, **options)
        report = reports[batch]["steps"][step]
        verdict = f"fits, peak {format_size(report['memory']['peak'])}" if report["fits"] else "does not fit"
        note(f"{step}: a batch of {batch} a chip {verdict}.")
        return report["fits"]

    unit = _BATCH_UNIT * (config.accumulate_steps if step == "train" else 1)
    largest = largest_that_fits(fits, unit=unit, limit=_LARGEST_BATCH)
    if not largest:
        raise UserError(f"Not even a batch of {unit} a chip fits the {step} step on {topology}.")
    return reports[largest]


def _versions(platform: str) -> dict[str, str]:
    packages = {"tpu": ["libtpu"], "gpu": ["jax-cuda12-plugin", "nvidia-cudnn-cu12"], "cpu": []}[platform]
    found = {}
    for package in ["jax", "jaxlib", *packages]:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "unknown"
    return found


def _memory_message(error: Exception) -> str:
    """The compiler's sentences with its numbers, without its list of allocations."""
    lines = [line.strip() for line in str(error).splitlines() if re.search(r"\d(\.\d+)?[KMGT]i?B?\b", line)]
    return " ".join(" ".join(lines or [first_line(error)]).split())[:800]


def make_sources(config: ConfigDict, *, classes: int, examples: int) -> tuple[Any, Any]:
    """Stand-ins where ``config.data.directory`` names a data set, else the embedded data themselves."""
    if config.data.directory:
        return (StandIn(examples, tuple(map(str, range(classes)))),) * 2
    task = make_task(config)
    return task.train_source, task.eval_source
