"""Masks of COCO files: polygons and run lengths, against pycocotools."""

import warnings

import numpy as np
import pytest
from pycocotools import mask as rle

from dat_jax.data.coco import _to_rle, decode_mask
from dat_jax.data.coco_json import decode_counts

SIZE = (40, 60)


def test_polygons_and_counts_are_converted_as_by_pycocotools():
    polygons = [[3.2, 4.1, 20.7, 5.5, 18.3, 30.9], [30, 10, 50, 10, 50, 35, 30.5, 35.5]]
    expected = rle.merge(rle.frPyObjects(polygons, *SIZE))
    assert _to_rle(polygons, SIZE) == expected
    mask = decode_mask(expected)
    runs = decode_counts(expected["counts"].decode()).tolist()
    assert _to_rle({"size": list(SIZE), "counts": runs}, SIZE)["counts"] == expected["counts"]
    assert _to_rle({"size": list(SIZE), "counts": expected["counts"].decode()}, SIZE) == expected
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # from pycocotools with numpy 2
        np.testing.assert_array_equal(mask, rle.decode(expected))
    assert mask[11, 40] == 1
    assert mask.sum() == rle.area(expected)
    assert decode_mask(_to_rle(None, SIZE)).sum() == 0


def test_compressed_counts_of_random_masks_are_decoded():
    rng = np.random.default_rng(0)
    for index in range(60):
        height, width = (int(x) for x in rng.integers(1, 300, 2))
        mask = (
            np.zeros((height, width), np.uint8) if index % 9 == 0 else rng.random((height, width)) < rng.random() ** 3
        )
        if index % 3 == 0:
            mask[height // 3 :, width // 4 : width // 2] = 1
        encoded = rle.encode(np.asfortranarray(mask, np.uint8))
        np.testing.assert_array_equal(decode_mask(encoded), mask)
        assert decode_counts(encoded["counts"].decode()).sum() == height * width
    large = rle.frPyObjects({"size": [30000, 30000], "counts": [5, 899_999_990, 5]}, 30000, 30000)
    assert decode_counts(large["counts"].decode()).tolist() == [5, 899_999_990, 5]


@pytest.mark.parametrize("text", ["", " ", "0o", "é", "m", "5" + "o" * 9 + "0"])
def test_invalid_compressed_counts_are_rejected(text):
    with pytest.raises(ValueError, match="invalid compressed counts"):
        decode_counts(text)


# A small data set, whose entries the following tests change.
