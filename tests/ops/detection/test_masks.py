"""Mask targets and pasting of masks: recorded arrays, padding, cases by hand."""

import jax
import numpy as np
import pytest

from dat_jax.ops.detection import masks
from tests.helpers import golden_files


@pytest.fixture(scope="module")
def recorded():
    with np.load(golden_files.DIRECTORY / "masks.npz") as file:
        return {key: file[key] for key in file.files}


def unpack(packed, shape):
    _, height, width = shape
    return np.unpackbits(packed, axis=1)[:, : height * width].reshape(shape)


def test_recorded_targets(x64, recorded):
    bitmaps = unpack(recorded["gt_masks"], recorded["gt_masks_shape"])
    arguments = bitmaps, recorded["target_boxes"], recorded["target_gt"]
    np.testing.assert_allclose(masks.crop_masks(*arguments, chunk=3), recorded["target_soft"], atol=1e-6)
    assert recorded["target_ambiguous"] == 0
    np.testing.assert_array_equal(masks.mask_targets(*arguments), recorded["target"])


def test_recorded_targets_in_float32_from_padded_masks(recorded):
    bitmaps = unpack(recorded["gt_masks"], recorded["gt_masks_shape"])
    padded = np.pad(bitmaps, [(0, 1), (0, 18), (0, 10)]).astype(bool)
    boxes = recorded["target_boxes"].astype(np.float32)
    boxes = np.concatenate([boxes, np.full((2, 4), np.nan, np.float32)])
    indices = np.append(recorded["target_gt"], [7, -99])
    crop = jax.jit(lambda shape, valid: masks.mask_targets(padded, boxes, indices, mask_shape=shape, valid=valid))
    actual = crop(np.asarray(bitmaps.shape[1:]), np.arange(10) < 8)
    np.testing.assert_array_equal(actual[:8], recorded["target"])
    assert not actual[8:].any()


def test_padding_of_masks_is_ignored_at_their_borders():
    ones, box = np.ones((1, 6, 9), bool), np.asarray([[0, 0, 9, 6]], np.float32)
    padded = np.pad(ones, [(0, 0), (0, 3), (0, 4)])
    for bitmaps in (ones, padded):
        actual = masks.crop_masks(bitmaps, box + 3, np.zeros(1, int), mask_shape=(6, 9))
        np.testing.assert_allclose(actual, 1, rtol=1e-6)


def test_targets_of_boxes_outside_and_without_area_are_empty():
    boxes = np.asarray([[-9, -9, -2, -2], [3, 3, 3, 6], [30, 3, 40, 6], [6, 6, 2, 2]], np.float32)
    assert not masks.mask_targets(np.ones((1, 8, 8), bool), boxes, np.zeros(4, int)).any()


def test_recorded_pasting(recorded):
    shape = tuple(recorded["paste_shape"])
    probabilities = 1 / (1 + np.exp(-recorded["paste_logits"].astype(np.float32)))
    pasted = masks.paste_masks(probabilities, recorded["paste_boxes"], shape[1:])
    assert pasted.dtype == np.float32
    np.testing.assert_allclose(pasted, recorded["paste_prob"], atol=2e-5)
    bits = masks.paste_masks(probabilities, recorded["paste_boxes"], shape[1:], threshold=0.5)
    assert bits.dtype == bool
    np.testing.assert_array_equal(bits, pasted >= 0.5)
    clear = np.abs(recorded["paste_prob"] - 0.5) > 2e-5
    assert clear.mean() > 0.999
    np.testing.assert_array_equal(bits[clear], unpack(recorded["paste_bits"], shape)[clear])


def test_pasting_by_hand():
    mask = np.asarray([[[0.0, 1.0], [0.0, 1.0]]])
    pasted = masks.paste_masks(mask, np.asarray([[2.0, 1.0, 6.0, 3.0]]), (4, 8))
    row = np.asarray([0, 0, 0, 0.25, 0.75, 0.75, 0.25, 0])  # reaches half a mask pixel beyond the box
    np.testing.assert_allclose(pasted[0], np.stack([0 * row, row, row, 0 * row]), atol=1e-6)


def test_nothing_is_pasted_for_boxes_outside_or_without_area():
    boxes = [[20, 2, 30, 5], [-9, 2, -3, 5], [2, 2, 2, 5], [2, 5, 4, 2], [np.nan] * 4, [0, -50, 3, -40], [0, 50, 3, 60]]
    assert not masks.paste_masks(np.ones((7, 28, 28)), np.asarray(boxes), (8, 10)).any()


def test_no_masks_give_an_empty_array():
    assert masks.paste_masks(np.zeros((0, 28, 28)), np.zeros((0, 4)), (5, 6), threshold=0.5).shape == (0, 5, 6)
