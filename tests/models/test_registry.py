"""The variants: sizes, name and shape of every parameter, and errors of the ``create_*`` functions."""

import json
import math
import pathlib

import flax
import jax
import jax.numpy as jnp
import pytest

import dat_jax
from dat_jax.__main__ import main
from dat_jax.models.registry import name_detector
from experiments.multiply_adds.count import count
from tests.helpers import tiny_segmentation
from tests.helpers.random_variables import random_variables

_PARAMETERS = pathlib.Path(__file__).with_name("parameters.json")
COUNTS = {
    "dat_pp_tiny": 23_962_876,
    "dat_pp_small": 53_127_366,
    "dat_pp_base": 93_690_640,
    "dat_pp_base_384": 93_690_640,
    "dat_p_tiny": 22_772_796,
    "dat_tiny": 28_319_138,
    "dat_small": 49_700_402,
    "dat_base": 87_881_632,
    "dat_base_384": 88_178_272,
}


def parameter_shapes(name: str) -> dict[str, list[int]]:
    model = dat_jax.create_model(name)
    variables = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32))
    flat = flax.traverse_util.flatten_dict(variables["params"], sep="/")
    return {path: list(leaf.shape) for path, leaf in sorted(flat.items())}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if "tiny" in name else pytest.mark.slow) for name in dat_jax.list_models()],
)
def test_names_and_shapes_of_parameters_equal_the_recorded_ones(name):
    shapes = parameter_shapes(name)
    assert shapes == json.loads(_PARAMETERS.read_text())[name]
    if name in COUNTS:
        assert sum(map(math.prod, shapes.values())) == COUNTS[name]
    (description,) = dat_jax.describe_models(name)
    assert (description.name, description.parameters) == (name, sum(map(math.prod, shapes.values())))


def test_every_published_variant_is_listed():
    assert set(dat_jax.list_models()) == {*COUNTS, "dat_pp_nano"}


def test_models_are_listed_by_pattern():
    assert dat_jax.list_models("*pp_b*") == ["dat_pp_base", "dat_pp_base_384"]
    assert dat_jax.list_models(filter="dat_[ts]*") == ["dat_tiny", "dat_small"]
    assert dat_jax.list_models("*PP*") == []


@pytest.mark.parametrize("name", ["dat_pp_nano", pytest.param("dat_tiny", marks=pytest.mark.slow)])
def test_multiply_adds_equal_the_counted_ones(name):
    (description,) = dat_jax.describe_models(name)
    assert count(name, description.image_size) == (description.parameters, description.multiply_adds)


def test_descriptions_have_published_accuracies():
    description = {model.name: (model.image_size, model.top1) for model in dat_jax.describe_models()}
    assert description["dat_pp_base"] == (224, 84.9)
    assert description["dat_pp_base_384"] == (384, 85.9)
    assert description["dat_tiny"] == (224, 82.0)
    assert description["dat_pp_nano"] == (48, None)


def test_list_models_prints_a_table(capsys):
    main(["--list_models=dat_pp_s*"])
    header, line = capsys.readouterr().out.splitlines()
    assert header.split() == [
        "model",
        "image",
        "size",
        "parameters",
        "multiply-adds,",
        "G",
        "top-1,",
        "%",
        "(published)",
    ]
    assert line.split() == ["dat_pp_small", "224", "53,127,366", "9.38", "84.6"]
    with pytest.raises(SystemExit):
        main(["--list_models=pp_small"])
    assert capsys.readouterr().err.startswith("error: There is no model 'pp_small'; did you mean dat_pp_small? Models:")


@pytest.mark.slow
def test_features_of_images():
    model = dat_jax.create_model("dat_pp_nano", **tiny_segmentation.BACKBONE)
    images = jnp.zeros((2, 64, 64, 3))
    variables = random_variables(model, images)
    maps = model.apply(variables, images, method="features")
    assert [x.shape for x in maps] == [(2, 16, 16, 8), (2, 8, 8, 8), (2, 4, 4, 16), (2, 2, 2, 16)]
    pooled = maps[-1].mean(axis=(1, 2))
    assert pooled.shape == (2, 16)


def test_overrides_replace_attributes():
    model = dat_jax.create_model("dat_pp_tiny", num_classes=7, drop_path_rate=0.1)
    assert (model.num_classes, model.drop_path_rate, model.dims) == (7, 0.1, (64, 128, 256, 512))


def test_unknown_names_raise_with_the_nearest_known_name():
    with pytest.raises(ValueError, match="'dat_pp_tinny', did you mean 'dat_pp_tiny'"):
        dat_jax.create_model("dat_pp_tinny")
    with pytest.raises(ValueError, match="'drop_path', did you mean 'drop_path_rate'"):
        dat_jax.create_model("dat_pp_tiny", drop_path=0.1)


def test_detectors_by_name():
    retinanet = dat_jax.create_detector("retinanet", backbone="dat_pp_nano", num_classes=3)
    assert isinstance(retinanet, dat_jax.RetinaNet)
    assert (retinanet.num_classes, retinanet.dat) == (3, dat_jax.create_model("dat_pp_nano"))
    for name, cascade in (("mask_rcnn", False), ("cascade_mask_rcnn", True)):
        backbone = {"name": "dat_pp_nano", "dtype": jnp.bfloat16}
        model = dat_jax.create_detector(name, backbone=backbone, width=16)
        assert isinstance(model, dat_jax.RCNN)
        assert (model.cascade, model.width, model.dtype) == (cascade, 16, jnp.bfloat16)
        assert name_detector(model) == name
        assert dat_jax.create_detector(name, backbone=model.dat, width=16) == model


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        (
            "mask_rcn",
            {},
            "Unknown detector 'mask_rcn', did you mean 'mask_rcnn'.* Detectors: retinanet, mask_rcnn, cascade",
        ),
        ("mask_rcnn", {"featuers": 8}, "RCNN has no attribute 'featuers', did you mean 'features'"),
        ("retinanet", {"width": 8}, "RetinaNet has no attribute 'width'"),
        ("retinanet", {"backbone": "dat_pp_nono"}, "Unknown model 'dat_pp_nono', did you mean 'dat_pp_nano'"),
    ],
)
def test_unknown_detectors_raise_with_the_nearest_known_name(name, settings, message):
    with pytest.raises(ValueError, match=message):
        dat_jax.create_detector(name, **{"backbone": "dat_pp_nano", **settings})


if __name__ == "__main__":
    lists = {name: parameter_shapes(name) for name in dat_jax.list_models()}
    _PARAMETERS.write_text(json.dumps(lists) + "\n")
