"""What a run's configuration must hold. Values live in configs/; this module only checks them."""

import difflib
import itertools
import numbers
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from dat_jax.errors import UserError

# Key -> type, or a tuple of the allowed values, or a group; [float] is several numbers, [(...)] several of the allowed
# values. What each means is said in configs/common.py.
_EVERY_TASK: dict[str, Any] = {
    "task": str,
    "seed": int,
    "epochs": int,
    "steps": int,
    "batch_size": int,
    "accumulate_steps": int,
    "ema_decay": float,
    "log_every": int,
    "logs": [("tensorboard", "wandb")],
    "profile": int,
    "max_skipped_steps": int,
    "spike_factor": float,
    "compilation_cache": str,
    "init_from": str,
    "model": None,  # name, dtype and any attribute of the model; create_model checks them
    "data": {
        "name": str,
        "directory": str,
        "workers": int,
        "max_damaged": float,
        "stall_seconds": float,
    },
    "optimizer": {
        "b1": float,
        "b2": float,
        "eps": float,
        "weight_decay": float,
        "decay_rule": ("matrices", "all_but_norms", "all_but_norms_and_bn"),
        "clip_norm": float,
    },
    "mesh": {"data": int, "fsdp": int},
    "checkpoint": {"every": int, "keep": int},
    "eval": {"batch_size": int, "every": int, "every_steps": int, "checkpoint": ("best", "latest")},
}
_TASKS: dict[str, dict[str, Any]] = {
    "classification": {
        "init_head_rows": str,
        "data": {"image_size": int, "eval_resize": int},
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
        "eval": {"sets": {"v2": str, "a": str, "r": str, "sketch": str, "real": str}},
    },
    "segmentation": {
        "head": None,  # name and any attribute of the segmentor; create_segmentor checks them
        "data": {"crop_size": int, "long_side": int, "short_side": int, "zero_is_ignored": bool},
        "augmentation": {
            "min_ratio": float,
            "max_ratio": float,
            "max_class_ratio": float,
            "flip_probability": float,
            "distort": bool,
        },
        "loss": {"auxiliary_weight": float},
        "eval": {"ratios": [float], "flip": bool, "window": int, "stride": int},
    },
    "detection": {
        "head": None,  # name and any attribute of the detector; create_detector checks them
        "data": {
            "long_side": int,
            "short_sides": [int],
            "test_long_side": int,
            "test_short_side": int,
            "max_boxes": int,
            "buckets": str,
        },
        "augmentation": {
            "flip_probability": float,
            "crop_probability": float,
            "first_short_sides": [int],
            "crop_min": int,
            "crop_max": int,
        },
        "sampling": {
            "rpn_samples": int,
            "roi_samples": int,
            "train_candidates": int,
            "train_proposals": int,
            "test_candidates": int,
            "test_proposals": int,
        },
        "eval": {"score_threshold": float, "iou_threshold": float, "max_detections": int, "multiple": int},
    },
}
_SCHEDULES: dict[str, dict[str, Any]] = {
    "cosine": {"warmup_lr": float, "min_lr": float, "warmup_epochs": float, "reference_batch_size": int},
    "poly": {"power": float, "warmup_steps": int, "warmup_ratio": float},
    "step": {"warmup_steps": int, "warmup_ratio": float, "drops": [float], "factor": float},
}
_AT_LEAST_ONE = (
    *("epochs", "batch_size", "accumulate_steps", "log_every", "max_skipped_steps", "checkpoint.keep", "eval.every"),
    *("eval.batch_size", "data.image_size", "schedule.reference_batch_size", "augmentation.max_crop_aspect"),
    *("data.crop_size", "data.long_side", "data.short_side", "data.test_long_side", "data.test_short_side"),
    *("data.max_boxes", "augmentation.crop_min", "augmentation.crop_max"),
    *("sampling.rpn_samples", "sampling.roi_samples", "sampling.train_candidates", "sampling.train_proposals"),
    *("sampling.test_candidates", "sampling.test_proposals", "eval.max_detections", "eval.multiple"),
)
_AT_LEAST_ZERO = (
    *("seed", "steps", "profile", "spike_factor", "checkpoint.every", "data.stall_seconds", "data.workers"),
    *("augmentation.rand_augment_count", "augmentation.rand_augment_magnitude", "augmentation.rand_augment_std"),
    *("augmentation.mixup_alpha", "augmentation.cutmix_alpha", "optimizer.eps", "optimizer.weight_decay"),
    *("optimizer.clip_norm", "schedule.base_lr", "schedule.warmup_lr", "schedule.min_lr", "schedule.warmup_epochs"),
    *("schedule.power", "schedule.warmup_steps", "loss.auxiliary_weight", "eval.every_steps", "eval.window"),
    "eval.stride",
)
_BELOW_ONE = ("ema_decay", "loss.label_smoothing", "optimizer.b1", "optimizer.b2")
_FROM_ZERO_TO_ONE = (
    *("augmentation.flip_probability", "augmentation.erasing_probability", "augmentation.min_crop_area"),
    *("augmentation.max_class_ratio", "augmentation.crop_probability", "schedule.warmup_ratio", "schedule.factor"),
    *("data.max_damaged", "eval.score_threshold", "eval.iou_threshold"),
)
_ALL_ABOVE_ZERO = ("eval.ratios", "data.short_sides", "augmentation.first_short_sides")


