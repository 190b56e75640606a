"""The choices of a device: which implementation each call of an op uses, and what was measured. A JSON file for each device."""

import dataclasses
import hashlib
import importlib.metadata
import json
import logging
import math
import os
import re
from collections.abc import Mapping
from typing import Any

from dat_jax import __version__
from dat_jax.errors import UserError
from dat_jax.ops.calls import get_op
from dat_jax.ops.dispatch import IMPLEMENTATIONS
from dat_jax.storage import Path, as_path, atomic_write_text, os_errors
from dat_jax.tuning.measurement import Measurement

logger = logging.getLogger(__name__)
_FORMAT = 1
_COMPILERS = ("libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13")


@dataclasses.dataclass(frozen=True)
class Choice:
    """The implementation of a call.

    Attributes:
      chosen: its name.
      default: the implementation without a choice.
      measured: name -> what was measured, of every implementation that was compared.
    """

    chosen: str
    default: str
    measured: Mapping[str, Measurement]


Choices = dict[str, Choice]  # by the key of a call, see ``ops.calls.OpCall``
_NOT_CHOICES = (ValueError, TypeError, KeyError, AttributeError, RecursionError)


def describe_versions() -> dict[str, str]:
    """Versions that a choice depends on: dat_jax, jax, and the compiler of the device."""
    versions = {"dat_jax": __version__}
    for package in ("jax", "jaxlib", *_COMPILERS):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def choices_file(folder: str | os.PathLike, device_kind: str) -> Path:
    """The file of a kind of device in a folder, for the installed versions.

    Args:
      folder: that of compiled programs.
      device_kind: ``jax.Device.device_kind``.
    """
    described = json.dumps(describe_versions(), sort_keys=True)
    digest = hashlib.sha256(described.encode()).hexdigest()[:8]
    name = re.sub(r"[^a-z0-9]+", "-", device_kind.lower()).strip("-")
    return as_path(folder) / "choices" / f"{name}-{digest}.json"


def write_choices(path: str | os.PathLike, choices: Choices, *, device_kind: str) -> None:
    """Write a file of choices.

    Raises:
      OSError: it cannot be written.
    """
    content = {
        "format": _FORMAT,
        "device": device_kind,
        "versions": describe_versions(),
        "calls": {key: dataclasses.asdict(choice) for key, choice in sorted(choices.items())},
    }
    path = as_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, json.dumps(content, indent=1) + "\n")


def read_choices(path: str | os.PathLike, *, device_kind: str | None = None) -> Choices:
    """Read a file of choices. Choices of other versions than the installed ones are logged as a warning.

    Args:
      path: the file.
      device_kind: the device that the choices are needed for, or None for any.

    Raises:
      UserError: it cannot be read, is not a file of choices, or has those of another device.
    """
    try:
        with os_errors(path):
            text = as_path(path).read_text()
        content = json.loads(text)
        device, versions, choices = content["device"], dict(content["versions"]), _parse_choices(content)
    except OSError as error:
        raise UserError(f"The file of choices {path} cannot be read: {error.strerror or error}.") from error
    except _NOT_CHOICES as error:
        raise UserError(f"{path} is not a file of choices, as `dat-jax tune --output=FILE` writes them.") from error
    if device_kind not in (None, device):
        raise UserError(f"The choices in {path} are for {device}, expected {device_kind}.")
    if others := _describe_differences(versions, describe_versions()):
        logger.warning("The choices in %s are of other versions than the installed ones: %s.", path, others)
    return choices


def _describe_differences(versions: Mapping[str, Any], installed: Mapping[str, str]) -> str:
    names = sorted(name for name in {*versions, *installed} if versions.get(name) != installed.get(name))
    return ", ".join(f"{name} {versions.get(name, 'none')}, now {installed.get(name, 'none')}" for name in names)


def _parse_choices(content: Mapping[str, Any]) -> Choices:
    """The choices in the content of a file, or one of ``_NOT_CHOICES``."""
    if content["format"] != _FORMAT:
        raise ValueError(f"unknown format {content['format']}")
    return {key: _parse_choice(key, value) for key, value in content["calls"].items()}


def _parse_choice(key: str, value: Mapping[str, Any]) -> Choice:
    measured = {str(name): _parse_measurement(values) for name, values in value["measured"].items()}
    op = get_op(key)
    known = {*IMPLEMENTATIONS[op], *(IMPLEMENTATIONS["position_bias"] if op == "deformable_attention" else ())}
    if value["chosen"] not in measured or not measured.keys() <= known:
        raise ValueError(f"{value['chosen']!r} was not measured, or the op has no such implementation")
    if measured[value["chosen"]].problem and not all(other.problem for other in measured.values()):
        raise ValueError(f"{value['chosen']!r} has a problem that others do not have")
    return Choice(chosen=value["chosen"], default=str(value["default"]), measured=measured)


def _parse_measurement(values: Mapping[str, Any]) -> Measurement:
    measurement = Measurement(**values)
    for number in (measurement.seconds, measurement.error, measurement.bytes):
        if number is not None and not 0 <= number < math.inf:  # also if it is NaN
            raise ValueError(f"{number} is not a time, a difference or a number of bytes")
    return measurement


def read_stored_choices(folder: str | os.PathLike | None, device_kind: str) -> Choices:
    """The choices in the folder of compiled programs; {} if there are none, or with a warning if they cannot be read."""
    if folder is None:
        return {}
    path = choices_file(folder, device_kind)
    try:
        return read_choices(path, device_kind=device_kind) if path.exists() else {}
    except (UserError, OSError) as error:
        logger.warning("Stored choices of implementations are not used. %s", error)
        return {}


def store_choices(folder: str | os.PathLike | None, choices: Choices, *, device_kind: str) -> Path | None:
    """Add choices to those in the folder of compiled programs.

    Returns:
      The file, or None if there is no folder or the file cannot be written, which is logged as a warning.
    """
    if folder is None:
        return None
    path = choices_file(folder, device_kind)
    try:
        write_choices(path, {**read_stored_choices(folder, device_kind), **choices}, device_kind=device_kind)
    except (OSError, UserError) as error:
        logger.warning(
            "Choices of implementations are not kept in %s: %s.", path, getattr(error, "strerror", None) or error
        )
        return None
    return path


def get_names(choices: Choices) -> dict[str, str]:
    """Key of a call -> name of its implementation, for ``ops.calls.chosen_implementations``."""
    return {key: choice.chosen for key, choice in choices.items()}
