"""Exports: weights alone, and what they are of, in a folder."""

import json
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import flax
import numpy as np

from dat_jax.checkpoints.manager import checksum, first_reason, read_arrays, write_arrays
from dat_jax.errors import UserError
from dat_jax.storage import atomic_path


def save_export(directory: str | os.PathLike, *, params: Mapping[str, Any], description: Mapping[str, Any]) -> str:
    """Writes weights and what describes them into a new folder, which appears when it is whole.

    It holds params/, the arrays, and model.json: the description, and under "arrays" shape, dtype and checksum of every
    array by name, and under "checksum" that of all.

    Args:
      directory: must not exist.
      params: nested dictionaries of arrays; they may be on devices.
      description: what JSON can hold.

    Returns:
      ``checksum`` of the parameters.

    Raises:
      UserError: the folder exists already, or cannot be written.
    """
    with atomic_path(directory) as unfinished:
        unfinished.mkdir()
        return write_export(unfinished, params=params, description=description)


def write_export(directory: pathlib.Path, *, params: Mapping[str, Any], description: Mapping[str, Any]) -> str:
    """What ``save_export`` does, into a folder that is there; OSError where it cannot be written."""
    arrays = {name: np.asarray(array) for name, array in flax.traverse_util.flatten_dict(params, sep="/").items()}
    records = {
        name: {"shape": array.shape, "dtype": array.dtype.name, "checksum": checksum({name: array})}
        for name, array in sorted(arrays.items())
    }
    manifest = {**description, "checksum": checksum(arrays), "arrays": records}
    write_arrays(directory / "params", arrays)
    (directory / "model.json").write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest["checksum"]


def load_export(directory: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads what ``save_export`` wrote.

    Returns:
      Parameters as nested dictionaries of numpy arrays, and the description, with "checksum" of all parameters.

    Raises:
      UserError: it is no export, or damaged; the arrays are named.
    """
    directory = pathlib.Path(directory)
    records = {}
    try:
        manifest = json.loads((directory / "model.json").read_text())
        records, wanted = manifest.pop("arrays"), manifest["checksum"]
        saved = {name: record["checksum"] for name, record in records.items()}
    except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{directory} is no export, or its model.json is damaged: {first_reason(error)}.") from error
    try:
        params = read_arrays(directory / "params", names=saved)
    except (ValueError, OSError, KeyError, TypeError, RuntimeError) as error:
        # The message has the path of the array that could not be read: a folder by its name, with dots.
        named = [name for name in saved if re.search(rf"/params/{re.escape(name.replace('/', '.'))}[/.]", str(error))]
        what = f"{', '.join(named)} cannot be read" if named else first_reason(error)
        raise UserError(f"The export {directory} is damaged: {what}.") from error
    arrays = flax.traverse_util.flatten_dict(params, sep="/")
    damaged = [name for name in saved if name not in arrays or checksum({name: arrays[name]}) != saved[name]]
    if damaged:
        raise UserError(f"The export {directory} is damaged: {', '.join(damaged)} differ from what was saved.")
    if checksum(arrays) != wanted:
        raise UserError(f"The export {directory} is damaged: its arrays together are not those that were saved.")
    return params, manifest
