"""The steps of a run as the project makes them, compiled and run in a fresh process."""

import ctypes
import functools
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from dat_jax.config import get_classification_config
from dat_jax.models.registry import VARIANTS
from dat_jax.profiling.step_report import StandIn, step_function
from dat_jax.training.monitoring.throughput import peak_host_memory
from dat_jax.training.trainer import Trainer
from experiments import measure

CLASSES = 1000


def make_config(variant: str, *, batch: int, image_side: int, dtype: str = "float32", **model) -> ConfigDict:
    """The shared recipe with a variant, as it is trained; attributes of the model may follow."""
    config = get_classification_config()
    rate = VARIANTS[variant].get("drop_path_rate", 0.0)
    config.model = ConfigDict(dict(name=variant, dtype=dtype, drop_path_rate=rate) | model)
    config.data.image_size = image_side
    config.data.eval_resize = max(256, image_side)
    config.batch_size = config.eval.batch_size = batch
    return config


def make_step(config: ConfigDict, step: str, **options) -> tuple[Any, tuple]:
    """(jitted function, abstract arguments) of the "train" or the "eval" step of a run; no data set is read.

    Args:
      config, step: of the run.
      options: of ``Trainer``, such as devices.
    """
    source = StandIn(max(2 * config.batch_size, 1024), tuple(map(str, range(CLASSES))))
    trainer = Trainer(config, sources=(source, source), **options)
    function, arguments, _ = step_function(trainer, step)
    return function, arguments


def fill(arguments: tuple) -> tuple:
    """Arrays for abstract arguments of a step: random weights and pixels, an optimizer that has not seen a gradient."""
    rng = np.random.default_rng(0)

    def make(path, leaf):
        if leaf.dtype == jnp.uint8:
            values = rng.integers(0, 256, leaf.shape)
        elif jnp.issubdtype(leaf.dtype, jnp.floating) and "opt_state" not in jax.tree_util.keystr(path):
            values = 0.05 * rng.standard_normal(leaf.shape, np.float32)
        else:
            values = np.zeros(leaf.shape)
        return jax.device_put(values.astype(leaf.dtype), leaf.sharding)

    return jax.tree_util.tree_map_with_path(make, arguments)


def make_call(compiled, step: str, arguments: tuple):
    """A function without arguments that does one step; training goes on from the state that it left."""
    if step == "eval":
        return functools.partial(compiled, *arguments)
    state, batch = arguments

    def call():
        nonlocal state
        state, metrics = compiled(state, batch)
        return metrics

    return call


def compile_step(function, arguments: tuple) -> tuple[Any, dict[str, Any]]:
    """(compiled, {"lower_seconds", "compile_seconds", "temporary_bytes", "argument_bytes"})."""
    start = time.perf_counter()
    lowered = function.lower(*arguments)
    lowered_at = time.perf_counter()
    compiled = lowered.compile()
    stats = compiled.memory_analysis()
    return compiled, {
        "lower_seconds": lowered_at - start,
        "compile_seconds": time.perf_counter() - lowered_at,
        "temporary_bytes": stats.temp_size_in_bytes,
        "argument_bytes": stats.argument_size_in_bytes,
    }


def measure_step(
    *,
    variant: str,
    batch: int,
    step: str,
    cache: str,
    image_side: int,
    repeats: int,
    min_seconds: float,
    max_gib: float,
    model: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """For ``measure.compile_then_run``: compiles a step and runs it.

    Returns:
      What ``compile_step`` and ``run_and_measure`` say; or {"failed": why} where its temporaries alone are more than
      max_gib.
    """
    measure.use_cache(cache)
    config = make_config(variant, batch=batch, image_side=image_side, **(model or {}))
    function, arguments = make_step(config, step)
    compiled, report = compile_step(function, arguments)
    if report["temporary_bytes"] > max_gib * 2**30:
        return {"failed": f"not run: {report['temporary_bytes'] / 2**30:.1f} GiB of temporaries"}
    call = make_call(compiled, step, fill(arguments))
    return report | run_and_measure(call, repeats=repeats, min_seconds=min_seconds)


def run_and_measure(call, *, repeats: int, min_seconds: float) -> dict[str, Any]:
    """Of a compiled program that has not run yet.

    Returns:
      {"seconds": the median, or None without repeats, "resident_bytes": memory of the process before the first run,
      "peak_bytes": while it runs, "whole_peak_bytes": since the process started}.
    """
    before = peak_host_memory()
    resident = _forget_peak()
    jax.block_until_ready(call())
    seconds = None
    if repeats:
        seconds = measure.time_interleaved({"": call}, repeats=repeats, min_seconds=min_seconds)[""]
    peak = peak_host_memory()
    return {
        "seconds": seconds,
        "resident_bytes": resident,
        "peak_bytes": peak,
        "whole_peak_bytes": max(before, peak),
    }


def _forget_peak() -> int | None:
    """Gives freed memory back and starts the process's peak anew; bytes that are resident then. None off Linux."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # tracing and loading left a few hundred MB of freed heap
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return peak_host_memory()
