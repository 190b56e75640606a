"""Errors in a configuration are reported with the key, what is expected and the nearest known key."""

import pytest

from dat_jax.config import (
    TASKS,
    get_classification_config,
    get_detection_config,
    get_keys,
    get_segmentation_config,
    validate,
)
from dat_jax.config.common import SCHEDULES
from dat_jax.config.keys import Key, OpenGroup
from dat_jax.errors import UserError


def test_every_key_is_explained_and_its_default_is_allowed():
    for task in TASKS:
        for kind in SCHEDULES:
            check_keys(get_keys(task, kind), task)


def check_keys(keys, path):
    for name, key in keys.items():
        if isinstance(key, Key | OpenGroup):
            assert key.help.endswith("."), (path, name)
            assert "\n" not in key.help, (path, name)
        if isinstance(key, Key):
            assert key.accepts(key.default), (path, name)
            assert type(key.default) is key.type, (path, name)
        else:
            check_keys(key.keys if isinstance(key, OpenGroup) else key, f"{path}.{name}")


@pytest.mark.parametrize(
    ("key", "phrase", "accepted", "refused"),
    [
        (Key(int, 1, ""), "an integer", [0, -1], [1.0, True, "1", None]),
        (Key(int, 1, "", minimum=1, or_value=-1), "an integer of at least 1, or -1", [1, -1], [0, -2]),
        (
            Key(float, 1.0, "", minimum=0, below=1),
            "a number of at least 0 and below 1",
            [0, 0.5],
            [1, -0.1, float("nan")],
        ),
        (Key(float, 1.0, "", minimum=0, maximum=1), "a number from 0 to 1", [0, 1.0], [1.1, float("nan"), False]),
        (Key(bool, True, ""), "True or False", [True, False], [0, 1, "True"]),
        (Key(str, "a", "", choices=("a", "b")), "one of a, b", ["b"], ["c", 1]),
        (
            Key(tuple, (8,), "", items=int, above=0, can_be_empty=False),
            "a non-empty tuple of integers above 0, such as (8,)",
            [(1, 2), [3]],
            [(), (0,), (1.5,), 3, "12"],
        ),
        (
            Key(tuple, (), "", items=str, choices=("a", "b")),
            "a tuple with some of a, b, such as ('a',)",
            [(), ("b", "a")],
            ["a", ("c",)],
        ),
    ],
)
def test_values_that_a_key_accepts(key, phrase, accepted, refused):
    assert key.describe() == phrase
    assert all(map(key.accepts, accepted))
    assert not any(map(key.accepts, refused))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("epoch", 3, "Unknown key config.epoch; did you mean config.epochs"),
        (
            "optimizer.weight_deacy",
            0.1,
            "Unknown key config.optimizer.weight_deacy; did you mean config.optimizer.weight_decay",
        ),
        ("batch_size", 2.5, "config.batch_size must be an integer of at least 1, or -1, got 2.5"),
        ("batch_size", 0, "config.batch_size must be an integer of at least 1, or -1, got 0"),
        (
            "loss.label_smoothing",
            1.0,
            "config.loss.label_smoothing must be a number of at least 0 and below 1, got 1.0",
        ),
        ("eval.checkpoint", "newest", "config.eval.checkpoint must be one of best, latest, got 'newest'"),
        ("task", "tracking", "config.task must be one of classification, segmentation, detection, got 'tracking'"),
        ("mesh.data", 0, "config.mesh.data must be an integer of at least 1, or -1, got 0"),
        ("mesh.slices", 0, "config.mesh.slices must be an integer of at least 1, or -1, got 0"),
        ("profile", -1, "config.profile must be an integer of at least 0, got -1"),
        ("compilation_cache", 1, "config.compilation_cache must be a string, got 1"),
        ("seed", -1, "config.seed must be an integer of at least 0, got -1"),
        ("augmentation.mixup_alpha", -0.1, "config.augmentation.mixup_alpha must be a number of at least 0, got -0.1"),
        (
            "augmentation.flip_probability",
            1.5,
            "config.augmentation.flip_probability must be a number from 0 to 1, got 1.5",
        ),
        ("data.eval_resize", 200, "config.data.eval_resize must be at least config.data.image_size 224, got 200"),
        ("schedule.base_lr", float("nan"), "config.schedule.base_lr must be a number of at least 0, or -1, got nan"),
        ("schedule.base_lr", float("inf"), "config.schedule.base_lr must be a number of at least 0, or -1, got inf"),
        (
            "mesh",
            {"slices": -1, "data": -1, "fsdp": -1},
            "config.mesh.data or config.mesh.fsdp must be a number of devices, got -1 for both",
        ),
        ("schedule.kind", "exponential", "config.schedule.kind must be one of cosine, poly, step, got 'exponential'"),
        ("model.dtype", "float16", "config.model.dtype must be one of auto, float32, bfloat16, got 'float16'"),
        ("model", {"name": "dat_pp_tiny"}, "config.model must be a group with at least name and dtype"),
        ("logs", ("csv",), "config.logs must be a tuple with some of tensorboard, wandb"),
        ("data", "mnist5k", "config.data must be a group with the keys name, directory"),
    ],
)
def test_errors_of_a_classifier(key, value, message):
    check_refused(get_classification_config(), key, value, message)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "data.short_sides",
            (),
            r"config.data.short_sides must be a non-empty tuple of integers above 0, .*, got \(\)",
        ),
        (
            "data.short_sides",
            (480, 0),
            r"config.data.short_sides must be a non-empty tuple .*, got \(480, 0\)",
        ),
        ("data.short_sides", 480, r"config.data.short_sides must be a non-empty tuple .*, got 480"),
        ("data.short_sides", (480.5,), r"config.data.short_sides must be a non-empty tuple .*, got \(480.5,\)"),
        ("data.long_side", 799, "config.data.long_side must be at least the largest of short_sides 800, got 799"),
        ("data.test_long_side", 600, "config.data.test_long_side must be at least test_short_side 800, got 600"),
        ("data.max_boxes", 0, "config.data.max_boxes must be an integer of at least 1, got 0"),
        ("augmentation.crop_max", 300, "config.augmentation.crop_max must be at least crop_min 384, got 300"),
        (
            "augmentation.crop_probability",
            2.0,
            "config.augmentation.crop_probability must be a number from 0 to 1, got 2.0",
        ),
        ("sampling.rpn_samples", 0, "config.sampling.rpn_samples must be an integer of at least 1, got 0"),
        ("eval.iou_threshold", -0.5, "config.eval.iou_threshold must be a number from 0 to 1, got -0.5"),
        ("eval.multipel", 32, "Unknown key config.eval.multipel; did you mean config.eval.multiple"),
        ("schedule.factor", 1.5, "config.schedule.factor must be a number from 0 to 1, got 1.5"),
        ("schedule.drops", (8, 8), r"drops must be positive numbers in ascending order, got \(8, 8\)"),
        ("schedule.drops", (0,), r"drops must be positive numbers in ascending order, got \(0,\)"),
        ("schedule.drops", (float("nan"),), "drops must be a tuple of numbers"),
        ("schedule.power", 1.0, "Unknown key config.schedule.power"),
        ("optimizer.decay_rule", "norms", "must be one of matrices, all_but_norms, all_but_norms_and_bn, got 'norms'"),
        ("head", "mask_rcnn", "config.head must be a group with at least name"),
    ],
)
def test_errors_of_a_detector(key, value, message):
    check_refused(get_detection_config(), key, value, message)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("eval.window", 512, "config.eval.window and config.eval.stride must both be 0 .* got 512 and 0"),
        ("augmentation.min_ratio", 3.0, "config.augmentation.min_ratio must be at most max_ratio 2.0, got 3.0"),
        ("augmentation.min_ratio", 0.0, "config.augmentation.min_ratio must be a number above 0, got 0.0"),
        ("data.zero_is_ignored", 1, "config.data.zero_is_ignored must be True or False, got 1"),
        ("eval.ratios", (), r"config.eval.ratios must be a non-empty tuple of numbers above 0, such as \(1.0,\)"),
    ],
)
def test_errors_of_a_segmentor(key, value, message):
    check_refused(get_segmentation_config(), key, value, message)


def test_frozen_batch_norm_must_not_decay():
    config = get_segmentation_config()
    config.head.frozen_batch_norm = True
    with pytest.raises(UserError, match=r"requires config\.optimizer\.decay_rule=all_but_norms_and_bn"):
        validate(config)
    config.optimizer.decay_rule = "all_but_norms_and_bn"
    assert validate(config) is None
    config.optimizer.decay_rule, config.optimizer.weight_decay = "all_but_norms", 0.0
    assert validate(config) is None


def test_a_detector_may_keep_its_learning_rate():
    config = get_detection_config()
    config.schedule.drops = ()
    assert validate(config) is None


def check_refused(config, key, value, message):
    *groups, last = key.split(".")
    group = config
    for name in groups:
        group = group[name]
    with group.ignore_type():
        group[last] = value
    with pytest.raises(UserError, match=message):
        validate(config)


def test_a_missing_key_is_named():
    config = get_classification_config()
    del config.schedule.min_lr
    with pytest.raises(
        UserError,
        match="Missing key config.schedule.min_lr: expected a number of at least 0, or -1; its default is 5e-06",
    ):
        validate(config)
