"""3-Augment and color jitter: pixels of Pillow, and the distribution of the draws."""

import collections

import numpy as np
import pytest
from PIL import Image, ImageFilter, ImageOps

from dat_jax.data.three_augment import apply_color_jitter, apply_three_augment
from dat_jax.data.transforms import make_train_transform
from tests.helpers.photographs import photographs

PLAIN = dict(
    image_size=96,
    min_crop_area=1.0,
    max_crop_aspect=1.0,
    flip_probability=0.0,
    rand_augment_count=0,
    rand_augment_magnitude=0.0,
    rand_augment_std=0.0,
)


@pytest.fixture(scope="module")
def photograph():
    return photographs(width=96, height=96)[0]


def distance(a, b):
    return np.abs(a.astype(int) - b).mean()


def test_each_of_three_operations_is_applied_to_a_third_of_the_images(photograph):
    image = Image.fromarray(photograph)
    gray, solarized = np.asarray(image.convert("L").convert("RGB")), np.asarray(ImageOps.solarize(image, 128))
    limits = [np.asarray(image.filter(ImageFilter.GaussianBlur(radius))) for radius in (0.1, 2.0)]
    least, most = (distance(blurred, photograph) for blurred in limits)
    rng, counts, distances = np.random.default_rng(0), collections.Counter(), []
    for _ in range(300):
        result = apply_three_augment(photograph, rng)
        assert result.dtype == np.uint8
        if np.array_equal(result, gray):
            counts["gray"] += 1
        elif np.array_equal(result, solarized):
            counts["solarized"] += 1
        else:  # of a standard deviation between both
            counts["blurred"] += 1
            distances.append(distance(result, photograph))
            assert least <= distances[-1] <= most
    assert max(distances) > 0.9 * most
    assert len(set(distances)) > 20
    assert set(counts) == {"gray", "solarized", "blurred"}
    assert all(abs(count - 100) < 4 * np.sqrt(300 * 2 / 9) for count in counts.values())


def test_color_jitter_changes_colors_within_its_strength():
    rng, flat = np.random.default_rng(0), np.full((8, 8, 3), 100, np.uint8)
    values = np.array([apply_color_jitter(flat, rng, strength=0.3)[0, 0] for _ in range(200)])
    assert (values == values[:, :1]).all()  # gray stays gray: only its brightness changes
    assert 70 <= values.min() < 75
    assert 125 < values.max() <= 130
    colored = np.full((8, 8, 3), (100, 50, 20), np.uint8)
    results = [apply_color_jitter(colored, rng, strength=0.3)[0, 0] for _ in range(50)]
    assert all(red > green > blue for red, green, blue in results)
    assert len({tuple(result) for result in results}) > 40
    assert apply_color_jitter(colored, rng, strength=0.0) is colored


def test_the_transform_applies_them_after_the_crop_only_if_asked(photograph):
    record = {"image": photograph, "label": np.int32(1)}
    plain = make_train_transform(**PLAIN)(record, np.random.default_rng(0))
    np.testing.assert_array_equal(plain["image"], photograph)
    augment = make_train_transform(**PLAIN, three_augment=True)
    rng, results = np.random.default_rng(0), set()
    for _ in range(30):
        result = augment(record, rng)["image"]
        results.add("gray" if (result == result[..., :1]).all() else "colored")
    assert results == {"gray", "colored"}
    jitter = make_train_transform(**PLAIN, color_jitter=0.3)
    assert distance(jitter(record, rng)["image"], photograph) > 1
