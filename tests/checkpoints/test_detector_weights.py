"""Trained detectors: as folders of weights, as work directories, and as the start of another training."""

import json

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dat_jax
from dat_jax.checkpoints.exports import export_model
from dat_jax.checkpoints.loading import load_for_finetuning, load_trained
from dat_jax.checkpoints.manager import Checkpoints
from dat_jax.errors import UserError
from dat_jax.training.state import TrainState
from tests.helpers import tiny_segmentation
from tests.helpers.random_variables import random_variables

DETECTORS = ("retinanet", "mask_rcnn", "cascade_mask_rcnn")
QUICK_DETECTORS = [pytest.param(name, marks=() if name == "retinanet" else pytest.mark.slow) for name in DETECTORS]
IMAGES = np.zeros((1, 64, 64, 3), np.float32)
# The layers that go by the number of classes, and their widths with three.
OF_CLASSES = {
    "retinanet": {"bbox_head/retina_cls": 27},
    "mask_rcnn": {"bbox_heads_0/fc_cls": 4, "bbox_heads_0/fc_reg": 12, "mask_heads_0/conv_logits": 3},
    "cascade_mask_rcnn": {
        f"{layer}": width
        for stage in range(3)
        for layer, width in (
            (f"bbox_heads_{stage}/fc_cls", 4),
            (f"bbox_heads_{stage}/fc_reg", 12),
            (f"mask_heads_{stage}/conv_logits", 3),
        )
    },
}


def make(name, *, classes=3, seed=0, **backbone):
    width = {} if name == "retinanet" else {"width": 16}
    backbone = {"name": "dat_pp_nano", **tiny_segmentation.BACKBONE, **backbone}
    model = dat_jax.create_detector(name, backbone=backbone, num_classes=classes, features=8, **width)
    return model, random_variables(model, IMAGES, seed=seed)


def flat(tree):
    return flax.traverse_util.flatten_dict(tree, sep="/")


