"""Images with any number of channels as RGB."""

import numpy as np
import pytest

from dat_jax.visualization.displayable import to_rgb


@pytest.mark.parametrize(("channels", "shown"), [(1, [0, 0, 0]), (2, [0, 0, 0]), (3, [0, 1, 2]), (12, [0, 1, 2])])
def test_the_first_channels_are_shown(channels, shown):
    image = np.random.default_rng(0).integers(0, 256, (4, 5, channels), dtype=np.uint8)
    np.testing.assert_array_equal(to_rgb(image), image[:, :, shown])


def test_other_values_are_scaled():
    """By hand: the smallest value becomes 0, the largest 255, and a constant image black."""
    image = np.array([[[-2.0], [0.0], [3.0]]], np.float32)
    assert to_rgb(image)[0, :, 0].tolist() == [0, 102, 255]
    assert to_rgb((10_000 + 1000 * image).astype(np.uint16))[0, :, 2].tolist() == [0, 102, 255]
    assert to_rgb(np.full((1, 1, 4), 7, np.uint16)).tolist() == [[[0, 0, 0]]]
