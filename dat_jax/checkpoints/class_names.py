"""Names of classes, in classes.txt of a work directory or in model.json of a folder of weights."""

import json
import os
import pathlib

from dat_jax.errors import UserError

CLASS_NAMES = "classes.txt"  # file of a work directory, one name per line


def read_class_names(path: str | os.PathLike, *, count: int) -> tuple[str, ...] | None:
    """Read the class names of trained weights.

    Args:
      path: a folder of weights, or the work directory of a run.
      count: expected number of classes.

    Returns:
      The names, or None if they were not recorded.

    Raises:
      UserError: the file cannot be read, or has another number of names.
    """
    directory = pathlib.Path(path)
    description = directory / "model.json"
    if description.is_file():
        names = tuple(map(str, json.loads(description.read_text()).get("classes") or ()))
        if names and len(names) != count:
            raise UserError(f"{description}: expected {count} class names, got {len(names)}.")
        return names or None
    file = directory / CLASS_NAMES
    return read_names(file, count=count) if file.is_file() else None


def read_names(file: str | os.PathLike, *, count: int) -> tuple[str, ...]:
    """Read class names from a text file in UTF-8, one per line.

    Args:
      file: the file.
      count: expected number of names.

    Raises:
      UserError: the file cannot be read, or has another number of lines.
    """
    try:
        names = tuple(pathlib.Path(file).read_text(encoding="utf-8").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read: {error}.") from error
    if len(names) != count:
        raise UserError(f"{file}: expected {count} class names, one per line, got {len(names)}.")
    return names
