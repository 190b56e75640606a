"""Configurations: the shipped ones hold, mistakes are said with the nearest key."""

import importlib
import pathlib

import pytest

from configs import common, quickstart
from dat_jax.config.validation import validate
from dat_jax.errors import UserError
from dat_jax.models.registry import create_detector

CONFIGS = sorted(
    path.stem for path in (pathlib.Path(__file__).parents[2] / "configs").glob("*.py") if path.stem != "__init__"
)


@pytest.mark.parametrize("name", CONFIGS)
def test_shipped_configurations_hold(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    validate(config)
    assert config.is_locked or name == "common"


DETECTORS = {  # drop path as published, by length of the run
    **{"retinanet_dat_pp_t": {"1x": 0.0, "3x": 0.2}, "retinanet_dat_pp_s": {"1x": 0.1, "3x": 0.5}},
    **{"mask_rcnn_dat_pp_t": {"1x": 0.0, "3x": 0.3}, "mask_rcnn_dat_pp_s": {"1x": 0.1, "3x": 0.5}},
    **{"cascade_dat_pp_t": {"1x": 0.0, "3x": 0.1}, "cascade_dat_pp_s": {"3x": 0.5}, "cascade_dat_pp_b": {"3x": 0.8}},
}


def test_every_published_detector_has_its_recipe():
    names = [f"{name}_{length}" for name, lengths in DETECTORS.items() for length in lengths]
    assert sorted(names) == [name for name in CONFIGS if name.endswith(("_1x", "_3x"))]
    for name in names:
        config = importlib.import_module(f"configs.{name}").get_config()
        kind, size = name[:-3].split("_dat_pp_")
        assert config.head.name == {"cascade": "cascade_mask_rcnn"}.get(kind, kind)
        assert config.model.name == {"t": "dat_pp_tiny", "s": "dat_pp_small", "b": "dat_pp_base"}[size]
        assert config.init_from == f"weights/dat_pp_{size}"
        assert config.model.drop_path_rate == DETECTORS[name[:-3]][name[-2:]]
        epochs = {"1x": (12, (8, 11)), "3x": (36, (27, 33))}[name[-2:]]
        assert (config.epochs, tuple(config.schedule.drops)) == epochs
        assert config.schedule.base_lr == (2e-4 if kind == "retinanet" else 4e-4)
        assert config.sampling.train_proposals == (2000 if kind == "cascade" else 1000)
        create_detector(**config.head, backbone=config.model.name)


def test_a_locked_configuration_refuses_new_keys():
    with pytest.raises(AttributeError, match='Did you mean "batch_size"'):
        quickstart.get_config().batchsize = 3


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("epoch", 3, "Unknown key config.epoch; did you mean config.epochs"),
        (
            "optimizer.weight_deacy",
            0.1,
            "Unknown key config.optimizer.weight_deacy; did you mean config.optimizer.weight_decay",
        ),
        ("batch_size", 2.5, "config.batch_size wants a value of type int, got 2.5"),
        ("batch_size", 0, "config.batch_size wants a number of at least 1, got 0"),
        ("loss.label_smoothing", 1.0, "from 0 to below 1, got 1.0"),
        ("eval.checkpoint", "newest", "wants one of best, latest, got 'newest'"),
        ("task", "tracking", "config.task wants one of classification, segmentation, detection, got 'tracking'"),
        ("mesh.data", 0, "a number of devices or -1 for the rest, got 0"),
        ("profile", -1, "config.profile wants a number of at least 0, got -1"),
        ("compilation_cache", 1, "config.compilation_cache wants a value of type str, got 1"),
        ("seed", -1, "config.seed wants a number of at least 0, got -1"),
        ("augmentation.mixup_alpha", -0.1, "config.augmentation.mixup_alpha wants a number of at least 0"),
        (
            "augmentation.flip_probability",
            1.5,
            "config.augmentation.flip_probability wants a number from 0 to 1, got 1.5",
        ),
        ("data.eval_resize", 200, "config.data.eval_resize wants at least config.data.image_size 224, got 200"),
        ("schedule.base_lr", float("nan"), "config.schedule.base_lr wants a number of at least 0, got nan"),
        ("data", "mnist5k", "config.data wants a group of keys"),
    ],
)
def test_mistakes_are_said(key, value, message):
    check_refused(common.get_config(), key, value, message)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("data.short_sides", (), r"config.data.short_sides wants at least one number, all above 0, got \(\)"),
        (
            "data.short_sides",
            (480, 0),
            r"config.data.short_sides wants at least one number, all above 0, got \(480, 0\)",
        ),
        ("data.short_sides", 480, r"config.data.short_sides wants several numbers, such as \(480, 800\), got 480"),
        ("data.short_sides", (480.5,), "config.data.short_sides wants a value of type int, got 480.5"),
        ("data.long_side", 799, "config.data.long_side wants at least the largest of short_sides 800, got 799"),
        ("data.test_long_side", 600, "config.data.test_long_side wants at least test_short_side 800, got 600"),
        ("data.max_boxes", 0, "config.data.max_boxes wants a number of at least 1, got 0"),
        ("augmentation.crop_max", 300, "config.augmentation.crop_max wants at least crop_min 384, got 300"),
        (
            "augmentation.crop_probability",
            2.0,
            "config.augmentation.crop_probability wants a number from 0 to 1, got 2.0",
        ),
        ("sampling.rpn_samples", 0, "config.sampling.rpn_samples wants a number of at least 1, got 0"),
        ("eval.iou_threshold", -0.5, "config.eval.iou_threshold wants a number from 0 to 1, got -0.5"),
        ("eval.multipel", 32, "Unknown key config.eval.multipel; did you mean config.eval.multiple"),
        ("schedule.factor", 1.5, "config.schedule.factor wants a number from 0 to 1, got 1.5"),
        ("schedule.drops", (8, 8), r"drops wants numbers above 0, each larger than the one before, got \(8, 8\)"),
        ("schedule.drops", (0,), r"drops wants numbers above 0, each larger than the one before, got \(0,\)"),
        ("schedule.drops", (float("nan"),), "drops wants numbers above 0"),
        ("schedule.power", 1.0, "Unknown key config.schedule.power"),
        ("optimizer.decay_rule", "norms", "wants one of matrices, all_but_norms, all_but_norms_and_bn, got 'norms'"),
        ("head", "mask_rcnn", "config.head wants a group with at least name"),
    ],
)
def test_mistakes_of_a_detector_are_said(key, value, message):
    check_refused(common.get_detection_config(), key, value, message)


def test_a_detector_may_keep_its_learning_rate():
    config = common.get_detection_config()
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
    config = common.get_config()
    del config.schedule.min_lr
    with pytest.raises(UserError, match="Missing key config.schedule.min_lr"):
        validate(config)
