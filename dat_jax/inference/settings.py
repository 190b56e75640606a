"""Options and class names of a trained model: passed by the caller, stored with the model, or published."""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from dat_jax.checkpoints.class_names import read_class_names, read_names
from dat_jax.checkpoints.inference_options import read_options
from dat_jax.errors import UserError


def choose_options(
    path: pathlib.Path, options: Mapping[str, Any], *, known: Mapping[str, Any], kind: str
) -> dict[str, Any]:
    """Value of every known option.

    Args:
      path: export, whose stored "options" are used, or work directory, whose configuration is used.
      options: values passed by the caller, which take precedence.
      known: option -> default value.
      kind: kind of model, see ``read_options``.

    Raises:
      UserError: ``options`` has an unknown name.
    """
    unknown = set(options) - set(known)
    if unknown:
        raise UserError(f"Unknown option {min(unknown)!r} of a {kind}; the options are {', '.join(known)}.")
    stored = {**known, **read_options(path, kind=kind)}
    values = {name: options.get(name, stored[name]) for name in known}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def find_names(
    path: pathlib.Path, file: str | os.PathLike | None, *, count: int, published: Sequence[str]
) -> tuple[str, ...]:
    """Class names of a model.

    Args:
      path: export or work directory, whose stored names are used if ``file`` is None.
      file: text file with the names, one per line, or None.
      count: number of classes.
      published: names to use if none are stored and their number is ``count``. Otherwise the names are numbers from 0.

    Raises:
      UserError: a file cannot be read, or does not contain ``count`` names.
    """
    names = read_class_names(path, count=count) if file is None else read_names(file, count=count)
    return names or (tuple(published) if count == len(published) else tuple(map(str, range(count))))


def check_at_least_1(options: Mapping[str, Any], *names: str) -> None:
    """Raise a UserError for the first of some options whose value is below 1."""
    for name in names:
        if options[name] < 1:
            raise UserError(f"{name} must be at least 1, got {options[name]}.")
