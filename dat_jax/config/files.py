"""Configuration files: packaged ones by name, and any others by path.

A configuration file is a Python file with a function ``get_config()``. A family of configurations has a dict ``CHOICES`` and a
function ``get_config(choice)``; the choice follows the name and a colon, such as ``upernet:dat_pp_s``.

Training writes the configuration of a run to config.json of its work directory, which is a configuration file, too.
"""

import difflib
import importlib.machinery
import importlib.util
import inspect
import json
import os
import pathlib
import re
import types
from collections.abc import Mapping
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from dat_jax.config.keys import Key, Keys, OpenGroup, make_config
from dat_jax.config.validation import TASKS, get_keys
from dat_jax.errors import UserError
from dat_jax.storage import as_path, exists, fetch

_PACKAGE = pathlib.Path(__file__).parents[1]
# In an installed package, and in the repository (also after `pip install -e .`).
_FOLDERS = (_PACKAGE / "configs", _PACKAGE.parent / "configs")

flags.disclaim_key_flags()  # --config belongs to the module that calls define_config_flag


def define_config_flag(flag_values: flags.FlagValues = flags.FLAGS) -> flags.FlagHolder:
    """Defines --config and --config.KEY; the value is a locked ConfigDict, whose file is found by ``find_config``."""
    holder = config_flags.DEFINE_config_file(
        "config",
        None,
        "Configuration: a name, such as dat_pp_s or upernet:dat_pp_s, or a file. --config.KEY=VALUE overrides a key.",
        flag_values=flag_values,
    )
    flag_values["config"].parser = _ConfigParser()
    return holder


def add_recorded_config(argv: list[str]) -> list[str]:
    """Add --config=WORKDIR/config.json to a command that evaluates a work directory without --config.

    The flag must be there before flags are parsed, since it determines which flags --config.KEY exist.

    Args:
      argv: the program and its arguments.

    Returns:
      The arguments, changed only if the command evaluates and has no --config.

    Raises:
      UserError: the work directory has no config.json, or a key is set without a configuration.
    """
    values = flags.FlagValues()
    for name in ("config", "workdir", "mode"):
        flags.DEFINE_string(name, None, "", flag_values=values)
    try:
        values(argv, known_only=True)
    except flags.Error:  # reported when all flags are parsed
        return argv
    if values.config is not None:
        return argv
    if values.mode not in ("eval", "knn") or not values.workdir:
        override = next((word for word in argv[1:] if re.match(r"--?config\.", word)), None)
        if override is not None:
            raise UserError(
                f"{override.partition('=')[0]} sets a key of a configuration: expected --config=CONFIG, too."
            )
        return argv
    file = as_path(values.workdir) / "config.json"
    try:
        found = exists(file)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}.") from error
    if not found:
        raise UserError(
            f"There is no {file}, which training writes: expected --config=CONFIG, or the --workdir of a run."
        )
    return [*argv[:1], f"--config={file}", *argv[1:]]


def load_config(name: str) -> ConfigDict:
    """The configuration of a name or a path, locked.

    Args:
      name: see ``find_config``; the choice of a family follows a colon. Or the path of a config.json.

    Raises:
      UserError: no such file, an unknown or missing choice, or a file that is not a configuration.
    """
    if name.endswith(".json"):
        return _load_json(fetch(name)).lock()
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", name):
        raise UserError(f"{name} is not a configuration: in a bucket, it must be the config.json of a run.")
    # The colon before a choice is the last one, since names of folders may have colons. The path of a file has no choice.
    is_file = os.path.isfile(name) or os.path.isfile(f"{name}.py")
    file, colon, choice = (name, "", "") if is_file or ":" not in name else name.rpartition(":")
    path = find_config(file)
    get_config = getattr(_import_file(path), "get_config", None)
    if not callable(get_config):
        raise UserError(f"{path} is not a configuration: expected a function get_config().")
    takes_choice = bool(inspect.signature(get_config).parameters)
    if colon and not takes_choice:
        raise UserError(f"{path} takes no choice after a colon, got {choice!r}.")
    config = get_config(choice) if takes_choice and colon else get_config()
    if not isinstance(config, ConfigDict):
        raise UserError(f"get_config() of {path} must return a ConfigDict, got {type(config).__name__}.")
    return config.lock()


