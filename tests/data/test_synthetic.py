"""Digits on photographs: what is where, and that every example is a pure function of its split and index."""

import concurrent.futures
import importlib.util
import pickle
import time

import numpy as np
import pytest

from dat_jax.data import synthetic as composed
from dat_jax.data.segmentation_sources import load_segmentation_source
from dat_jax.data.synthetic import CLASS_NAMES, ComposedSource, compose
from dat_jax.errors import UserError


def load(split):
    return load_segmentation_source("digits_on_photographs", split=split)


@pytest.mark.parametrize(("split", "count"), [("train", 4000), ("validation", 200)])
def test_examples_are_what_a_source_gives(split, count):
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


def test_the_label_is_made_of_the_digits_that_are_seen():
    numbers, heights, hidden = [], [], 0
    for index in range(300):
        _, label, digits = compose("train", index)
        numbers.append(len(digits))
        wanted = np.zeros((64, 64), np.uint8)
        seen = np.zeros((64, 64), int)
        for digit, mask in digits:
            assert mask.dtype == bool
            wanted[mask] = digit + 1
            seen += mask
            hidden += not mask.any()
        np.testing.assert_array_equal(label, wanted)
        assert seen.max() <= 1
        rows = np.flatnonzero(digits[-1][1].any(axis=1))  # the last is not covered
        heights.append(rows[-1] - rows[0] + 1)
    counts = np.bincount(numbers, minlength=3)
    assert counts[0] == 0
    assert np.abs(counts[1:] - 150).max() < 4 * np.sqrt(300 * 0.5 * 0.5)
    assert hidden < 15
    assert max(heights) <= 52
    assert min(heights) >= 26  # a digit of 36 whose faint ends are not counted


def test_masks_are_where_the_digit_is_opaque_by_a_quarter(monkeypatch):
    """Blended as it was drawn: the last digit's colour and opacity follow from the images with it and without."""
    for index in range(40):
        laid = []

        def blend(image, intensity, colour, laid=laid, original=composed._blend):
            before = image.copy()
            original(image, intensity, colour)
            laid.append((before, image.copy(), intensity, colour))

        with monkeypatch.context() as patch:
            patch.setattr(composed, "_blend", blend)
            image, label, digits = compose("validation", index)
        np.testing.assert_array_equal(image, compose("validation", index)[0])
        before, after, intensity, colour = laid[-1]
        opacity = intensity[..., None] / 255
        np.testing.assert_allclose(after, before * (1 - opacity) + colour * opacity, atol=0.51)
        rows, columns = (np.flatnonzero(digits[-1][1].any(axis=axis)) for axis in (1, 0))
        inside = intensity >= 64
        mask = digits[-1][1][rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        wanted = inside[np.ix_(inside.any(axis=1), inside.any(axis=0))]
        # The bounding boxes hold every row and column that has a pixel, and those without in between.
        np.testing.assert_array_equal(mask[np.ix_(mask.any(axis=1), mask.any(axis=0))], wanted)
        assert (label[digits[-1][1]] == digits[-1][0] + 1).all()
        assert len(laid) == len(digits)


def test_digits_are_lighter_than_backgrounds(monkeypatch):
    below, above = [], []

    def blend(image, intensity, colour, original=composed._blend):
        below.append(image.max())
        above.append(colour.max())
        original(image, intensity, colour)

    monkeypatch.setattr(composed, "_blend", blend)
    for index in range(200):
        below.clear()
        compose("train", index)
        assert below[0] <= 128  # the first digit lies on nothing else
    assert min(above) >= 0.85 * 255


def test_training_and_validation_share_no_pixel_and_no_digit():
    train, validation = composed._backgrounds("train"), composed._backgrounds("validation")
    for left, right, width in zip(train, validation, (640, 640, 512), strict=True):
        assert left.shape[1] == width * 2 // 3
        assert left.shape[1] + right.shape[1] == width
        assert left.shape[0] == right.shape[0]
        assert min(*left.shape[:2], *right.shape[:2]) >= 128
    assert [len(composed._digits(split)[1]) for split in ("train", "validation")] == [4000, 1000]


def test_every_class_is_there():
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
def test_a_package_that_is_not_there_is_named(package, monkeypatch):
    from dat_jax.data import embedded

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    caches = (composed._backgrounds, composed._digits, embedded._read_mnist5k)
    for cache in caches:
        cache.cache_clear()
    wanted = {"sklearn": "pip install scikit-learn"}.get(package, f"pip install {package}")
    with pytest.raises(UserError, match=rf"The data set .* the package .*: {wanted}\."):
        load("train")
    for cache in caches:
        cache.cache_clear()


def test_an_unknown_split_is_refused():
    with pytest.raises(UserError, match="Unknown split 'test'"):
        ComposedSource("test")
