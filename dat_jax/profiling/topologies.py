"""Devices to compile for, attached or described by a topology, and their peak performance."""

import dataclasses
import importlib.util
import math
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies

from dat_jax.errors import UserError

# Description of an H100 in the format of XLA's target configurations.
TARGET_CONFIG = pathlib.Path(__file__).with_name("h100.txtpb")


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published performance of one device.

    Attributes:
      platform: "tpu", "gpu" or "cpu".
      flops_per_second: dense peak in bfloat16, or None if unknown.
      bytes_per_second: bandwidth of the memory (HBM), or None if unknown.
      memory_bytes: size of the memory (HBM), or None if unknown.
      device_kinds: values of ``jax.Device.device_kind`` for this device.
    """

    platform: str
    flops_per_second: float | None
    bytes_per_second: float | None
    memory_bytes: float | None
    device_kinds: tuple[str, ...] = ()


CHIPS = {
    "v5e": Chip("tpu", 197e12, 819e9, 16 * 2**30, ("TPU v5 lite", "TPU v5e")),
    "v5p": Chip("tpu", 459e12, 2765e9, 95 * 2**30, ("TPU v5", "TPU v5p")),
    "v6e": Chip("tpu", 918e12, 1640e9, 32 * 2**30, ("TPU v6 lite", "TPU v6e")),
    "h100": Chip("gpu", 989e12, 3350e9, 80e9, ("NVIDIA H100 80GB HBM3",)),  # SXM
    "cpu": Chip("cpu", None, None, None),
}
_ACCELERATOR_TYPES = {"v5e": "v5litepod-{chips}", "v5p": "v5p-{cores}", "v6e": "v6e-{chips}"}


def find_chip(device_kind: str) -> Chip | None:
    """The chip with a value of ``jax.Device.device_kind``, or None if it is not in ``CHIPS``."""
    return next((chip for chip in CHIPS.values() if device_kind in chip.device_kinds), None)


def find_devices(
    topology: str, *, slices: int = 1, target_config: str | pathlib.Path = TARGET_CONFIG
) -> tuple[Chip, Sequence[Any]]:
    """Find the devices to compile for.

    Args:
      topology: TPU topology such as "v5e:2x2", "h100" for one GPU, or "cpu" for the (virtual) CPU devices of this machine.
      slices: number of TPU slices of this topology, which the network of the data center connects.
      target_config: file that describes the GPU to its compiler.

    Returns:
      The chip and the devices; devices of a topology can be compiled for, but not used.

    Raises:
      UserError: the topology is unknown or has no slices, its compiler is not installed, or the compiler does not support it.
    """
    family, _, layout = topology.partition(":")
    if family not in CHIPS or not re.fullmatch(_layout_pattern(family), layout):
        raise UserError(
            f"Unknown topology {topology!r}; choose v5e:2x2, v6e:2x2 (or other sizes of two numbers), v5p:2x2x1 (or other sizes "
            "of three numbers), h100, or cpu."
        )
    chip = CHIPS[family]
    if slices > 1 and chip.platform != "tpu":
        raise UserError(
            f"--slices={slices} needs a TPU topology such as v5e:2x2, got {topology}. --config.mesh.slices groups other devices."
        )
    if chip.platform == "cpu":
        return chip, jax.devices("cpu")
    _require("libtpu" if chip.platform == "tpu" else "jax_cuda12_plugin", chip.platform)
    try:
        if chip.platform == "tpu":
            _describe_host(family, math.prod(map(int, layout.split("x"))))
            several: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
            return chip, topologies.get_topology_desc(platform="tpu", topology_name=topology, **several).devices
        description = pathlib.Path(target_config).read_text()
        options = dict(topology_name="", topology="1x1x1", target_config=description)
        return chip, topologies.get_topology_desc(platform="cuda", **options).devices
    except OSError as error:
        raise UserError(f"--target_config {target_config} cannot be read: {error.strerror}.") from error
    except (jax.errors.JaxRuntimeError, RuntimeError, NotImplementedError) as error:
        name = f"{slices} x {topology}" if slices > 1 else topology
        raise UserError(f"The compiler does not support the topology {name}: {first_line(error)}") from error


def _layout_pattern(family: str) -> str:
    number = "[1-9][0-9]*"
    return {"v5e": f"{number}x{number}", "v6e": f"{number}x{number}", "v5p": f"{number}x{number}x{number}"}.get(
        family, ""
    )


def _require(package: str, platform: str) -> None:
    if importlib.util.find_spec(package) is None:
        install = "libtpu" if platform == "tpu" else '"jax[cuda12]"'
        raise UserError(f"The compiler for a {platform.upper()} is not installed: pip install {install}.")


def _describe_host(family: str, chips: int) -> None:
    """Set the variables that libtpu otherwise reads from the metadata server of a TPU host."""
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nothing runs, so another program may use the TPU
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    accelerator = _ACCELERATOR_TYPES[family].format(chips=min(chips, 4), cores=2 * min(chips, 4))
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", accelerator)


def first_line(error: Exception) -> str:
    """First line of an error message, or the type of an error without a message."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
