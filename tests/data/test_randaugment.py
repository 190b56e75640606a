"""RandAugment: every operation against Pillow's, and what is drawn against the recipe's distributions."""

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from dat_jax.data.randaugment import OPERATIONS, apply_operation, draw_operations
from tests.helpers.photographs import photographs
from tests.reference.augmentation import apply_with_pillow

GEOMETRIC = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")
P_VALUE = 1e-3  # of each statistical test; the draws are seeded, so that a pass stays a pass
DRAWS = 20_000


class Draws:
    """A generator that gives what it is told: one operation, surely applied, at a magnitude and a sign."""

    def __init__(self, name, magnitude, sign):
        self.integers = lambda *_, size: np.full(size, OPERATIONS.index(name))
        self.uniform = lambda *_, size: np.zeros(size)
        self.normal = lambda *_, size: np.full(size, magnitude)
        self.choice = lambda _, *, size: np.full(size, float(sign))


def apply_ours(image, name, magnitude, sign):
    [(drawn, argument)] = draw_operations(Draws(name, magnitude, sign), count=1, magnitude=9.0, magnitude_std=0.5)
    assert drawn == name
    return apply_operation(image, name, argument)


def test_there_are_fifteen_operations():
    assert len(OPERATIONS) == 15


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name not in GEOMETRIC])
def test_pixels_are_those_of_pillow(name):
    for image in photographs(width=224, height=200)[:4]:
        for magnitude in (0.0, 2.6, 7.7, 9.0, 10.0):
            for sign in (-1, 1):
                wanted = np.asarray(apply_with_pillow(Image.fromarray(image), name, magnitude, sign))
                np.testing.assert_array_equal(apply_ours(image, name, magnitude, sign), wanted)


@pytest.mark.parametrize("name", GEOMETRIC)
def test_geometric_operations_differ_from_pillow_only_as_resampling_does(name):
    """On photographs by 1.5 of 255 in the mean; on an image without fine detail by 2 at most, but for the outline."""
    y, x = np.indices((200, 224))
    smooth = np.stack([x, y, (x + y) / 2], axis=-1).astype(np.uint8)
    for image in [*photographs(width=224, height=200)[:4], smooth]:
        for magnitude in (0.0, 2.6, 9.0, 10.0):
            for sign in (-1, 1):
                wanted = np.asarray(apply_with_pillow(Image.fromarray(image), name, magnitude, sign)).astype(int)
                difference = np.abs(apply_ours(image, name, magnitude, sign) - wanted)
                assert difference.mean() < 1.5
                if image is smooth:
                    outline = difference.max(axis=-1) > 2  # where one blends with the fill and the other does not
                    assert outline.sum() < 3 * sum(image.shape[:2])


def draw_many(seed=0):
    rng = np.random.default_rng(seed)
    return [draw_operations(rng, count=2, magnitude=9.0, magnitude_std=0.5) for _ in range(DRAWS)]


@pytest.fixture(scope="module")
def draws():
    return draw_many()


def test_operations_are_drawn_evenly_and_each_applied_half_of_the_time(draws):
    lengths = np.bincount([len(chosen) for chosen in draws], minlength=3)
    assert stats.chisquare(lengths, np.array([0.25, 0.5, 0.25]) * DRAWS).pvalue > P_VALUE
    names = [name for chosen in draws for name, _ in chosen]
    counts = [names.count(name) for name in OPERATIONS]
    assert stats.chisquare(counts).pvalue > P_VALUE
    pairs = np.zeros((15, 15))  # with replacement: the second does not depend on the first
    for chosen in draws:
        if len(chosen) == 2:
            pairs[OPERATIONS.index(chosen[0][0]), OPERATIONS.index(chosen[1][0])] += 1
    assert stats.chi2_contingency(pairs).pvalue > P_VALUE


@pytest.mark.parametrize(
    ("name", "slope"), [("Rotate", 3), ("ShearX", 0.03), ("ShearY", 0.03), ("TranslateX", 0.045), ("TranslateY", 0.045)]
)
def test_magnitudes_are_normal_about_9_and_cut_at_10(draws, name, slope):
    arguments = np.array([argument for chosen in draws for drawn, argument in chosen if drawn == name])
    assert stats.binomtest(int((arguments > 0).sum()), len(arguments)).pvalue > P_VALUE
    magnitudes = np.abs(arguments) / slope
    cut = np.isclose(magnitudes, 10)
    above = 1 - stats.norm.cdf(10, 9, 0.5)
    assert stats.binomtest(int(cut.sum()), len(cut), above).pvalue > P_VALUE
    below = stats.truncnorm((0 - 9) / 0.5, (10 - 9) / 0.5, loc=9, scale=0.5)
    assert stats.kstest(magnitudes[~cut], below.cdf).pvalue > P_VALUE


@pytest.mark.parametrize("name", ["Color", "Contrast", "Brightness", "Sharpness"])
def test_factors_lie_on_both_sides_of_one(draws, name):
    factors = np.array([argument for chosen in draws for drawn, argument in chosen if drawn == name])
    assert stats.binomtest(int((factors > 1).sum()), len(factors)).pvalue > P_VALUE
    assert factors.min() >= 0.1 - 1e-12
    above = factors[factors > 1]
    magnitudes = (above - 1) / 0.09
    below = stats.truncnorm(-18, 2, loc=9, scale=0.5)
    assert stats.kstest(magnitudes[magnitudes < 10 - 1e-9], below.cdf).pvalue > P_VALUE


def test_without_operations_nothing_is_drawn():
    assert draw_operations(np.random.default_rng(0), count=0, magnitude=9.0, magnitude_std=0.5) == []
