"""Names of classes, in the checkpoints and classes.txt of a work directory or in model.json of a folder of weights."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from dat_jax.checkpoints.directory import fetch_weights, find_best_step, read_meta
from dat_jax.errors import UserError, name_some
from dat_jax.storage import Path, exists, fetch

CLASS_NAMES = "classes.txt"  # file of a work directory, one name per line


def read_class_names(path: str | os.PathLike, *, count: int) -> tuple[str, ...] | None:
    """Read the class names of trained weights.

    Args:
      path: a folder of weights, or the work directory of a run. Of the latter, the names of the best checkpoint are read, or
        those of classes.txt if the checkpoint does not record them.
      count: expected number of classes.

    Returns:
      The names, or None if they were not recorded.

    Raises:
      UserError: the file cannot be read, or has another number of names.
    """
    directory = fetch_weights(path)
    file = directory / "model.json"
    if file.is_file():
        recorded = json.loads(file.read_text()).get("classes")
    else:
        file = directory / "checkpoints"
        recorded = _read_best_metadata(file).get("class_names")
    if isinstance(recorded, list) and recorded:
        if len(recorded) != count:
            raise UserError(f"{file}: expected {count} class names, got {len(recorded)}.")
        return tuple(map(str, recorded))
    return None if file.name == "model.json" else _read_class_file(directory, count=count)


def add_class_names(metadata: Mapping[str, Any], workdir: Path) -> Mapping[str, Any]:
    """The metadata of a checkpoint with "class_names", which older checkpoints do not have, from classes.txt if it exists.

    Args:
      metadata: metadata of the checkpoint, see ``compatibility.describe``.
      workdir: the work directory of the checkpoint.

    Raises:
      UserError: classes.txt cannot be read, or has another number of names than the checkpoint has classes.
    """
    if not isinstance(metadata, Mapping) or "class_names" in metadata or "classes" not in metadata:
        return metadata
    names = _read_class_file(workdir, count=metadata["classes"])
    return metadata if names is None else {**metadata, "class_names": list(names)}


def describe_difference(recorded: Sequence[str], current: Sequence[str]) -> str:
    """Describe how the classes of data differ from those of trained weights.

    Args:
      recorded: names of the classes that the weights were trained on, in the order of the outputs.
      current: names of the classes of the data, in the order of their labels.

    Returns:
      The missing and the new names; if there are none, the first class with another name; "" if the names are equal.
    """
    missing = [name for name in recorded if name not in set(current)]
    new = [name for name in current if name not in set(recorded)]
    parts = [f"the data do not have {name_some(missing)}"] if missing else []
    parts += [f"the weights do not have {name_some(new)}"] if new else []
    if parts:
        return ", and ".join(parts)
    if len(recorded) != len(current):
        return f"expected {len(recorded)} names, got {len(current)}"
    pairs = enumerate(zip(recorded, current, strict=True))
    return next((f"class {index} is {old!r}, now {new!r}" for index, (old, new) in pairs if old != new), "")


def read_names(file: str | os.PathLike, *, count: int) -> tuple[str, ...]:
    """Read class names from a text file in UTF-8, one per line.

    Args:
      file: the file.
      count: expected number of names.

    Raises:
      UserError: the file cannot be read, or has another number of lines.
    """
    try:
        names = tuple(fetch(file).read_text(encoding="utf-8-sig").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read: {error}.") from error
    if len(names) != count:
        raise UserError(f"{file}: expected {count} class names, one per line, got {len(names)}.")
    return names


def _read_class_file(workdir: Path, *, count: int) -> tuple[str, ...] | None:
    file = workdir / CLASS_NAMES
    return read_names(file, count=count) if exists(file) else None


def _read_best_metadata(directory: Path) -> Mapping[str, Any]:
    """Metadata of the best checkpoint; {} if there is none, or it cannot be read."""
    step = find_best_step(directory)
    try:
        metadata = {} if step is None else read_meta(directory / str(step))["metadata"]
    except (OSError, ValueError, KeyError, TypeError):  # reported where the arrays are read
        return {}
    return metadata if isinstance(metadata, Mapping) else {}