def _load_json(path: pathlib.Path) -> ConfigDict:
    """The configuration that a run recorded, with the defaults of keys that were added later.

    Raises:
      UserError: the file cannot be read, or is not a configuration.
    """
    try:
        values = json.loads(path.read_text())
        task, schedule = values.get("task", TASKS[0]), values.get("schedule", {}).get("kind")
        return ConfigDict(_add_defaults(values, get_keys(task, schedule)))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged, or is not the configuration of a run.") from error


def _add_defaults(values: Mapping[str, Any], keys: Keys) -> dict[str, Any]:
    """The values of a configuration with tuples instead of the lists of JSON, and the defaults of missing keys."""
    added = {name: _to_tuple(value) for name, value in values.items()}
    for name, key in keys.items():
        if name not in values:
            added[name] = key.default if isinstance(key, Key) else _make_group(key)
        elif isinstance(key, Mapping):
            added[name] = _add_defaults(values[name], key)
    return added


def _make_group(key: OpenGroup | Keys) -> ConfigDict:
    return make_config(key.keys if isinstance(key, OpenGroup) else key)


def _to_tuple(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _to_tuple(item) for name, item in value.items()}
    return tuple(map(_to_tuple, value)) if isinstance(value, list) else value


def find_config(name: str) -> pathlib.Path:
    """The file of a configuration, without a choice.

    Args:
      name: a path, with or without ".py", or the name of a packaged configuration, optionally after "configs/". A file that
        exists takes precedence over a packaged one.

    Raises:
      UserError: there is none; names the most similar packaged configurations.
    """
    folder, base = os.path.split(name)
    stem = base.removesuffix(".py")
    if os.path.isfile(name):
        return pathlib.Path(name)
    if folder and os.path.isfile(f"{name}.py"):
        return pathlib.Path(f"{name}.py")
    if folder in ("", "configs") and stem in _list_files():
        return _list_files()[stem]
    nearest = difflib.get_close_matches(stem, list_configs(), n=3, cutoff=0)
    raise UserError(f"There is no configuration {name}. Similar names: {', '.join(nearest)}.")


def list_configs() -> list[str]:
    """Names of all packaged configurations, families with each of their choices."""
    names = []
    for stem, path in _list_files().items():
        choices = getattr(_import_file(path), "CHOICES", None)
        names += [stem] if choices is None else [f"{stem}:{choice}" for choice in choices]
    return names


def choose(choices: Mapping[str, object], choice: str, *, family: str) -> object:
    """The value of a choice of a family.

    Args:
      choices: choice -> value.
      choice: the key; "" if there was none on the command line.
      family: name of the configuration file, for the message.

    Raises:
      UserError: the choice is missing or unknown.
    """
    if choice not in choices:
        raise UserError(
            f"{family} must be followed by a colon and one of {', '.join(choices)}, such as {family}:{next(iter(choices))}; "
            f"got {choice or 'none'}."
        )
    return choices[choice]


class _ConfigParser(flags.ArgumentParser):
    """Parses the value of --config with ``load_config``."""

    def parse(self, argument: str) -> ConfigDict:
        return load_config(argument)

    def flag_type(self) -> str:
        return "configuration"


def _list_files() -> dict[str, pathlib.Path]:
    """Name -> file of the packaged configurations, by name."""
    folder = next((folder for folder in _FOLDERS if folder.is_dir()), None)
    files = [] if folder is None else sorted(folder.glob("*.py"))
    return {path.stem: path for path in files if path.stem != "__init__"}


def _import_file(path: pathlib.Path) -> types.ModuleType:
    loader = importlib.machinery.SourceFileLoader(f"dat_jax_config_{path.stem}", str(path))  # any suffix
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None  # only None for a missing loader
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module
