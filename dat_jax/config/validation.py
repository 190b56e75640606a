"""Checks of a run's configuration, derived from the declared keys."""

import difflib
import itertools
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from dat_jax.config import classification, common, detection, segmentation
from dat_jax.config.keys import Key, Keys, OpenGroup
from dat_jax.errors import UserError

_TASKS = {"classification": classification, "segmentation": segmentation, "detection": detection}
TASKS = tuple(_TASKS)


def get_keys(task: str, schedule: str | None = None) -> dict[str, Any]:
    """Keys of a task's configuration.

    Args:
      task: one of ``TASKS``.
      schedule: kind of learning rate schedule, one of ``common.SCHEDULES``; None: the default of the task.

    Returns:
      Nested dicts of ``Key`` and ``OpenGroup``.
    """
    keys = _TASKS[task].KEYS
    return keys if schedule is None else {**keys, "schedule": common.make_schedule_keys(schedule)}


def validate(config: ConfigDict) -> None:
    """Checks keys, types and values of a run's configuration.

    Raises:
      UserError: for the first unknown key (with the nearest known one), missing key or impossible value.
    """
    task = config.get("task", TASKS[0])
    if task not in TASKS:
        raise UserError(f"config.task must be one of {', '.join(TASKS)}, got {_format(task)}.")
    schedule = config.get("schedule")
    kind = schedule.get("kind") if _is_group(schedule) else None
    if kind is not None and kind not in tuple(common.SCHEDULES):
        raise UserError(f"config.schedule.kind must be one of {', '.join(common.SCHEDULES)}, got {_format(kind)}.")
    _check_group(config, get_keys(task, kind), "config")
    drops = config.schedule.get("drops") or ()
    if not all(previous < drop for previous, drop in itertools.pairwise((0, *drops))):
        raise UserError(f"config.schedule.drops must be positive numbers in ascending order, got {drops}.")
    if config.mesh.data == config.mesh.fsdp == -1:
        raise UserError("config.mesh.data or config.mesh.fsdp must be a number of devices, got -1 for both.")
    _check_averaging(config)
    _check_frozen_batch_norm(config)
    _TASKS[task].check(config)


def _check_averaging(config: ConfigDict) -> None:
    decays = config.ema_decays
    if len({config.ema_decay, *decays}) <= len(decays):
        raise UserError(
            f"config.ema_decays must be numbers that differ from each other and from config.ema_decay {config.ema_decay}, got "
            f"{tuple(decays)}."
        )
    if config.optimizer.name == "schedule_free_adamw":
        if config.ema_decay > 0 or decays:
            raise UserError(
                "config.ema_decay must be 0 and config.ema_decays empty for schedule_free_adamw, which evaluates its own average."
            )
        if config.optimizer.b1 == 0:
            raise UserError("config.optimizer.b1 must be above 0 for schedule_free_adamw.")


def _check_frozen_batch_norm(config: ConfigDict) -> None:
    optimizer = config.optimizer
    decays = optimizer.decay_rule == "all_but_norms" and optimizer.weight_decay > 0
    if decays and "head" in config and config.head.get("frozen_batch_norm"):
        raise UserError(
            "config.head.frozen_batch_norm requires config.optimizer.decay_rule=all_but_norms_and_bn: with all_but_norms the "
            "weight decay would change the parameters of BatchNorm."
        )


def _check_group(group: Mapping | ConfigDict, keys: Keys, path: str) -> None:
    for name in group:
        if name not in keys:
            nearest = difflib.get_close_matches(name, keys, n=1, cutoff=0)[0]
            raise UserError(f"Unknown key {path}.{name}; did you mean {path}.{nearest}?")
    for name, key in keys.items():
        if name not in group:
            hint = f": expected {key.describe()}; its default is {key.default!r}" if isinstance(key, Key) else ""
            raise UserError(f"Missing key {path}.{name}{hint}.")
        _check_value(group[name], key, f"{path}.{name}")


def _check_value(value: Any, key: Key | OpenGroup | Keys, path: str) -> None:
    if isinstance(key, Key):
        if not key.accepts(value):
            raise UserError(f"{path} must be {key.describe()}, got {_format(value)}.")
    elif isinstance(key, OpenGroup):
        if not _is_group(value) or not all(name in value for name in key.required):
            raise UserError(f"{path} must be a group with at least {' and '.join(key.required)}, got {_format(value)}.")
        for name in key.keys:
            if name in value:
                _check_value(value[name], key.keys[name], f"{path}.{name}")
    elif _is_group(value):
        _check_group(value, key, path)
    else:
        raise UserError(f"{path} must be a group with the keys {', '.join(key)}, got {_format(value)}.")


def _is_group(value: Any) -> bool:
    return isinstance(value, Mapping | ConfigDict)


def _format(value: Any) -> str:
    """In one line; groups print as several."""
    return " ".join(repr(value).split())
