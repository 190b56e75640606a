"""What a run's configuration must hold. Values live in configs/; this module only checks them."""

import difflib
import numbers
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from dat_jax.errors import UserError

# Key -> type, or a tuple of the allowed values, or a group. What each means is said in configs/common.py.
SCHEMA: dict[str, Any] = {
    "task": ("classification",),
    "seed": int,
    "epochs": int,
    "batch_size": int,
    "accumulate_steps": int,
    "ema_decay": float,
    "log_every": int,
    "profile": int,
    "max_skipped_steps": int,
    "spike_factor": float,
    "compilation_cache": str,
    "init_from": str,
    "init_head_rows": str,
    "model": None,  # name, dtype and any attribute of the model; create_model checks them
    "data": {
        "name": str,
        "directory": str,
        "image_size": int,
        "eval_resize": int,
        "workers": int,
        "max_damaged": float,
        "stall_seconds": float,
    },
    "augmentation": {
        "min_crop_area": float,
        "max_crop_aspect": float,
        "flip_probability": float,
        "rand_augment_count": int,
        "rand_augment_magnitude": float,
        "rand_augment_std": float,
        "erasing_probability": float,
        "mixup_alpha": float,
        "cutmix_alpha": float,
    },
    "loss": {"label_smoothing": float},
    "optimizer": {"b1": float, "b2": float, "eps": float, "weight_decay": float, "clip_norm": float},
    "schedule": {
        "base_lr": float,
        "warmup_lr": float,
        "min_lr": float,
        "warmup_epochs": float,
        "reference_batch_size": int,
    },
    "mesh": {"data": int, "fsdp": int},
    "checkpoint": {"every": int, "keep": int},
    "eval": {
        "batch_size": int,
        "every": int,
        "checkpoint": ("best", "latest"),
        "sets": {"v2": str, "a": str, "r": str, "sketch": str, "real": str},
    },
}
_AT_LEAST_ONE = (
    *("epochs", "batch_size", "accumulate_steps", "log_every", "data.image_size", "eval.batch_size"),
    *(
        "max_skipped_steps",
        "checkpoint.keep",
        "eval.every",
        "schedule.reference_batch_size",
        "augmentation.max_crop_aspect",
    ),
)
_AT_LEAST_ZERO = (
    *("seed", "profile", "spike_factor", "checkpoint.every", "data.stall_seconds"),
    *("data.workers", "augmentation.rand_augment_count", "augmentation.rand_augment_magnitude"),
    *("augmentation.rand_augment_std", "augmentation.mixup_alpha", "augmentation.cutmix_alpha"),
    *("optimizer.eps", "optimizer.weight_decay", "optimizer.clip_norm"),
    *("schedule.base_lr", "schedule.warmup_lr", "schedule.min_lr", "schedule.warmup_epochs"),
)


def validate(config: ConfigDict) -> None:
    """Checks keys, types and ranges of a run's configuration.

    Raises:
      UserError: names the first unknown key with the nearest known one, missing key, or impossible value.
    """
    _check_group(config, SCHEMA, "config")
    model = config.model
    if not isinstance(model, Mapping | ConfigDict) or "name" not in model or "dtype" not in model:
        raise UserError("config.model wants a group with at least name and dtype.")
    if model.dtype not in ("auto", "float32", "bfloat16"):
        raise UserError(f"config.model.dtype wants one of auto, float32, bfloat16, got {model.dtype!r}.")
    for path in _AT_LEAST_ONE:
        if _get(config, path) < 1:
            raise UserError(f"config.{path} wants a number of at least 1, got {_get(config, path)}.")
    for path in _AT_LEAST_ZERO:
        if not _get(config, path) >= 0:
            raise UserError(f"config.{path} wants a number of at least 0, got {_get(config, path)}.")
    for path in ("ema_decay", "loss.label_smoothing", "optimizer.b1", "optimizer.b2"):
        if not 0 <= _get(config, path) < 1:
            raise UserError(f"config.{path} wants a number from 0 to below 1, got {_get(config, path)}.")
    for path in (
        "augmentation.flip_probability",
        "augmentation.erasing_probability",
        "augmentation.min_crop_area",
        "data.max_damaged",
    ):
        if not 0 <= _get(config, path) <= 1:
            raise UserError(f"config.{path} wants a number from 0 to 1, got {_get(config, path)}.")
    if config.data.eval_resize < config.data.image_size:
        raise UserError(
            f"config.data.eval_resize wants at least config.data.image_size {config.data.image_size}, got "
            f"{config.data.eval_resize}."
        )
    for axis, size in config.mesh.items():
        if size < 1 and size != -1:
            raise UserError(f"config.mesh.{axis} wants a number of devices or -1 for the rest, got {size}.")
    if config.mesh.data == config.mesh.fsdp == -1:
        raise UserError("config.mesh wants one of its sizes, data and fsdp are both -1.")


def _get(config, path):
    for key in path.split("."):
        config = config[key]
    return config


def _check_group(group, schema, path):
    for key in group:
        if key not in schema:
            near = difflib.get_close_matches(key, schema, n=1, cutoff=0)[0]
            raise UserError(f"Unknown key {path}.{key}; did you mean {path}.{near}?")
    for key, wanted in schema.items():
        name = f"{path}.{key}"
        if key not in group:
            raise UserError(f"Missing key {name}; configs/common.py has its default.")
        _check_value(group[key], wanted, name)


def _check_value(value, wanted, name):
    if isinstance(wanted, dict):
        if not isinstance(value, Mapping | ConfigDict):
            raise UserError(f"{name} wants a group of keys ({', '.join(wanted)}), got {value!r}.")
        _check_group(value, wanted, name)
    elif isinstance(wanted, tuple):
        if value not in wanted:
            raise UserError(f"{name} wants one of {', '.join(wanted)}, got {value!r}.")
    elif wanted is not None:
        kind = {float: numbers.Real, int: numbers.Integral, str: str}[wanted]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise UserError(f"{name} wants a value of type {wanted.__name__}, got {value!r}.")
