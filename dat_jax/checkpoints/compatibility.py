"""Whether a run may go on from a checkpoint: what is written beside the state, and what must not have changed since."""

import json
import logging
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from dat_jax.errors import UserError

logger = logging.getLogger(__name__)

# Keys of config.model that say how it is computed, not what.
_HOW = ("dtype", "remat", "scan_blocks", "implementation")
# Keys that what a run does next is a function of.
_DATA = ("batch_size", "seed", "data.name")
# Keys that another machine or another length of the run may want otherwise, without a word.
_FREE = (
    "mesh",
    "compilation_cache",
    "profile",
    "log_every",
    "logs",
    "checkpoint",
    "spike_factor",
    "init_from",
    "init_head_rows",
)
_FREE_DATA = ("data.directory", "data.workers", "data.stall_seconds", "data.max_damaged")


def describe(config: ConfigDict, *, step: int, classes: int) -> dict[str, Any]:
    """What a checkpoint of a step has beside the state: the place in the data, the configuration and the class names' count."""
    return {
        "examples": step * config.batch_size,
        "config": config.to_dict(),
        "classes": classes,
    }


def check(metadata: Mapping[str, Any], config: ConfigDict, *, classes: int) -> None:
    """Refuses to go on with another model or other data; says what else is different.

    Raises:
      UserError: names what differs.
    """
    check_model(metadata, config, classes=classes)
    differing = _differences(metadata, config)
    data = {name: values for name, values in differing.items() if name in _DATA}
    if data:
        raise UserError(
            f"The run in this work directory was started with {_list(data)}. Its data would not continue where it stopped: "
            "set it as it was, or take another --workdir."
        )
    said = {
        name: values for name, values in differing.items() if name.split(".")[0] not in _FREE and name not in _FREE_DATA
    }
    if said:
        logger.warning(f"The configuration is not that of the checkpoint: {_list(said)}.")


def check_model(metadata: Mapping[str, Any], config: ConfigDict, *, classes: int) -> None:
    """Refuses the weights of another model, also where all shapes are the same.

    Raises:
      UserError: names what differs.
    """
    if (
        not isinstance(metadata, Mapping)
        or not isinstance(metadata.get("config"), Mapping)
        or "classes" not in metadata
    ):
        raise UserError("The checkpoint does not say what model it is of. Take another --workdir.")
    differing = {
        name: values
        for name, values in _differences(metadata, config).items()
        if name == "task" or name.startswith("head.") or (name.startswith("model.") and name[6:] not in _HOW)
    }
    if metadata["classes"] != classes:
        differing["number of classes"] = metadata["classes"], classes
    if differing:
        raise UserError(
            f"The checkpoint is of another model: {_list(differing)}. Take another --workdir, or set it as it was."
        )


def _differences(metadata, config):
    """{key of the configuration: (value then, value now)}; None for a key that is not there."""
    then, now = (_flatten(json.loads(json.dumps(config))) for config in (metadata["config"], config.to_dict()))
    then.setdefault("model.deformable_form", "dat_pp")  # the only form before this key existed
    names = sorted(then.keys() | now.keys())
    return {name: (then.get(name), now.get(name)) for name in names if then.get(name) != now.get(name)}


def _flatten(group, prefix=""):
    flat = {}
    for key, value in group.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _list(differences):
    return "; ".join(f"{name} {then}, now {now}" for name, (then, now) in differences.items())
