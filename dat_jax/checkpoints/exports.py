"""Folders of weights: the parameters of a model without the optimizer, and a description of the model.

A folder has params/, the arrays, and model.json: the description of the model, and under "arrays" the shape, dtype and
SHA-256 of every array, and under "checksum" the SHA-256 of all of them. ``dat_jax.load`` reads it.
"""

import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from dat_jax.checkpoints.adaptation import kind_of
from dat_jax.checkpoints.arrays import read_arrays, write_arrays
from dat_jax.checkpoints.integrity import DamagedError, check_digests, hash_arrays
from dat_jax.checkpoints.model_description import Model, describe_model, get_backbone
from dat_jax.checkpoints.orbax_messages import ORBAX_ERRORS, describe_error
from dat_jax.errors import UserError, name_some
from dat_jax.models.dat import DAT
from dat_jax.storage import atomic_path, fetch


def export_model(
    directory: str | os.PathLike,
    *,
    model: Model,
    variables: Mapping[str, Any],
    classes: Sequence[str] | None = None,
    options: Mapping[str, Any] | None = None,
) -> str:
    """Write a model to a new folder of weights, atomically. ``dat_jax.load`` reads it.

    Args:
      directory: folder to create.
      model: a classifier, segmentor or detector.
      variables: its variables, {"params": ...}, and "batch_stats" of a model with BatchNorm.
      classes: names of the classes, in the order of the outputs.
      options: settings of ``inference.load`` for the model, by name.

    Returns:
      SHA-256 of all arrays, as 64 hexadecimal digits.

    Raises:
      UserError: the folder exists, or cannot be written.
    """
    return save_export(directory, **_describe(model, variables, classes, options))


def write_model(
    directory: pathlib.Path,
    *,
    model: Model,
    variables: Mapping[str, Any],
    classes: Sequence[str] | None = None,
    options: Mapping[str, Any] | None = None,
) -> str:
    """Write the content of ``export_model`` into an existing folder. Raises an OSError if it cannot be written."""
    return write_export(directory, **_describe(model, variables, classes, options))


def save_export(directory: str | os.PathLike, *, params: Mapping[str, Any], description: Mapping[str, Any]) -> str:
    """Write arrays and a description of their model to a new folder, atomically.

    Args:
      directory: folder to create.
      params: nested dictionaries of arrays, on the host or on devices.
      description: values that JSON can store, for model.json.

    Returns:
      SHA-256 of all arrays, see ``hash_arrays``.

    Raises:
      UserError: the folder exists, or cannot be written.
    """
    with atomic_path(directory) as temporary:
        temporary.mkdir()
        return write_export(temporary, params=params, description=description)


def write_export(directory: pathlib.Path, *, params: Mapping[str, Any], description: Mapping[str, Any]) -> str:
    """Write the content of ``save_export`` into an existing folder. Raises an OSError if it cannot be written."""
    arrays = {name: np.asarray(array) for name, array in flatten_dict(params, sep="/").items()}
    records = {
        name: {"shape": array.shape, "dtype": array.dtype.name, "checksum": hash_arrays({name: array})}
        for name, array in sorted(arrays.items())
    }
    manifest = {**description, "checksum": hash_arrays(arrays), "arrays": records}
    write_arrays(directory / "params", arrays)
    (directory / "model.json").write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest["checksum"]


def load_export(directory: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a folder of weights.

    Returns:
      The parameters, as nested dictionaries of numpy arrays, and the description, with "checksum", the SHA-256 of all arrays.

    Raises:
      UserError: the folder is not a folder of weights, or is damaged; the arrays are named.
    """
    directory = fetch(directory)
    name = f"The folder of weights {directory}"
    try:
        description = json.loads((directory / "model.json").read_text())
        records, checksum = description.pop("arrays"), description["checksum"]
        saved = {array: record["checksum"] for array, record in records.items()}
    except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        reason = describe_error(error)
        raise UserError(f"{directory} is not a folder of weights, or its model.json is damaged: {reason}.") from error
    try:
        params = read_arrays(directory / "params", names=saved)
    except ORBAX_ERRORS as error:
        # The message has the path of the array that could not be read, whose folder has dots instead of slashes.
        folders = {array: re.escape(array.replace("/", ".")) for array in saved}
        unreadable = [array for array, folder in folders.items() if re.search(rf"/params/{folder}[/.]", str(error))]
        reason = f"{name_some(unreadable)} cannot be read" if unreadable else describe_error(error)
        raise DamagedError(f"{name} is damaged: {reason}.") from error
    arrays: dict[str, Any] = dict(flatten_dict(params, sep="/"))  # Flax does not annotate the leaves
    check_digests(name, saved=saved, actual={array: hash_arrays({array: arrays[array]}) for array in arrays})
    check_digests(name, saved={"the set of arrays": checksum}, actual={"the set of arrays": hash_arrays(arrays)})
    return params, description


def _describe(model, variables, classes, options) -> dict[str, Any]:
    """Arguments of ``save_export`` for a model."""
    description, arrays = {"model": describe_model(get_backbone(model))}, variables["params"]
    optional = {"classes": classes and list(classes), "options": options and dict(options)}
    description |= {key: value for key, value in optional.items() if value}
    if not isinstance(model, DAT):
        description[kind_of(arrays)] = describe_model(model)
        arrays = {name: variables[name] for name in ("params", "batch_stats") if name in variables}
    return {"params": arrays, "description": description}
