"""Memory that a compiled program needs, and memory that a device has."""

from typing import Any

import jax

from dat_jax.profiling.topologies import find_chip


def peak_bytes(stats: Any) -> int:
    """Memory that a program needs at most: arguments, outputs that do not reuse their memory, temporaries and code.

    Args:
      stats: result of ``memory_analysis`` of a compiled program.
    """
    new_outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes
    other = stats.temp_size_in_bytes + stats.generated_code_size_in_bytes
    return stats.argument_size_in_bytes + new_outputs + other


def device_bytes(device: jax.Device) -> float | None:  # pyright: ignore[reportInvalidTypeForm] (jaxlib has no annotations)
    """Memory of a device that programs can use, or None if it is unknown, as on CPUs. The device need not be attached."""
    try:
        stats = device.memory_stats() or {}
    except (jax.errors.JaxRuntimeError, NotImplementedError):  # a device of a topology
        stats = {}
    chip = find_chip(device.device_kind)
    return stats.get("bytes_limit") or (chip.memory_bytes if chip is not None else None)
