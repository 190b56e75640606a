"""How a trained model looks at images, and what its classes are called: as asked for, as its run says, or as published."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from dat_jax.checkpoints.class_names import read_class_names, read_names
from dat_jax.errors import UserError


def choose_options(
    path: pathlib.Path, given: Mapping[str, Any], *, known: Mapping[str, tuple[str, Any]], kind: str
) -> dict[str, Any]:
    """Every option's value.

    Args:
      path: an export, whose "options" are taken, or a work directory.
      given: those that were asked for.
      known: option -> ("group.key" of the configuration of a work directory's run, value where it is not there).
      kind: of model, in words.

    Raises:
      UserError: one that is not known.
    """
    unknown = set(given) - set(known)
    if unknown:
        raise UserError(f"Unknown option {min(unknown)!r} of a {kind}: wanted some of {', '.join(known)}.")
    exported = _read_json(path / "model.json")
    config = _read_json(path / "config.json") if not exported else {}
    saved = {name: _find(config, place, default) for name, (place, default) in known.items()}
    saved |= {name: value for name, value in (exported.get("options") or {}).items() if name in known}
    values = {name: given.get(name, saved[name]) for name in known}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _read_json(path):
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def _find(config, place, default):
    for key in place.split("."):
        config = config.get(key) if isinstance(config, dict) else None
    return default if config is None else config


def find_names(path: pathlib.Path, file: str | None, *, count: int, published: Sequence[str]) -> tuple[str, ...]:
    """Names of classes.

    Args:
      path: an export, or a work directory, whose names are taken.
      file: with names instead, one a line, or None.
      count: how many there are.
      published: taken where no others are known and these are so many; else they are called by their numbers.

    Raises:
      UserError: a file cannot be read, or has not so many names.
    """
    names = read_class_names(path, count=count) if file is None else read_names(file, count=count)
    return names or (tuple(published) if count == len(published) else tuple(map(str, range(count))))


def check_sides(options: Mapping[str, Any]) -> None:
    """UserError where long_side or short_side is below 1."""
    if min(options["long_side"], options["short_side"]) < 1:
        raise UserError("long_side and short_side want numbers of at least 1.")
