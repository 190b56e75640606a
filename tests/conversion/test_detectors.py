"""Conversion of detectors: names, shapes, parameter counts and values."""

import jax
import numpy as np
import pytest

from dat_jax import create_detector, create_model, list_models
from dat_jax.conversion import detectors
from tests.helpers.golden_files import read_keys

PUBLISHED = {  # millions of parameters, from the tables of the paper
    **{
        ("retinanet", "tiny"): 33.7,
        ("retinanet", "small"): 63.3,
        ("maskrcnn", "tiny"): 44.8,
        ("maskrcnn", "small"): 74.4,
    },
    **{("cascade", "tiny"): 81.4, ("cascade", "small"): 110.5, ("cascade", "base"): 150.9},
}


def make(kind, size):
    name = {"retinanet": "retinanet", "maskrcnn": "mask_rcnn", "cascade": "cascade_mask_rcnn"}[kind]
    return create_detector(name, backbone=f"dat_pp_{size}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "size"),
    [pytest.param(kind, size, marks=() if size == "tiny" else pytest.mark.slow) for kind, size in PUBLISHED],
)
def test_names_and_counts_equal_the_published_ones(kind, size):
    total, recorded = read_keys(f"{kind}_{size}")
    ours = detectors.detector_shapes(make(kind, size))
    counters = {name for name in recorded if name.endswith("num_batches_tracked")}
    assert ours == {name: shape for name, shape in recorded.items() if name not in counters}
    assert total == sum(np.prod(shape) for name, shape in ours.items() if not name.endswith(("_mean", "_var")))
    assert abs(total / 1e6 - PUBLISHED[kind, size]) <= 0.06


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["retinanet", "maskrcnn", "cascade"])
def test_full_size_state_dict_round_trip(kind):
    rng = np.random.default_rng(0)
    _, recorded = read_keys(f"{kind}_tiny")
    state_dict = {
        name: np.zeros((), np.int64) if name.endswith("tracked") else rng.standard_normal(shape, np.float32)
        for name, shape in recorded.items()
    }
    model = make(kind, "tiny")
    variables = detectors.detector_variables(model, state_dict)
    back = detectors.detector_to_official(model, jax.device_get(variables))
    assert back.keys() == state_dict.keys()
    for name, array in state_dict.items():
        np.testing.assert_array_equal(back[name], array, err_msg=name)


@pytest.mark.slow
def test_weight_decay_of_published_names():
    """The published code decays neither the names that are excluded for segmentors nor any norm, here the BatchNorms "bn"."""
    from dat_jax.training.optimizers.weight_decay import decay_all_but_norms_and_bn

    model = create_detector("cascade_mask_rcnn", backbone="dat_tiny", features=8, width=16)
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    decays = jax.tree.map(
        lambda leaf, d: np.full(leaf.shape, d), shapes["params"], decay_all_but_norms_and_bn(shapes["params"])
    )
    statistics = jax.tree.map(lambda leaf: np.zeros(leaf.shape), shapes["batch_stats"])
    official = detectors.detector_to_official(model, {"params": decays, "batch_stats": statistics})
    undecayed = ("norm", ".bn.", "rpe_table", "relative_position_bias_table", "absolute_pos_embed")
    for word in undecayed[:-1]:
        assert any(word in name for name in official)
    for name, array in official.items():
        if not name.endswith(("running_mean", "running_var", "tracked")):
            assert array.all() == (not any(word in name for word in undecayed)), name
    assert official["roi_head.bbox_head.2.fc_cls.bias"].all()


@pytest.mark.parametrize("name", ["retinanet", "mask_rcnn", "cascade_mask_rcnn"])
def test_kind_and_widths_are_read_from_the_weights(name):
    width = {} if name == "retinanet" else {"width": 16}
    model = create_detector(name, backbone="dat_pp_nano", num_classes=3, features=8, **width)
    state_dict = {key: np.zeros(shape, np.float32) for key, shape in detectors.detector_shapes(model).items()}
    assert detectors.guess_detector(state_dict, "dat_pp_nano") == model
    backbones = {size: create_model(size) for size in ("dat_pp_tiny", "dat_pp_nano")}
    assert detectors.find_detector(state_dict, backbones=backbones) == ("dat_pp_nano", model)
    del state_dict["neck.fpn_convs.0.conv.weight"]
    assert detectors.find_detector(state_dict, backbones=backbones) is None


@pytest.mark.parametrize(("kind", "name"), [("retinanet", "retinanet"), ("cascade", "cascade_mask_rcnn")])
def test_model_of_published_weights_is_recognized(kind, name):
    _, recorded = read_keys(f"{kind}_tiny")
    state_dict = {key: np.broadcast_to(np.float32(0), shape) for key, shape in recorded.items()}
    match = detectors.find_detector(state_dict, backbones={size: create_model(size) for size in list_models()})
    assert match == ("dat_pp_tiny", create_detector(name, backbone="dat_pp_tiny"))


def test_weights_of_unexpected_shapes_give_a_valid_model():
    for shape in ((), (0,), (5,), (0, 0, 3, 3)):
        state_dict = {
            "bbox_head.retina_cls.weight": np.zeros(shape),
            "neck.lateral_convs.0.conv.weight": np.zeros(shape),
        }
        model = detectors.guess_detector(state_dict, "dat_pp_nano")
        assert min(model.num_classes, model.features) >= 1
