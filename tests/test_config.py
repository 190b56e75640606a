"""Configurations: the shipped ones hold, mistakes are said with the nearest key."""

import importlib
import pathlib

import pytest

from configs import common, quickstart
from dat_jax.config import validate
from dat_jax.errors import UserError

CONFIGS = sorted(
    path.stem for path in (pathlib.Path(__file__).parents[1] / "configs").glob("*.py") if path.stem != "__init__"
)


@pytest.mark.parametrize("name", CONFIGS)
def test_shipped_configurations_hold(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    validate(config)
    assert config.is_locked or name == "common"


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
        ("task", "detection", "config.task wants one of classification, segmentation, got 'detection'"),
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
    config = common.get_config()
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
