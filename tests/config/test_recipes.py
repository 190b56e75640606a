"""Packaged configurations: their values are the recorded ones, and they pass the checks.

After a deliberate change of a recipe, record the values again: python -m tests.config.test_recipes
"""

import gzip
import json
import pathlib

import pytest

from configs import quickstart
from dat_jax.config import (
    get_classification_config,
    get_detection_config,
    get_segmentation_config,
    list_configs,
    load_config,
    validate,
)
from dat_jax.errors import UserError
from dat_jax.models.registry import create_detector

RECORDED = pathlib.Path(__file__).parent / "recipes.json.gz"
DEFAULTS = {
    "defaults of classification": get_classification_config,
    "defaults of segmentation": get_segmentation_config,
    "defaults of detection": get_detection_config,
}


def encode(value):
    """For JSON, with tuples and lists told apart; JSON tells 1 from 1.0."""
    if isinstance(value, dict):
        return {key: encode(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return {type(value).__name__: [encode(item) for item in value]}
    return value


def current_values():
    configs = {name: load_config(name) for name in list_configs()} | {name: make() for name, make in DEFAULTS.items()}
    return {name: encode(config.to_dict()) for name, config in configs.items()}


def test_values_are_the_recorded_ones():
    """Compared as JSON text, in which 1, 1.0 and True differ."""
    recorded = json.loads(gzip.decompress(RECORDED.read_bytes()))
    current = current_values()
    assert sorted(current) == sorted(recorded)
    for name, values in recorded.items():
        assert json.dumps(current[name], sort_keys=True) == json.dumps(values, sort_keys=True), name


@pytest.mark.parametrize("name", list_configs())
def test_packaged_configurations_are_valid_and_locked(name):
    config = load_config(name)
    validate(config)
    assert config.is_locked


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults_are_valid_and_an_unknown_key_is_not(name):
    config = DEFAULTS[name]()
    validate(config)
    config.batchsize = 8
    with pytest.raises(UserError, match=r"Unknown key config\.batchsize; did you mean config\.batch_size"):
        validate(config)


DROP_PATH_RATES = {  # as published, by family, backbone and length of the run
    "retinanet": {"dat_pp_t": {"1x": 0.0, "3x": 0.2}, "dat_pp_s": {"1x": 0.1, "3x": 0.5}},
    "mask_rcnn": {"dat_pp_t": {"1x": 0.0, "3x": 0.3}, "dat_pp_s": {"1x": 0.1, "3x": 0.5}},
    "cascade_mask_rcnn": {"dat_pp_t": {"1x": 0.0, "3x": 0.1}, "dat_pp_s": {"3x": 0.5}, "dat_pp_b": {"3x": 0.8}},
}


def test_every_published_detector_has_its_recipe():
    recipes = {
        f"{family}:{backbone}_{length}": (family, backbone, length, rate)
        for family, backbones in DROP_PATH_RATES.items()
        for backbone, lengths in backbones.items()
        for length, rate in lengths.items()
    }
    assert sorted(recipes) == sorted(name for name in list_configs() if name.endswith(("_1x", "_3x")))
    for name, (family, backbone, length, rate) in recipes.items():
        config = load_config(name)
        assert config.head.name == family
        assert config.model.name == {"t": "dat_pp_tiny", "s": "dat_pp_small", "b": "dat_pp_base"}[backbone[-1]]
        assert config.init_from == f"weights/{backbone}"
        assert config.model.drop_path_rate == rate
        epochs = {"1x": (12, (8, 11)), "3x": (36, (27, 33))}[length]
        assert (config.epochs, tuple(config.schedule.drops)) == epochs
        assert config.schedule.base_lr == (2e-4 if family == "retinanet" else 4e-4)
        assert config.sampling.train_proposals == (2000 if family == "cascade_mask_rcnn" else 1000)
        create_detector(**config.head, backbone=config.model.name)


def test_a_locked_configuration_refuses_new_keys():
    with pytest.raises(AttributeError, match='Did you mean "batch_size"'):
        quickstart.get_config().batchsize = 3


if __name__ == "__main__":
    RECORDED.write_bytes(gzip.compress(json.dumps(current_values(), sort_keys=True).encode(), mtime=0))
