"""Comparison of the implementations of a call by the compiler of a device that is not attached: bytes, not times."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dat_jax.ops.calls import OpCall
from dat_jax.ops.dispatch import target_platform
from dat_jax.profiling import hlo
from dat_jax.profiling.step_report import COMPILER_OPTIONS
from dat_jax.profiling.topologies import first_line
from dat_jax.training.compilation import known_options
from dat_jax.tuning.measurement import Measurement
from dat_jax.tuning.programs import make_program


def make_compiled_measure(devices: Sequence[Any]) -> Callable[..., dict[str, Measurement]]:
    """A function like ``measurement.measure``, for one device of a topology.

    Its measurements have "bytes" instead of "seconds" and "error": what ops read and write in device memory, on TPUs without what
    stays on the chip. Nothing is executed, so neither the time nor the result of an implementation is known.

    Args:
      devices: see ``profiling.topologies.find_devices``. Call the function within ``ops.dispatch.compiling_for``.
    """
    where = NamedSharding(Mesh(np.array(devices[:1]), ("device",)), PartitionSpec())
    return functools.partial(_measure, where=where)


def _measure(call: OpCall, implementations: Sequence[str], *, where: NamedSharding) -> dict[str, Measurement]:
    arrays = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=where) for name, shape, dtype in call.arrays}
    options = COMPILER_OPTIONS.get(target_platform(), {})
    return {name: _compile(call, name, arrays, where, options) for name in implementations}


def _compile(call: OpCall, implementation: str, arrays, where: NamedSharding, options: dict[str, Any]) -> Measurement:
    program = make_program(call, implementation)
    try:
        forward = make_program(dataclasses.replace(call, differentiated=False), implementation)
        result = jax.eval_shape(forward, arrays, None)["result"]
        gradient = jax.ShapeDtypeStruct(result.shape, result.dtype, sharding=where)
        compiled = jax.jit(program).lower(arrays, gradient).compile(known_options(options))
        by_opcode, _ = hlo.traffic(hlo.parse(compiled.as_text() or ""))
    except Exception as error:  # compilers raise exceptions of many types
        return Measurement(problem=f"it cannot be compiled: {first_line(error)}")
    return Measurement(bytes=float(sum(counts["hbm_bytes"] for counts in by_opcode.values())))
