"""Comparison of the implementations of a call on the device: do they agree with the plain one, and how long do they take?"""

import concurrent.futures
import contextvars
import dataclasses
import math
import os
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dat_jax.ops.calls import OpCall
from dat_jax.profiling.topologies import first_line
from dat_jax.tuning.candidates import get_tolerance
from dat_jax.tuning.programs import (
    Arrays,
    count_examples,
    expect_whole_batch,
    make_arrays,
    make_gradient,
    make_program,
    take_examples,
)

_ZERO = 1e-5  # an array with smaller values is zero but for rounding, as the gradient of the only key of a query
_REPETITIONS = 5  # the median counts
_MAX_RUNS = 10  # at a time, whose results are in memory
_SECONDS = 0.02  # of one repetition


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Time and error of one implementation of a call, or why it is not used.

    Attributes:
      seconds: of one execution of the call, with its gradient if it is differentiated (median); None with a problem.
      error: largest difference from the plain implementation, relative to the largest value of the array; None if unknown.
      bytes: read and written in device memory, by the compiler of a device that is not attached; None on a device.
      problem: why the implementation is not used, or "".
    """

    seconds: float | None = None
    error: float | None = None
    bytes: float | None = None
    problem: str = ""


def measure(call: OpCall, implementations: Sequence[str]) -> dict[str, Measurement]:
    """Compare implementations of a call with the plain one, and time those that agree.

    The batch repeats two examples, or another small divisor of its size: the plain implementation may not fit in memory with all
    of them, and so its results are known for all of them.

    Args:
      call: the call.
      implementations: their names.

    Returns:
      The measurement of each.
    """
    count = count_examples(call.main_array[0][0])
    arrays = make_arrays(call, examples=count)
    forward = make_program(dataclasses.replace(call, differentiated=False), "plain")
    result = jax.eval_shape(forward, arrays, None)["result"]
    gradient = make_gradient(call, result, examples=count)
    expected = _compute_reference(call, take_examples(call, arrays, count), gradient[:count])
    expected = expect_whole_batch(call, expected, count)
    on_device = jax.device_put((arrays, gradient))
    programs = _compile_all(call, implementations, on_device)
    measured = {}
    for name, program in programs.items():
        if isinstance(program, Exception):
            measured[name] = Measurement(problem=f"it cannot be compiled: {first_line(program)}")
            continue
        try:
            measured[name] = _measure_program(call, program, on_device, expected)
        except Exception as error:  # whatever a kernel does on the device, the others are still there
            measured[name] = Measurement(problem=f"it fails: {first_line(error)}")
    return measured


def _compute_reference(call: OpCall, arrays: Arrays, gradient: np.ndarray) -> Arrays:
    """The plain implementation in float32, with exact products."""

    def widen(array):
        return array.astype(np.float32) if jnp.issubdtype(array.dtype, jnp.floating) else array

    with jax.default_matmul_precision("highest"):
        results = jax.jit(make_program(call, "plain"))(jax.tree.map(widen, arrays), widen(gradient))
    return jax.device_get(results)


def _compile_all(call: OpCall, implementations: Sequence[str], inputs: Any) -> dict[str, Any]:
    """Compile implementations side by side. Returns a program or an exception for each."""

    def compile_one(name):
        try:
            return jax.jit(make_program(call, name)).lower(*inputs).compile()
        except Exception as error:  # compilers raise exceptions of many types
            return error

    workers = min(len(implementations), os.cpu_count() or 1)
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        futures = {name: pool.submit(contextvars.copy_context().run, compile_one, name) for name in implementations}
        return {name: future.result() for name, future in futures.items()}


def _measure_program(call: OpCall, program: Any, inputs: Any, expected: Arrays) -> Measurement:
    results = jax.device_get(program(*inputs))
    errors = {name: _relative_difference(array, expected[name]) for name, array in results.items()}
    worst = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])
    error, tolerance = errors[worst], get_tolerance(call)
    if not error <= tolerance:  # also if it is NaN
        what = "its result" if worst == "result" else f"its gradient of {worst}"
        problem = f"{what} differs by {error:.2g} (at most {tolerance:g} is allowed)"
        return Measurement(error=error if math.isfinite(error) else None, problem=problem)
    return Measurement(seconds=time_program(program, inputs), error=error)


def _relative_difference(array: Any, expected: np.ndarray) -> float:
    difference = np.abs(np.asarray(array, np.float64) - np.asarray(expected, np.float64)).max(initial=0.0)
    largest = np.abs(expected.astype(np.float64)).max(initial=0.0)
    return float(difference / (largest if largest > _ZERO else 1.0))


def time_program(program: Any, inputs: Any) -> float:
    """Seconds of one execution, the median of five repetitions of several executions."""

    def run(count):
        start = time.perf_counter()
        jax.block_until_ready([program(*inputs) for _ in range(count)])
        return (time.perf_counter() - start) / count

    count = min(max(math.ceil(_SECONDS / run(1)), 1), _MAX_RUNS)
    return statistics.median(run(count) for _ in range(_REPETITIONS))