def validate(config: ConfigDict) -> None:
    """Checks keys, types and ranges of a run's configuration.

    Raises:
      UserError: names the first unknown key with the nearest known one, missing key, or impossible value.
    """
    if "task" in config:
        _check_value(config.task, tuple(_TASKS), "config.task")
    if _has_keys(config.get("schedule"), ("kind",)):
        _check_value(config.schedule.kind, tuple(_SCHEDULES), "config.schedule.kind")
    _check_group(config, make_schema(config), "config")
    for name, wanted in (("model", ("name", "dtype")), ("head", ("name",))):
        if name in config and not _has_keys(config[name], wanted):
            raise UserError(f"config.{name} wants a group with at least {' and '.join(wanted)}.")
    if config.model.dtype not in ("auto", "float32", "bfloat16"):
        raise UserError(f"config.model.dtype wants one of auto, float32, bfloat16, got {config.model.dtype!r}.")
    ranges = (
        (_AT_LEAST_ONE, "a number of at least 1", lambda value: value >= 1),
        (_AT_LEAST_ZERO, "a number of at least 0", lambda value: value >= 0),
        (_BELOW_ONE, "a number from 0 to below 1", lambda value: 0 <= value < 1),
        (_FROM_ZERO_TO_ONE, "a number from 0 to 1", lambda value: 0 <= value <= 1),
    )
    for paths, wanted, holds in ranges:
        for path in paths:
            value = _get(config, path)
            if value is not None and not holds(value):
                raise UserError(f"config.{path} wants {wanted}, got {value}.")
    for path in _ALL_ABOVE_ZERO:
        values = _get(config, path)
        if values is not None and not (values and all(value > 0 for value in values)):
            raise UserError(f"config.{path} wants at least one number, all above 0, got {values}.")
    drops = _get(config, "schedule.drops") or ()
    if not all(before < drop for before, drop in itertools.pairwise((0, *drops))):
        raise UserError(f"config.schedule.drops wants numbers above 0, each larger than the one before, got {drops}.")
    _CHECKS[config.task](config)
    for axis, size in config.mesh.items():
        if size < 1 and size != -1:
            raise UserError(f"config.mesh.{axis} wants a number of devices or -1 for the rest, got {size}.")
    if config.mesh.data == config.mesh.fsdp == -1:
        raise UserError("config.mesh wants one of its sizes, data and fsdp are both -1.")


