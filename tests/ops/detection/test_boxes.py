"""Areas, overlaps and box encoding: recorded values and gradients, cases by hand, invalid boxes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dat_jax.ops.detection.boxes import (
    aligned_giou,
    areas,
    clip_boxes,
    decode_boxes,
    encode_boxes,
    pairwise_iou,
    replace_invalid,
)
from tests.helpers import golden_files

CODERS = ["unit", "r0", "r2", "mean"]


@pytest.fixture(scope="module")
def recorded():
    with np.load(golden_files.DIRECTORY / "boxes_losses.npz") as file:
        return {key: file[key] for key in file.files}


def doubles(recorded, *keys):
    return [recorded[key].astype(np.float64) for key in keys]


def coder(recorded, name):
    return {key: recorded[f"{name}.{key}"] for key in ("means", "stds")}


@pytest.mark.parametrize("mode", ["iou", "iof"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-7), (np.float32, 1e-5)])
def test_recorded_overlaps(x64, recorded, mode, dtype, tolerance):
    actual = pairwise_iou(recorded["boxes"].astype(dtype), recorded["gts"].astype(dtype), mode=mode)
    assert actual.dtype == dtype
    np.testing.assert_allclose(actual, recorded[mode], rtol=tolerance, atol=tolerance)


def test_recorded_generalized_iou(x64, recorded):
    boxes, truths = doubles(recorded, "boxes", "gts")
    np.testing.assert_allclose(aligned_giou(boxes, truths), recorded["giou"], atol=1e-7)
    special = doubles(recorded, "giou_special_boxes", "giou_special_gts")
    np.testing.assert_allclose(1 - aligned_giou(*special), recorded["giou_special_loss"], atol=1e-6)


@pytest.mark.parametrize(("name", "scale"), [("giou_loss", 10 / 57), ("giou_loss_nowt", 1 / 40)])
def test_recorded_loss_and_gradient_of_generalized_iou(x64, recorded, name, scale):
    boxes, truths, weights = doubles(recorded, "boxes", "gts", "weights")
    weights = weights if name == "giou_loss" else np.ones_like(weights)

    def loss(boxes):
        return ((1 - aligned_giou(boxes, truths)) * weights).sum() * scale

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(boxes))
    np.testing.assert_allclose(value, recorded[name], rtol=1e-7)
    np.testing.assert_allclose(gradient, recorded[f"{name}.grad"], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", CODERS)
def test_recorded_deltas(x64, recorded, name):
    actual = encode_boxes(*doubles(recorded, "boxes", "gts"), **coder(recorded, name))
    np.testing.assert_allclose(actual, recorded[f"{name}.bbox2delta"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", CODERS)
def test_recorded_decoded_boxes(x64, recorded, name):
    """The first two rows have deltas that are clipped."""
    boxes, deltas, for_classes = doubles(recorded, "boxes", f"{name}.deltas", f"{name}.deltas5")
    options = coder(recorded, name)
    actual = decode_boxes(boxes, deltas, **options)
    np.testing.assert_allclose(actual, recorded[f"{name}.delta2bbox"], rtol=1e-6, atol=1e-5)
    actual = decode_boxes(boxes, deltas, image_shape=(180, 250), **options)
    np.testing.assert_allclose(actual, recorded[f"{name}.delta2bbox_clipped"], rtol=1e-6, atol=1e-5)
    actual = decode_boxes(boxes[:, None], for_classes.reshape(40, 5, 4), image_shape=np.asarray([180, 250]), **options)
    np.testing.assert_allclose(actual.reshape(40, 20), recorded[f"{name}.delta2bbox5_clipped"], rtol=1e-6, atol=1e-5)


def test_decoding_inverts_encoding(x64, recorded):
    boxes, truths = doubles(recorded, "boxes", "gts")
    options = coder(recorded, "mean")
    decoded = decode_boxes(boxes, encode_boxes(boxes, truths, **options), **options)
    np.testing.assert_allclose(decoded, truths, atol=1e-9)


def test_areas_and_overlaps_by_hand():
    a = np.asarray([[0, 0, 4, 2], [1, 1, 1, 5], [3, 3, 2, 5]], np.float32)
    b = np.asarray([[2, 0, 6, 2], [0, 0, 8, 8], [9, 9, 10, 10]], np.float32)
    np.testing.assert_array_equal(areas(a), [8, 0, -2])
    np.testing.assert_allclose(pairwise_iou(a, b), [[1 / 3, 1 / 8, 0], [0, 0, 0], [0, 0, 0]], rtol=1e-6)
    np.testing.assert_allclose(pairwise_iou(a, b, mode="iof"), [[0.5, 1, 0], [0, 0, 0], [0, 0, 0]], rtol=1e-6)
    np.testing.assert_allclose(aligned_giou(a[:1], b[2:]), [-1 + 9 / 100], rtol=1e-6)


def test_boxes_without_area_have_no_overlap_and_finite_gradients():
    point = np.ones((1, 4), np.float32)
    for eps in (0.0, 1e-6):
        assert pairwise_iou(point, point, eps=eps) == 0
        assert np.isfinite(jax.grad(lambda a, eps=eps: pairwise_iou(a, a, eps=eps).sum())(point)).all()
    assert np.isfinite(jax.grad(lambda a: aligned_giou(a, a).sum())(point)).all()


def test_clipping_accepts_traced_shapes():
    boxes = np.asarray([[[-3, -4, 50, 60]], [[1, 2, 3, 4]]], np.float32)
    actual = jax.jit(lambda b, shape: clip_boxes(b, image_shape=shape))(boxes, np.asarray([20, 30]))
    np.testing.assert_array_equal(actual, [[[0, 0, 30, 20]], [[1, 2, 3, 4]]])


@pytest.mark.slow
@pytest.mark.parametrize("garbage", [np.nan, np.inf, 0.0, -1e38])
def test_invalid_boxes_have_no_gradient_and_change_none(recorded, garbage):
    boxes, truths = recorded["boxes"], recorded["gts"]
    deltas = recorded["unit.deltas"].astype(np.float32)
    valid = np.arange(40) % 3 != 0
    options = {"means": (0, 0, 0, 0), "stds": (0.1, 0.1, 0.2, 0.2)}

    def loss(boxes, truths, deltas):
        boxes, truths = replace_invalid(boxes, valid), replace_invalid(truths, valid)
        deltas = jnp.where(valid[:, None], deltas, 0)
        decoded = decode_boxes(boxes, deltas, **options)
        values = aligned_giou(decoded, truths) + encode_boxes(boxes, truths, **options).sum(axis=1)
        values += pairwise_iou(decoded, truths, eps=0).mean(axis=1, where=valid[None, :])
        return jnp.where(valid, values, 0).sum()

    evaluate = jax.value_and_grad(loss, argnums=(0, 1, 2))
    corrupted = [np.where(valid[:, None], x, np.float32(garbage)) for x in (boxes, truths, deltas)]
    (value, gradients), (expected, expected_gradients) = evaluate(*corrupted), evaluate(boxes, truths, deltas)
    assert np.isfinite(value)
    assert value == expected
    for actual_array, expected_array in zip(gradients, expected_gradients, strict=True):
        assert np.isfinite(actual_array).all()
        np.testing.assert_array_equal(actual_array, expected_array)
        assert not actual_array[~valid].any()


def test_all_boxes_are_valid_without_a_mask():
    boxes = np.asarray([[1.0, 2, 3, 4]], np.float32)
    assert replace_invalid(boxes, None) is boxes


def test_wrong_modes_and_shapes_raise():
    with pytest.raises(ValueError, match="modes"):
        pairwise_iou(jnp.zeros((1, 4)), jnp.zeros((1, 4)), mode="giou")
    with pytest.raises(ValueError, match="pairwise_iou expected"):
        pairwise_iou(jnp.zeros((1, 5)), jnp.zeros((1, 4)))
    with pytest.raises(ValueError, match="aligned_giou expected"):
        aligned_giou(jnp.zeros((1, 4)), jnp.zeros((2, 4)))
