"""Compatibility of a checkpoint with the configuration of the run that restores it.

The arrays alone do not show it: another seed, batch size or form of attention has the same shapes. So the configuration is
stored beside the state and compared when the state is restored.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from dat_jax.checkpoints.class_names import describe_difference
from dat_jax.errors import UserError

logger = logging.getLogger(__name__)

# Keys of config.model that change how the function is computed, but not which function.
_IMPLEMENTATION = ("dtype", "remat", "scan_blocks", "implementation")
# Keys that determine the order of the training data, which a resumed run continues.
_DATA_ORDER = ("batch_size", "seed", "data.name", "augmentation.repeats")
# Keys that determine the state of the optimizer and the averages.
_OPTIMIZER = (
    "ema_decays",
    "optimizer.name",
    "optimizer.freeze",
    "optimizer.adafactor.min_side",
    "optimizer.adafactor.scale_by_parameter",
)
# Numbers that determine it by being 0 or not.
_SWITCHES = ("ema_decay", "optimizer.clip_norm", "optimizer.adafactor.momentum", "optimizer.adafactor.clip_rms")
# Keys, or groups of keys, that may change without a warning: those of the machine, of logging and of the start of the run.
_UNCHECKED = (
    "mesh",
    "memory_budget",
    "compilation_cache",
    "tune",
    "profile",
    "log_every",
    "logs",
    "checkpoint",
    "spike_factor",
    "init_from",
    "init_head_rows",
    "data.directory",
    "data.workers",
    "data.stall_seconds",
    "data.max_damaged",
)
# Values of keys that older versions did not have, which computed only this.
_IMPLIED = {
    "model.deformable_form": "dat_pp",
    "optimizer.name": "adamw",
    "optimizer.freeze": [],
    "ema_decays": [],
    "augmentation.repeats": 1,
    "lora.rank": 0,
    "data.channels": 3,
    "data.dtype": "uint8",
    "data.mean": [0.485, 0.456, 0.406],
    "data.std": [0.229, 0.224, 0.225],
}
# Keys of config.data that determine what the network gets as its input.
_INPUT = ("data.channels", "data.dtype", "data.mean", "data.std")


def describe(config: ConfigDict, *, step: int, class_names: Sequence[str]) -> dict[str, Any]:
    """Make the metadata that a checkpoint stores beside the state.

    Args:
      config: configuration of the run.
      step: number of finished steps.
      class_names: names of the classes of the training data, in the order of their labels.

    Returns:
      A mapping that JSON can store: "examples", the number of training examples used so far, which is the position in the
      data; "config"; "classes", the number of classes; and "class_names".
    """
    return {
        "examples": step * config.batch_size,
        "config": config.to_dict(),
        "classes": len(class_names),
        "class_names": list(class_names),
    }


def check(metadata: Mapping[str, Any], config: ConfigDict, *, class_names: Sequence[str]) -> None:
    """Check that a run can be resumed from a checkpoint. Other differences of the configuration are logged as a warning.

    Args:
      metadata: metadata of the checkpoint, see ``describe``.
      config: configuration of the run.
      class_names: names of the classes of the training data, in the order of their labels.

    Raises:
      UserError: the model, the classes, the order of the training data or the optimizer differs. The keys are named, with both
        values.
    """
    check_model(metadata, config, class_names=class_names)
    differences = _compare(metadata["config"], config)
    if data := {key: values for key, values in differences.items() if key in _DATA_ORDER}:
        raise UserError(
            f"The run in this work directory was started with {_format(data)}. Its data would not continue where it stopped: "
            "restore the value, or choose another --workdir."
        )
    name = config.optimizer.name
    if state := {key: values for key, values in differences.items() if _determines_state(key, *values, optimizer=name)}:
        raise UserError(
            f"The run in this work directory was started with {_format(state)}. The state of its optimizer or average is another "
            "one: restore the value, or choose another --workdir and start from the weights of this run with --config.init_from."
        )
    changed = {key: values for key, values in differences.items() if not _is_unchecked(key)}
    if changed:
        logger.warning("The configuration differs from that of the checkpoint: %s.", _format(changed))


def check_evaluation(metadata: Mapping[str, Any], config: ConfigDict, *, class_names: Sequence[str]) -> None:
    """Check that a checkpoint has the weights of the configured model, and the configured averages of them.

    Raises:
      UserError: see ``check_model``; or the averages differ. The keys are named, with both values.
    """
    check_model(metadata, config, class_names=class_names)
    differences = _compare(metadata["config"], config)
    averages = {
        key: values
        for key, values in differences.items()
        if key in ("ema_decay", "ema_decays") and _determines_state(key, *values, optimizer=config.optimizer.name)
    }
    if averages:
        raise UserError(
            f"The checkpoint has other averages of the weights: {_format(averages)}. Restore the values, or leave out "
            "--config to evaluate with the configuration of the run."
        )


def check_model(metadata: Mapping[str, Any], config: ConfigDict, *, class_names: Sequence[str]) -> None:
    """Check that a checkpoint has the weights of the configured model, including what shapes do not show.

    Args:
      metadata: metadata of the checkpoint, see ``describe``. Older checkpoints have no "class_names".
      config: configuration of the run.
      class_names: names of the classes of the data, in the order of their labels.

    Raises:
      UserError: the metadata is incomplete, or the task, the model, its head or the classes differ. The keys are named, with
        both values, and the names of the classes.
    """
    if (
        not isinstance(metadata, Mapping)
        or not isinstance(metadata.get("config"), Mapping)
        or "classes" not in metadata
    ):
        raise UserError("The checkpoint does not record which model it belongs to. Choose another --workdir.")
    differences = {
        key: values for key, values in _compare(metadata["config"], config).items() if _determines_function(key)
    }
    recorded = metadata.get("class_names")
    if not differences and isinstance(recorded, list) and (reason := describe_difference(recorded, class_names)):
        raise UserError(
            f"The checkpoint is of other classes: {reason}. Choose another --workdir, or restore the names."
        )
    if metadata["classes"] != len(class_names):
        differences["number of classes"] = metadata["classes"], len(class_names)
    if differences:
        raise UserError(
            f"The checkpoint is of another model: {_format(differences)}. Choose another --workdir, or restore the values."
        )


def _determines_function(key: str) -> bool:
    group, _, name = key.partition(".")
    of_model = group in ("head", "lora") or (group == "model" and name not in _IMPLEMENTATION)
    return key == "task" or key in _INPUT or of_model


def _determines_state(key: str, saved: Any, current: Any, *, optimizer: str) -> bool:
    """Whether the state of a run that was started with another value of a key cannot be continued."""
    if key.startswith("optimizer.adafactor.") and optimizer != "adafactor":
        return False
    if key == "ema_decays":
        return sorted(saved or ()) != sorted(current)
    if key == "optimizer.b1":  # the average of schedule-free AdamW follows from the weights and this number
        return optimizer == "schedule_free_adamw"
    return key in _OPTIMIZER or (key in _SWITCHES and bool(saved) != bool(current))


def _is_unchecked(key: str) -> bool:
    return key in _UNCHECKED or key.partition(".")[0] in _UNCHECKED


def _compare(saved: Mapping[str, Any], config: ConfigDict) -> dict[str, tuple[Any, Any]]:
    """Keys with other values, as {key: (saved value, current value)}. The value of a missing key is None."""
    saved, current = (_flatten(mapping) for mapping in (saved, config.to_dict()))
    saved = {key: value for key, value in _IMPLIED.items() if key in current} | saved
    # Other keys that older versions did not have are not compared: they compute the same with their defaults.
    keys = sorted(saved.keys() | {key for key in current if key.startswith("model.")})
    return {key: (saved.get(key), current.get(key)) for key in keys if saved.get(key) != current.get(key)}


def _flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    """Keys joined by dots, with values as JSON returns them: tuples become lists."""
    return flatten_dict(json.loads(json.dumps(config)), sep=".")


def _format(differences: Mapping[str, tuple[Any, Any]]) -> str:
    return "; ".join(f"{key} {saved}, now {current}" for key, (saved, current) in differences.items())
