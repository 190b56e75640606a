"""RandAugment: operations against Pillow, and draws against the distributions of the recipe."""

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from dat_jax.data.randaugment import OPERATIONS, apply_operation, draw_operations
from tests.helpers.photographs import photographs
from tests.reference.augmentation import apply_with_pillow

GEOMETRIC = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")
P_VALUE = 1e-3  # of each statistical test; the draws are seeded, so that results are reproducible
DRAWS = 20_000


class Draws:
    """A stub generator that draws one given operation, magnitude and sign, and always applies it."""

    def __init__(self, name, magnitude, sign):
        self.integers = lambda *_, size: np.full(size, OPERATIONS.index(name))
        self.uniform = lambda *_, size: np.zeros(size)
        self.normal = lambda *_, size: np.full(size, magnitude)
        self.choice = lambda _, *, size: np.full(size, float(sign))


def apply_ours(image, name, magnitude, sign):
    [(drawn_name, argument)] = draw_operations(Draws(name, magnitude, sign), count=1, magnitude=9.0, magnitude_std=0.5)
    assert drawn_name == name
    return apply_operation(image, name, argument)


def test_there_are_fifteen_operations():
    assert len(OPERATIONS) == 15


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name not in GEOMETRIC])
def test_pixels_equal_those_of_pillow(name):
    for image in photographs(width=224, height=200)[:4]:
        for magnitude in (0.0, 2.6, 7.7, 9.0, 10.0):
            for sign in (-1, 1):
                expected = np.asarray(apply_with_pillow(Image.fromarray(image), name, magnitude, sign))
                np.testing.assert_array_equal(apply_ours(image, name, magnitude, sign), expected)


@pytest.mark.parametrize("name", GEOMETRIC)
def test_geometric_operations_differ_from_pillow_only_by_resampling(name):
    """The mean difference is below 1.5 of 255; without fine detail the maximum is 2, except along the outline."""
    y, x = np.indices((200, 224))
    smooth = np.stack([x, y, (x + y) / 2], axis=-1).astype(np.uint8)
    for image in [*photographs(width=224, height=200)[:4], smooth]:
        for magnitude in (0.0, 2.6, 9.0, 10.0):
            for sign in (-1, 1):
                expected = np.asarray(apply_with_pillow(Image.fromarray(image), name, magnitude, sign)).astype(int)
                difference = np.abs(apply_ours(image, name, magnitude, sign) - expected)
                assert difference.mean() < 1.5
                if image is smooth:
                    outline = difference.max(axis=-1) > 2  # blended with the fill color by only one of them
                    assert outline.sum() < 3 * sum(image.shape[:2])


def draw_many(seed=0):
    rng = np.random.default_rng(seed)
    return [draw_operations(rng, count=2, magnitude=9.0, magnitude_std=0.5) for _ in range(DRAWS)]


@pytest.fixture(scope="module")
def draws():
    return draw_many()


def test_operations_are_drawn_uniformly_and_applied_with_probability_one_half(draws):
    lengths = np.bincount([len(operations) for operations in draws], minlength=3)
    assert stats.chisquare(lengths, np.array([0.25, 0.5, 0.25]) * DRAWS).pvalue > P_VALUE
    names = [name for operations in draws for name, _ in operations]
    counts = [names.count(name) for name in OPERATIONS]
    assert stats.chisquare(counts).pvalue > P_VALUE
    pairs = np.zeros((15, 15))  # draws are with replacement, so the second is independent of the first
    for operations in draws:
        if len(operations) == 2:
            pairs[OPERATIONS.index(operations[0][0]), OPERATIONS.index(operations[1][0])] += 1
    assert stats.chi2_contingency(pairs).pvalue > P_VALUE


@pytest.mark.parametrize(
    ("name", "slope"), [("Rotate", 3), ("ShearX", 0.03), ("ShearY", 0.03), ("TranslateX", 0.045), ("TranslateY", 0.045)]
)
def test_magnitudes_are_normal_around_9_and_clipped_at_10(draws, name, slope):
    arguments = np.array([argument for operations in draws for drawn, argument in operations if drawn == name])
    assert stats.binomtest(int((arguments > 0).sum()), len(arguments)).pvalue > P_VALUE
    magnitudes = np.abs(arguments) / slope
    clipped = np.isclose(magnitudes, 10)
    above = 1 - stats.norm.cdf(10, 9, 0.5)
    assert stats.binomtest(int(clipped.sum()), len(clipped), above).pvalue > P_VALUE
    below = stats.truncnorm((0 - 9) / 0.5, (10 - 9) / 0.5, loc=9, scale=0.5)
    assert stats.kstest(magnitudes[~clipped], below.cdf).pvalue > P_VALUE


@pytest.mark.parametrize("name", ["Color", "Contrast", "Brightness", "Sharpness"])
def test_factors_lie_on_both_sides_of_one(draws, name):
    factors = np.array([argument for operations in draws for drawn, argument in operations if drawn == name])
    assert stats.binomtest(int((factors > 1).sum()), len(factors)).pvalue > P_VALUE
    assert factors.min() >= 0.1 - 1e-12
    above = factors[factors > 1]
    magnitudes = (above - 1) / 0.09
    below = stats.truncnorm(-18, 2, loc=9, scale=0.5)
    assert stats.kstest(magnitudes[magnitudes < 10 - 1e-9], below.cdf).pvalue > P_VALUE


def test_a_count_of_zero_draws_nothing():
    assert draw_operations(np.random.default_rng(0), count=0, magnitude=9.0, magnitude_std=0.5) == []
