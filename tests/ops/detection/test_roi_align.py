"""RoIAlign: recorded outputs and gradients, comparison with the published loop, invalid boxes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dat_jax.ops.detection.roi_align import assign_levels, pyramid_roi_align, roi_align
from tests.helpers import golden_files
from tests.helpers.tiers import slow
from tests.reference import compare
from tests.reference import roi_align as reference

HARD_BOXES = np.asarray(
    [
        [2.3, 1.7, 9.1, 6.4],
        [0.0, 0.0, 12.0, 9.0],  # the whole map
        [-7.3, -5.1, 4.2, 3.3],  # partly outside
        [8.2, 6.1, 40.0, 33.0],
        [-300.7, -200.3, 411.9, 357.2],  # much larger than the map
        [-50.2, 2.0, 70.1, 3.0],  # fractional pixels: rounding decides whether a sample at -1 counts
        [30.0, 40.0, 60.0, 70.0],  # outside
        [-60.0, -70.0, -30.0, -40.0],
        [5.0, 2.0, 5.0, 7.0],  # no width
        [5.0, 2.0, 9.0, 2.0],  # no height
        [5.0, 2.0, 5.0, 2.0],
        [7.0, 6.0, 3.0, 2.0],  # corners swapped
        [4.0, 4.0, 4.001, 4.002],  # tiny
        [3.0, 2.0, 6.0, 5.0],  # bins of one pixel
        [-0.5, -0.5, 2.5, 2.5],  # a sample at the limit of one pixel outside
        [-2.0, -2.0, 1.0, 1.0],
        [11.0, 8.0, 14.0, 11.0],
        [0.5, 0.5, 6.500001, 6.499999],
        [-1.0, -1.0, 13.0, 10.0],
        [1.0, 1.0, 1.5, 8.5],  # narrow
    ]
)


@pytest.fixture(scope="module")
def recorded():
    with np.load(golden_files.DIRECTORY / "roi_align.npz") as file:
        return {key: file[key] for key in file.files}


def recorded_maps(recorded, image):
    return [np.moveaxis(recorded[f"feat{level}"][image].astype(np.float64), 0, -1) for level in range(4)]


@pytest.mark.parametrize("size", [7, slow(14)])
def test_recorded_outputs_and_gradients_of_a_pyramid(x64, recorded, size):
    rois = recorded["rois"].astype(np.float64)
    for image in (0, 1):
        in_image = rois[:, 0] == image
        assert in_image.any()

        def align(maps, boxes=rois[in_image, 1:]):
            return pyramid_roi_align(maps, boxes, size=size, chunk=4)

        def value_and_gradient(maps, cotangent, align=align):
            out, transpose = jax.vjp(align, maps)
            return out, transpose(cotangent)[0]

        cotangent = golden_files.channels_last(recorded[f"cot{size}"][in_image].astype(np.float64))
        out, gradients = jax.jit(value_and_gradient)(recorded_maps(recorded, image), cotangent)
        expected = golden_files.channels_last(recorded[f"out{size}"][in_image])
        np.testing.assert_allclose(out, expected, rtol=1e-6, atol=1e-6)
        for level, gradient in enumerate(gradients):
            expected = np.moveaxis(recorded[f"grad{size}_feat{level}"][image], 0, -1)
            np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("level", [1, 3])
@pytest.mark.parametrize("ratio", [0, 2])
def test_recorded_outputs_of_single_levels(x64, recorded, level, ratio):
    rois = recorded["rois"].astype(np.float64)
    scale = 1 / (4 * 2**level)
    for image in (0, 1):
        in_image = rois[:, 0] == image
        features = recorded_maps(recorded, image)[level]
        actual = roi_align(features, rois[in_image, 1:], size=7, spatial_scale=scale, sampling_ratio=ratio)
        expected = golden_files.channels_last(recorded[f"single_level{level}_sr{ratio}"][in_image])
        np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_recorded_levels(x64, recorded, dtype):
    np.testing.assert_array_equal(assign_levels(recorded["rois"][:, 1:].astype(dtype)), recorded["levels"])


def test_levels_change_at_powers_of_two():
    sides = np.asarray([0, 1, 56, 111.9, 112, 223.9, 224, 447.9, 448, 5000], np.float32)
    boxes = np.stack([0 * sides, 0 * sides, sides, sides], axis=1)
    np.testing.assert_array_equal(assign_levels(boxes), [0, 0, 0, 0, 1, 1, 2, 2, 3, 3])
    np.testing.assert_array_equal(assign_levels(-boxes[:, [2, 3, 0, 1]]), [0, 0, 0, 0, 1, 1, 2, 2, 3, 3])


@pytest.mark.parametrize(
    ("size", "ratio", "scale", "shape"),
    [
        (3, 0, 1.0, (9, 12, 2)),
        (7, 0, 0.37, (9, 12, 1)),
        (3, 2, 1.0, (9, 12, 2)),
        (2, 1, 2.0, (1, 5, 2)),
        (2, 0, 1, (1, 1, 1)),
    ],
)
def test_value_and_gradient_equal_the_published_loop(x64, size, ratio, scale, shape):
    random = np.random.default_rng(0)
    corners = random.uniform(-8, 20, (20, 4))
    boxes = np.concatenate([HARD_BOXES, np.sort(corners.reshape(20, 2, 2), axis=1).reshape(20, 4)])
    if ratio == 0:  # the time of the loop is proportional to the area
        boxes = boxes[np.abs(boxes).max(axis=1) * scale < 450]
    features = random.normal(size=shape)
    options = {"spatial_scale": scale, "sampling_ratio": ratio}
    out, transpose = jax.vjp(lambda x: roi_align(x, boxes, size=size, chunk=7, **options), jnp.asarray(features))
    np.testing.assert_allclose(out, reference.roi_align(features, boxes, size=size, **options), rtol=1e-10, atol=1e-10)
    cotangent = random.normal(size=out.shape)
    expected = reference.gradient(cotangent, boxes, shape, **options)
    np.testing.assert_allclose(transpose(jnp.asarray(cotangent))[0], expected, rtol=1e-10, atol=1e-10)


def test_boxes_have_no_gradient():
    features = compare.normal(0, (9, 12, 2))[0].astype(np.float32)
    gradient = jax.grad(lambda boxes: (roi_align(features, boxes, size=3) ** 2).sum())(HARD_BOXES.astype(np.float32))
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("ratio", [0, 2])
def test_invalid_boxes_change_nothing(ratio):
    features = compare.normal(0, (9, 12, 2))[0].astype(np.float32)
    boxes = HARD_BOXES[:6].astype(np.float32)
    valid = np.asarray([True, True, False, True, False, True])

    @jax.jit
    def align(boxes, valid):
        def pyramid(features):
            maps, options = [features, features[::2, ::2]], {"finest": 2.0, "strides": (1, 2), "sampling_ratio": ratio}
            return pyramid_roi_align(maps, boxes, size=3, valid=valid, **options)

        out, transpose = jax.vjp(pyramid, features)
        return out, transpose(jnp.cos(out))[0]

    clean, clean_gradient = align(boxes[valid], valid[valid])
    for garbage in (np.nan, np.inf, -np.inf, 1e38):
        out, gradient = align(np.where(valid[:, None], boxes, np.float32(garbage)), valid)
        assert not out[~valid].any()
        np.testing.assert_allclose(out[valid], clean, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(gradient, clean_gradient, rtol=1e-5, atol=1e-5)


def test_chunks_and_vmap_change_nothing():
    (features,) = compare.normal(0, (2, 9, 12, 3))
    features, boxes = features.astype(np.float32), HARD_BOXES.astype(np.float32)
    batched = np.stack([boxes, boxes[::-1]])
    actual = jax.jit(jax.vmap(lambda x, b: roi_align(x, b, size=4, chunk=3)))(features, batched)
    for image in (0, 1):
        expected = roi_align(features[image], batched[image], size=4, chunk=100)
        np.testing.assert_allclose(actual[image], expected, rtol=1e-5, atol=1e-5)


def test_no_boxes_give_an_empty_array():
    assert roi_align(np.zeros((5, 6, 2), np.float32), np.zeros((0, 4), np.float32), size=3).shape == (0, 3, 3, 2)


def test_bfloat16_features_give_bfloat16():
    (features,) = compare.normal(0, (9, 12, 2))
    compare.assert_close_in_bfloat16(
        functools.partial(roi_align, size=3), features, HARD_BOXES, tolerance=0.05, keep_float32=(1,)
    )


def test_wrong_shapes_raise():
    with pytest.raises(ValueError, match="RoIAlign expected"):
        pyramid_roi_align([np.zeros((2, 2, 1))], np.zeros((1, 4)), size=2)
    with pytest.raises(ValueError, match="RoIAlign expected"):
        roi_align(np.zeros((2, 2, 1)), np.zeros((1, 5)), size=2)
