"""Feature maps for other heads: chosen stages, norms, trained weights, frozen BatchNorm, and the examples of docs/backbone.md."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict

import dat_jax
from dat_jax.checkpoints.exports import export_model
from dat_jax.errors import UserError
from dat_jax.models.rcnn import BoxHead
from tests.helpers import documents
from tests.helpers.random_variables import random_variables
from tests.helpers.tiers import slow
from tests.helpers.tiny_classification import random_classifier
from tests.helpers.tiny_detection import random_detector
from tests.helpers.tiny_segmentation import BACKBONE, random_segmentor

IMAGES = np.random.default_rng(0).normal(size=(2, 64, 80, 3)).astype(np.float32)
SUBSETS = [subset for count in range(1, 5) for subset in itertools.combinations(range(4), count)]
PAGE = documents.ROOT / "docs" / "backbone.md"


@pytest.fixture(scope="module")
def dat():
    return dat_jax.create_model("dat_pp_nano", **BACKBONE)


@pytest.fixture(scope="module")
def variables(dat):
    """Of a backbone with all norms."""
    return random_variables(dat_jax.Backbone(dat), IMAGES)


@pytest.fixture(scope="module")
def plain_maps(dat, variables):
    """Maps of all stages without norms."""
    params = {"params": variables["params"]["dat"]}
    return jax.jit(lambda params: dat.apply(params, IMAGES, method="features"))(params)


def compute(backbone, variables, images=IMAGES):
    return jax.jit(backbone.apply)(variables, images)


def normalize(x, scale, bias):
    x = np.asarray(x, np.float64)
    deviation = np.sqrt(x.var(axis=-1, keepdims=True) + 1e-5)
    return (x - x.mean(axis=-1, keepdims=True)) / deviation * np.asarray(scale) + np.asarray(bias)


@pytest.mark.parametrize("out_indices", [(0,), (1, 3), (0, 1, 2)])
def test_maps_of_chosen_stages(dat, variables, plain_maps, out_indices):
    plain = dat_jax.Backbone(dat, out_indices=out_indices, output_norms=False)
    maps = compute(plain, {"params": {"dat": variables["params"]["dat"]}})
    assert [x.shape[-1] for x in maps] == list(plain.channels)
    assert [x.shape[2] for x in maps] == [-(-80 // stride) for stride in plain.strides]
    normed_maps = compute(dat_jax.Backbone(dat, out_indices=out_indices), variables)
    for index, x, normed in zip(out_indices, maps, normed_maps, strict=True):
        np.testing.assert_allclose(x, plain_maps[index], rtol=1e-5, atol=1e-5)
        expected = normalize(
            x, *[variables["params"][f"norms_{index}"][name].reshape(1, 1, 1, -1) for name in ("scale", "bias")]
        )
        np.testing.assert_allclose(normed, expected, rtol=1e-4, atol=1e-4)


def test_by_default_all_stages_are_returned_with_norms(dat, variables, plain_maps):
    assert dat_jax.Backbone(dat).channels == dat.dims
    for index, x in enumerate(compute(dat_jax.Backbone(dat), variables)):
        scale_and_bias = [
            variables["params"][f"norms_{index}"][name].reshape(1, 1, 1, -1) for name in ("scale", "bias")
        ]
        np.testing.assert_allclose(x, normalize(plain_maps[index], *scale_and_bias), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norms", [False, True])
def test_stages_after_the_last_map_have_no_parameters(dat, norms):
    for out_indices in ((0,), (0, 2), (3,)):
        backbone = dat_jax.Backbone(dat, out_indices=out_indices, output_norms=norms)
        params = jax.eval_shape(backbone.init, jax.random.key(0), IMAGES)["params"]
        last = out_indices[-1]
        stages = {f"stages_{index}" for index in range(last + 1)} | {f"down_projs_{index}" for index in range(last)}
        assert set(params["dat"]) == {"patch_proj", *stages}
        assert set(params) == {"dat"} | {f"norms_{index}" for index in out_indices if norms}


@pytest.mark.parametrize("out_indices", SUBSETS)
def test_sizes_of_the_maps_are_those_of_the_stages(dat, out_indices):
    sizes = np.array([[64, 80], [33, 47]], np.int32)
    backbone = dat_jax.Backbone(dat, out_indices=out_indices)
    levels = backbone.level_sizes(sizes)
    assert len(levels) == len(out_indices)
    for stride, level in zip(backbone.strides, levels, strict=True):
        np.testing.assert_array_equal(level, -(-sizes // stride))
    assert backbone.level_sizes(None) == (None,) * len(out_indices)


@pytest.mark.parametrize("out_indices", [(), (0, 0), (2, 1), (4,), (-1,), (True,), (1.0,), "01", 2, {0, 1}])
def test_other_indices_are_refused(dat, out_indices):
    message = re.escape(f"one or more stages from 0 to 3 in ascending order, got {out_indices}")
    backbone = dat_jax.Backbone(dat, out_indices=out_indices)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(backbone.init, jax.random.key(0), IMAGES)
    with pytest.raises(ValueError, match=message):
        _ = backbone.channels
    with pytest.raises(ValueError, match=message):
        dat.apply({}, IMAGES, out_indices=out_indices, method="features")


def random_model(kind):
    if kind == "retinanet":
        return random_detector("retinanet")
    return random_classifier() if kind == "classifier" else random_segmentor()


@pytest.mark.parametrize("kind", ["classifier", "segmentor", slow("retinanet")])
def test_backbones_of_trained_models(kind, tmp_path):
    model, variables = random_model(kind)
    export_model(tmp_path / "trained", model=model, variables=variables)
    backbone, loaded = dat_jax.load_backbone(tmp_path / "trained", out_indices=(0, 2), drop_path_rate=0.1)
    assert backbone.dat.drop_path_rate == 0.1
    shapes = jax.eval_shape(backbone.init, jax.random.key(0), IMAGES)
    assert jax.tree.map(jnp.shape, loaded) == jax.tree.map(jnp.shape, shapes)
    params, dat_params = loaded["params"], variables["params"]
    trained_norms = {}
    if kind != "classifier":
        trained_norms, dat_params = variables["params"]["backbone"], variables["params"]["backbone"]["dat"]
    jax.tree.map(np.testing.assert_array_equal, params["dat"], {name: dat_params[name] for name in params["dat"]})
    for name in ("norms_0", "norms_2"):
        channels = params[name]["scale"].shape
        initial = {"scale": np.ones(channels), "bias": np.zeros(channels)}
        jax.tree.map(np.testing.assert_array_equal, params[name], trained_norms.get(name, initial))
    assert set(trained_norms) >= {"norms_2"} or kind == "classifier"

    plain, plain_variables = dat_jax.load_backbone(tmp_path / "trained", output_norms=False)
    assert set(plain_variables["params"]) == {"dat"}
    assert len(jax.eval_shape(plain.apply, plain_variables, IMAGES)) == 4


def test_wrong_stages_of_a_trained_model_are_a_user_error(tmp_path):
    model, variables = random_classifier()
    export_model(tmp_path / "trained", model=model, variables=variables)
    with pytest.raises(UserError, match="from 0 to 3 in ascending order"):
        dat_jax.load_backbone(tmp_path / "trained", out_indices=(4,))


def is_batch_norm(path):
    return "bn" in path


def check_frozen(make, variables, inputs):
    """Training normalizes with the running averages, changes no statistics, and has no gradient of scale and bias."""
    frozen, free = make(frozen_batch_norm=True), make(frozen_batch_norm=False)

    def step(module):
        def compute_loss(params):
            outputs, state = module.apply({**variables, "params": params}, inputs, train=True, mutable=["batch_stats"])
            return sum(jnp.tanh(x).mean() for x in jax.tree.leaves(outputs)), (outputs, state)

        return jax.jit(jax.value_and_grad(compute_loss, has_aux=True))(variables["params"])

    (_, (outputs, state)), gradients = step(frozen)
    expected = jax.jit(lambda variables: free.apply(variables, inputs, train=False))(variables)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), outputs, expected)
    jax.tree.map(np.testing.assert_array_equal, state["batch_stats"], variables["batch_stats"])
    gradients = flatten_dict(gradients)
    assert any(is_batch_norm(path) for path in gradients)
    for path, gradient in gradients.items():
        assert (not np.any(gradient)) == is_batch_norm(path), path

    (_, (_, state)), gradients = step(free)
    statistics = flatten_dict(variables["batch_stats"])
    assert not any(np.array_equal(x, statistics[path]) for path, x in flatten_dict(state["batch_stats"]).items())
    assert all(np.any(gradient) for path, gradient in flatten_dict(gradients).items() if is_batch_norm(path))


def test_frozen_batch_norm_of_a_box_head():
    inputs = np.random.default_rng(0).normal(size=(6, 7, 7, 4)).astype(np.float32)

    def make(**options):
        return BoxHead(3, num_convs=1, num_layers=1, width=8, **options)

    check_frozen(make, draw_with_statistics(make(), inputs), inputs)


@pytest.mark.slow
@pytest.mark.parametrize("head", ["sem_fpn", "upernet"])
def test_frozen_batch_norm_of_a_segmentor(head):
    def make(**options):
        backbone = dict(name="dat_pp_nano", drop_path_rate=0.0, **{**BACKBONE, "stages": ("X",) * 4})
        widths = dict(neck_channels=8) if head == "sem_fpn" else dict(auxiliary_channels=8, pool_sides=(1, 2))
        return dat_jax.create_segmentor(
            head, backbone=backbone, channels=8, num_classes=3, dropout=0.0, **widths, **options
        )

    check_frozen(make, draw_with_statistics(make(), IMAGES), IMAGES)


def draw_with_statistics(module, inputs):
    def init(key, inputs):
        return module.init(key, inputs, train=False)

    shapes = jax.eval_shape(init, jax.random.key(0), inputs)
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        values = 0.3 * rng.normal(size=leaf.shape)
        return (abs(values) + 0.5 if path[-1].key in ("scale", "var") else values).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def test_every_batch_norm_of_a_detector_is_frozen():
    model = dat_jax.create_detector(
        "cascade_mask_rcnn", backbone={"name": "dat_pp_nano", **BACKBONE}, frozen_batch_norm=True
    )
    bound = model.bind({})
    assert [head.frozen_batch_norm for head in bound.bbox_heads] == [True] * 3


def run_examples_of_flax():
    """Execute the examples of the page for Linen and NNX, and return their names."""
    space = {}
    for block in documents.read_blocks(PAGE.read_text().partition("## Head in PyTorch")[0]):
        if block.language == "python" and "load_backbone(" not in block.text:  # there is no run to load
            exec(compile(block.text, str(PAGE), "exec"), space)
    return space


@pytest.mark.slow
def test_a_head_in_nnx_trains_as_the_one_in_linen(tmp_path):
    """Five steps from the same weights; then trained weights, put into the NNX module, give the maps of the Linen module."""
    space = run_examples_of_flax()
    losses, nnx_losses = space["losses"], space["nnx_losses"]
    assert len(losses) == len(nnx_losses) == 5
    np.testing.assert_allclose(nnx_losses, losses, rtol=1e-5)
    assert losses[-1] < 0.9 * losses[0]
    trained = nnx.to_pure_dict(nnx.state(space["nnx_model"], nnx.Param))
    initial, actual = flatten_dict(space["initial_params"]), flatten_dict(space["params"])
    for path, x in flatten_dict(trained).items():
        np.testing.assert_allclose(x, actual[path], rtol=1e-2, atol=1e-4)
    moved = [path for path, x in actual.items() if np.any(x != initial[path])]
    assert len(moved) > 0.9 * len(actual)

    model = space["dat"]
    export_model(tmp_path / "trained", model=model, variables=random_variables(model, space["images"]))
    backbone, variables = dat_jax.load_backbone(tmp_path / "trained", out_indices=(0, 2))
    module = space["nnx_model"].backbone
    space["set_params"](module, variables["params"])
    actual = nnx.jit(lambda module, images: module(images))(module, space["images"])
    expected = compute(backbone, variables, space["images"])
    for x, y in zip(actual, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def test_labels_of_the_page_freeze_the_backbone():
    block = next(b.text for b in documents.read_blocks(PAGE.read_text()) if "multi_transform" in b.text)
    space = {"optax": optax}
    exec(block, space)
    params = {"backbone": {"dat": {"kernel": jnp.ones(2)}}, "head": {"kernel": jnp.ones(2)}}
    updates, _ = space["optimizer"].update(params, space["optimizer"].init(params), params)
    assert not np.any(updates["backbone"]["dat"]["kernel"])
    assert np.all(updates["head"]["kernel"])