def _check_classification(config):
    if config.data.eval_resize < config.data.image_size:
        raise UserError(
            f"config.data.eval_resize wants at least config.data.image_size {config.data.image_size}, got "
            f"{config.data.eval_resize}."
        )


def _check_segmentation(config):
    augmentation, evaluation = config.augmentation, config.eval
    if not 0 < augmentation.min_ratio <= augmentation.max_ratio:
        raise UserError(
            f"config.augmentation.min_ratio wants a number above 0 and up to max_ratio {augmentation.max_ratio}, got "
            f"{augmentation.min_ratio}."
        )
    if bool(evaluation.window) != bool(evaluation.stride) or evaluation.stride > evaluation.window:
        raise UserError(
            f"config.eval.window and stride want two numbers, the stride at most the window, or 0 for whole images, got "
            f"{evaluation.window} and {evaluation.stride}."
        )


def _check_detection(config):
    data, augmentation = config.data, config.augmentation
    pairs = (
        ("data.long_side", data.long_side, "the largest of short_sides", max(data.short_sides)),
        ("data.test_long_side", data.test_long_side, "test_short_side", data.test_short_side),
        ("augmentation.crop_max", augmentation.crop_max, "crop_min", augmentation.crop_min),
    )
    for path, value, name, least in pairs:
        if value < least:
            raise UserError(f"config.{path} wants at least {name} {least}, got {value}.")


_CHECKS = {"classification": _check_classification, "segmentation": _check_segmentation, "detection": _check_detection}


def make_schema(config: Mapping[str, Any] | ConfigDict) -> dict[str, Any]:
    """What the task and the kind of schedule of a configuration ask for; those of common.py where it has none."""
    schedule = config.get("schedule")
    kind = schedule.get("kind") if _has_keys(schedule, ("kind",)) else None
    keys = _SCHEDULES[kind if isinstance(kind, str) and kind in _SCHEDULES else "cosine"]
    schema = {**_EVERY_TASK, "schedule": {"kind": tuple(_SCHEDULES), "base_lr": float, **keys}}
    for name, wanted in _TASKS[config.get("task", "classification")].items():
        schema[name] = {**schema[name], **wanted} if name in schema else wanted
    return schema


def _show(value) -> str:
    """In one line: a group prints as several."""
    return " ".join(repr(value).split())


def _has_keys(group, keys) -> bool:
    return isinstance(group, Mapping | ConfigDict) and all(key in group for key in keys)


def _get(config, path):
    """None where the task has no such key."""
    for key in path.split("."):
        config = config.get(key)
        if config is None:
            return None
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
            raise UserError(f"{name} wants a group of keys ({', '.join(wanted)}), got {_show(value)}.")
        _check_group(value, wanted, name)
    elif isinstance(wanted, tuple):
        if value not in wanted:
            raise UserError(f"{name} wants one of {', '.join(wanted)}, got {_show(value)}.")
    elif isinstance(wanted, list) and isinstance(wanted[0], tuple):
        if not isinstance(value, list | tuple) or not all(item in wanted[0] for item in value):
            example = repr(wanted[0][:1])
            raise UserError(f"{name} wants some of {', '.join(wanted[0])}, such as {example}, got {_show(value)}.")
    elif isinstance(wanted, list):
        if not isinstance(value, list | tuple):
            example = {float: "(0.5, 1.0)", int: "(480, 800)"}[wanted[0]]
            raise UserError(f"{name} wants several numbers, such as {example}, got {_show(value)}.")
        for item in value:
            _check_value(item, wanted[0], name)
    elif wanted is bool:
        if not isinstance(value, bool):
            raise UserError(f"{name} wants True or False, got {_show(value)}.")
    elif wanted is not None:
        kind = {float: numbers.Real, int: numbers.Integral, str: str}[wanted]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise UserError(f"{name} wants a value of type {wanted.__name__}, got {_show(value)}.")
