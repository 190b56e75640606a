"""Images of several sizes in one array give what each of them gives by itself, whatever lies beside them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dat_jax
from dat_jax.models.registry import create_segmentor
from tests.helpers import tiny_segmentation
from tests.helpers.padded_images import crop, largest_difference, padded_images
from tests.helpers.random_variables import random_variables
from tests.helpers.tiers import slow
from tests.models.test_dat import make_small

BUCKET = (96, 120)
SIZES = [(96, 120), (45, 70), (33, 64), (32, 32), (61, 117)]  # the whole bucket, odd sides, maps smaller than a window
FEW = SIZES[1:3]  # each size is compiled by itself
V1 = dict(conv_patches=False, lpu=(False, False), conv_mlp=(False, False))
VARIANTS = {
    "ND": {},
    "ND plain": dict(implementation="plain"),
    "N": dict(stages=("N", "N"), neighborhood_sizes=(3, 13)),
    "D without offsets": dict(stages=("D", "D"), use_offsets=(False, True)),
    "D bounded": dict(stages=("D", "D"), offset_range_factors=(2, 0)),
    "D fixed": dict(stages=("D", "D"), position_bias=("fixed", "none")),
    "D dwc": dict(stages=("D", "D"), position_bias=("dwc", "log_cpb")),
    "L": dict(stages=("L", "S"), **V1),
    "S": dict(stages=("S", "L"), window_sizes=(5, 4)),
    "P": dict(stages=("P", "P")),
    "E": dict(stages=("E", "E")),
    "X": dict(stages=("X", "X")),
    "v1": dict(stages=("LS", "D"), offset_range_factors=(2, 2), **V1),
    "v1 released": dict(stages=("D", "D"), deformable_form="cvpr2022", offset_range_factors=(2, -1), **V1),
    "scan": dict(stages=("NDND", "DD"), scan_blocks=True, remat="blocks"),
}


def draw_variables(model):
    """Random variables in float64, because gradients have the dtype of the variables."""
    return jax.tree.map(lambda x: x.astype(np.float64), random_variables(model, np.zeros((1, 64, 64, 3))))


def outputs(model, variables, images, sizes=None):
    def compute(variables, images, sizes):
        maps = model.apply(variables, images, method="features", sizes=sizes)
        return maps, model.apply(variables, images, sizes=sizes)

    return jax.jit(compute)(variables, images, sizes)


@pytest.mark.parametrize(("name", "image_sizes"), [("ND", FEW), *(slow(name, SIZES) for name in VARIANTS)])
def test_every_size_gives_the_maps_and_logits_of_the_image_alone(x64, name, image_sizes):
    model = make_small(dtype=jnp.float64, **VARIANTS[name])
    variables = draw_variables(model)
    images, sizes = padded_images(image_sizes, BUCKET)
    padded = outputs(model, variables, images, sizes)
    for index, size in enumerate(image_sizes):
        alone = outputs(model, variables, crop(images, index, size))
        assert largest_difference(padded, alone, index) < 1e-10, size


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ND", "v1 released"])
def test_gradients_are_those_of_the_images_alone(x64, name):
    """Of a sum over all pixels, with different weights, and with garbage beside the images."""
    model = make_small(dtype=jnp.float64, **VARIANTS[name])
    variables = draw_variables(model)
    images, sizes = padded_images(SIZES[1:], BUCKET)

    @jax.jit
    def gradient(variables, images, sizes):
        return jax.grad(lambda v: jnp.sin(model.apply(v, images, sizes=sizes)).sum())(variables)

    actual = gradient(variables, images, sizes)
    parts = [gradient(variables, crop(images, k, size), None) for k, size in enumerate(SIZES[1:])]
    expected = jax.tree.map(lambda *leaves: sum(leaves), *parts)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9 * largest), actual, expected)


@pytest.mark.slow
def test_bfloat16_is_as_close_to_float64_as_without_sizes(x64):
    exact = make_small(dtype=jnp.float64)
    variables = draw_variables(exact)
    model = make_small(dtype=jnp.bfloat16)
    images, sizes = padded_images(SIZES, BUCKET)
    padded = outputs(model, variables, images, sizes)[1]
    errors = np.zeros((2, len(SIZES)))
    for index, size in enumerate(SIZES):
        image = crop(images, index, size)
        truth = outputs(exact, variables, image)[1][0]
        for row, logits in enumerate((padded[index], outputs(model, variables, image)[1][0])):
            errors[row, index] = np.abs(logits - truth).max() / np.abs(truth).max()
    assert errors[1].max() > 0
    assert errors[0].mean() < 1.25 * errors[1].mean()


def test_wrong_sizes_are_refused():
    model = dat_jax.create_model("dat_pp_nano")
    images = jnp.zeros((2, 64, 64, 3))
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    for sizes, message in [
        (np.zeros((1, 2), np.int32), r"sizes as an int32 array \(2, 2\), .* got int32 \(1, 2\)"),
        (np.zeros((2, 2), np.float32), r"sizes as an int32 array \(2, 2\), .* got float32"),
        (np.full((2, 2), 64, np.uint32), r"got uint32 \(2, 2\)"),  # rounding up would wrap around
        ([[64, 64], [64, 64]], "got list"),
        (
            np.int32([[64, 64], [31, 64]]),
            r"from 32 pixels to those of the images, \(64, 64\), got \[\[64, 64\], \[31, 64\]\]",
        ),
        (np.int32([[64, 65], [64, 64]]), r"got \[\[64, 65\], \[64, 64\]\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(lambda v, s=sizes: model.apply(v, images, sizes=s), variables)


SEGMENTORS = {
    "sem_fpn": dict(channels=8, neck_channels=8),
    "upernet": dict(channels=8, auxiliary_channels=8),
}


@pytest.mark.parametrize(
    ("head", "image_sizes"), [("upernet", FEW[:1]), slow("upernet", SIZES), slow("sem_fpn", SIZES)]
)
def test_logits_of_segmentors_are_those_of_the_image_alone(x64, head, image_sizes):
    backbone = {"name": "dat_pp_nano", **tiny_segmentation.BACKBONE, "dtype": jnp.float64}
    model = create_segmentor(head, backbone=backbone, num_classes=4, dtype=jnp.float64, **SEGMENTORS[head])
    variables = draw_variables(model)
    variables["batch_stats"] = jax.tree.map(lambda x: abs(x) + 0.5, variables["batch_stats"])
    apply = jax.jit(lambda v, x, sizes: model.apply(v, x, sizes=sizes))
    images, sizes = padded_images(image_sizes, BUCKET)
    padded = apply(variables, images, sizes)
    for index, size in enumerate(image_sizes):
        alone = apply(variables, crop(images, index, size), None)
        assert largest_difference(padded, alone, index) < 1e-10, size
        assert model.logits_sizes(sizes)[index].tolist() == list(alone["logits"].shape[1:3])
    with pytest.raises(ValueError, match="trained with images that fill their arrays"):
        model.apply(variables, images, sizes=sizes, train=True, rngs={"dropout": jax.random.key(0)}, mutable=True)


def test_sizes_of_the_maps_of_a_stage_that_does_not_exist_are_refused():
    model = make_small(**VARIANTS["ND"])
    assert model.map_sizes([[64, 96]], stage=1).tolist() == [[8, 12]]
    for stage in (-1, 2):
        with pytest.raises(ValueError, match=f"Expected a stage from 0 to 1, got {stage}"):
            model.map_sizes(jnp.array([[64, 96]]), stage=stage)