def assert_same(got, wanted):
    got, wanted = flat(got), flat(wanted)
    assert got.keys() == wanted.keys()
    for name, array in wanted.items():
        assert got[name].dtype == array.dtype
        np.testing.assert_array_equal(got[name], array, err_msg=name)


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Name -> a folder of its export, the model and the variables in it."""
    directory, found = tmp_path_factory.mktemp("exports"), {}
    for name in DETECTORS:
        model, variables = make(name)
        export_model(directory / name, model=model, variables=variables)
        found[name] = directory / name, model, variables
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK_DETECTORS)
def test_the_model_of_an_export_is_restored(name, exports):
    directory, wanted, variables = exports[name]
    model, loaded = dat_jax.load_pretrained(directory)
    assert model == wanted
    assert_same(loaded, variables)
    assert ("batch_stats" in loaded) == (name == "cascade_mask_rcnn")
    described = json.loads((directory / "model.json").read_text())
    assert described["detector"]["name"] == name
    assert described["model"]["dims"] == [8, 8, 16, 16]
    model, loaded = dat_jax.load_pretrained(directory, dtype=jnp.bfloat16, drop_path_rate=0.5)
    assert (model.dtype, model.dat.dtype, model.dat.drop_path_rate) == (jnp.bfloat16, jnp.bfloat16, 0.5)
    assert_same(loaded, variables)


def test_a_loaded_detector_runs_on_images(exports):
    model, variables = dat_jax.load_pretrained(exports["retinanet"][0])
    found = jax.jit(model.apply)(variables, np.zeros((1, 64, 96, 3), np.float32))
    assert [score.shape[1:3] for score in found["scores"]] == [(8, 12), (4, 6), (2, 3), (1, 2), (1, 1)]
    assert found["scores"][0].shape[-1] == 9 * 3


@pytest.mark.parametrize("name", QUICK_DETECTORS)
def test_the_model_of_a_work_directory_is_restored(name, tmp_path):
    """The number of classes is that of the weights, the best checkpoint that of box AP."""
    model, _ = make(name)
    settings = {"name": "dat_pp_nano", "dtype": "auto", **tiny_segmentation.BACKBONE}
    head = {"name": name, "features": 8, **({} if name == "retinanet" else {"width": 16})}
    (tmp_path / "config.json").write_text(json.dumps({"task": "detection", "model": settings, "head": head}))
    with Checkpoints(tmp_path / "checkpoints", metric="bbox/AP") as checkpoints:
        for step, found in {1: 20.0, 2: 30.0, 3: 10.0}.items():
            model_state = make(name, seed=step)[1]
            params = model_state.pop("params")
            state = jax.device_put(TrainState(jnp.int32(step), params, model_state, (), None))
            checkpoints.save(state, metadata={"examples": 0}, metrics={"bbox/AP": found})
    loaded, variables = load_trained(tmp_path)
    assert loaded == model
    assert_same(variables, make(name, seed=2)[1])


@pytest.mark.parametrize("config", [{"task": "detection", "model": {}}, {"task": "detection", "model": {}, "head": 1}])
def test_a_work_directory_without_its_detector_is_an_error(config, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"config\.json does not describe the model|no complete checkpoint"):
        load_trained(tmp_path)


def test_an_export_of_an_unknown_detector_is_an_error(exports, tmp_path):
    _, model, variables = exports["mask_rcnn"]
    export_model(tmp_path / "export", model=model, variables=variables)
    file = tmp_path / "export" / "model.json"
    for detector in ({"name": "yolo"}, {"name": "mask_rcnn", "depth": 3}, {}, None):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"detector": detector}))
        with pytest.raises(UserError, match="export cannot be loaded: "):
            load_trained(tmp_path / "export")


@pytest.mark.slow
@pytest.mark.parametrize("name", DETECTORS)
def test_layers_for_other_classes_are_initialized(name, exports):
    directory, _, given = exports[name]
    _, fresh = make(name, classes=5, seed=1)
    variables, notes = load_for_finetuning(directory, fresh_variables=fresh, deformable_form="dat_pp")
    assert notes == ["The layers for 5 classes are initialized: the trained ones are for 3."]
    got, given, fresh = flat(variables), flat(given), flat(fresh)
    assert got.keys() == fresh.keys()
    new = {f"params/{layer}/{leaf}" for layer in OF_CLASSES[name] for leaf in ("kernel", "bias")}
    assert {key for key, array in given.items() if array.shape != fresh[key].shape} == new
    for layer, width in OF_CLASSES[name].items():
        assert given[f"params/{layer}/bias"].shape == (width,)
    for key in fresh:
        np.testing.assert_array_equal(got[key], (fresh if key in new else given)[key], err_msg=key)
    _, fresh = make(name, seed=1)
    variables, notes = load_for_finetuning(directory, fresh_variables=fresh, deformable_form="dat_pp")
    assert notes == []
    assert_same(variables, exports[name][2])


@pytest.mark.parametrize("name", DETECTORS)
def test_a_detector_starts_from_a_classifier(name, tmp_path):
    classifier = dat_jax.create_model("dat_pp_nano", **tiny_segmentation.BACKBONE, num_classes=9)
    weights = random_variables(classifier, IMAGES, seed=5)
    export_model(tmp_path / "classifier", model=classifier, variables=weights)
    _, fresh = make(name)
    variables, notes = load_for_finetuning(tmp_path / "classifier", fresh_variables=fresh, deformable_form="dat_pp")
    assert notes == ["The backbone is that of a classifier; norms of its maps, and heads, are initialized."]
    given = {f"params/backbone/dat/{key}": array for key, array in flat(weights["params"]).items() if key[:4] != "cls_"}
    assert_same(variables, flax.traverse_util.unflatten_dict(flat(fresh) | given, sep="/"))


@pytest.mark.slow
def test_weights_of_another_kind_are_an_error(exports, tmp_path):
    segmentor = dat_jax.create_segmentor("sem_fpn", backbone=make("retinanet")[0].dat, channels=8, neck_channels=8)
    pixels = random_variables(segmentor, IMAGES)
    export_model(tmp_path / "segmentor", model=segmentor, variables=pixels)
    _, boxes = make("retinanet")
    directory, classifier = exports["retinanet"][0], {"params": {"cls_head": {"kernel": np.zeros((16, 9))}}}
    for path, fresh, message in (
        (tmp_path / "segmentor", boxes, "of a segmentor; a detector starts from those of a classifier, or of another"),
        (directory, pixels, "of a detector; a segmentor starts from those of a classifier, or of another segmentor"),
        (directory, classifier, r"of a detector; a classifier starts from those of a classifier\."),
        (
            exports["mask_rcnn"][0],
            boxes,
            "of another model: .*bbox_head/cls_convs_0/bias is missing.*bbox_heads_0/fc_cls/bias is unknown",
        ),
        (
            directory,
            make("retinanet", dims=(8, 8, 16, 32))[1],
            "of another model: .*down_projs_2/conv/kernel: expected",
        ),
    ):
        with pytest.raises(UserError, match=message) as info:
            load_for_finetuning(path, fresh_variables=fresh, deformable_form="dat_pp")
        assert "\n" not in str(info.value)
