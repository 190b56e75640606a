"""Resizing, compared with the sampling formula pixel by pixel, and its gradient with finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from dat_jax.ops.layers import resize


def plain_bilinear(x, shape):
    """PyTorch's ``interpolate`` with align_corners=False, pixel by pixel."""
    out = np.zeros((x.shape[0], *shape, x.shape[3]))
    for y in range(shape[0]):
        for z in range(shape[1]):
            places = []
            for index, old, new in ((y, x.shape[1], shape[0]), (z, x.shape[2], shape[1])):
                source = max((index + 0.5) * old / new - 0.5, 0)
                low = min(int(source), old - 1)
                places.append((low, min(low + 1, old - 1), source - low))
            (top, bottom, v), (left, right, u) = places
            out[:, y, z] = (1 - v) * ((1 - u) * x[:, top, left] + u * x[:, top, right]) + v * (
                (1 - u) * x[:, bottom, left] + u * x[:, bottom, right]
            )
    return out


SHAPES = [((3, 4), (7, 9)), ((7, 9), (3, 4)), ((5, 5), (5, 11)), ((1, 2), (4, 4)), ((6, 8), (6, 8))]


@pytest.mark.parametrize(("old", "new"), SHAPES)
def test_bilinear_equals_the_formula(old, new, x64):
    x = np.random.default_rng(0).standard_normal((2, *old, 3))
    np.testing.assert_allclose(resize.resize_bilinear(jnp.asarray(x), new), plain_bilinear(x, new), atol=1e-12)
    check_grads(lambda x: resize.resize_bilinear(x, new), (jnp.asarray(x),), order=1, modes=["rev"])


@pytest.mark.parametrize(("old", "new"), SHAPES)
def test_traced_weights_equal_static_weights(old, new, x64):
    actual = jax.jit(lambda n: resize.traced_bilinear_weights(old[1], n, count=13, dtype=jnp.float64))(new[1])
    np.testing.assert_allclose(actual[: new[1]], resize.bilinear_weights(old[1], new[1]), atol=1e-12)


def test_bfloat16_gives_bfloat16():
    assert resize.resize_bilinear(jnp.zeros((1, 2, 2, 1), jnp.bfloat16), (5, 5)).dtype == jnp.bfloat16


@pytest.mark.parametrize(("old", "new"), [((2, 3), (4, 6)), ((2, 3), (3, 5)), ((4, 4), (3, 2)), ((3, 3), (9, 3))])
def test_nearest_equals_the_formula(old, new):
    x = np.arange(np.prod(old), dtype=np.float32).reshape(1, *old, 1)
    expected = [[x[0, y * old[0] // new[0], z * old[1] // new[1], 0] for z in range(new[1])] for y in range(new[0])]
    np.testing.assert_array_equal(resize.resize_nearest(jnp.asarray(x), new)[0, ..., 0], expected)


@pytest.mark.parametrize(("old", "side"), [((4, 6), 2), ((5, 7), 3), ((3, 4), 6), ((7, 5), 1)])
def test_adaptive_pooling_equals_the_formula(old, side, x64):
    """Bins overlap if the side does not divide the map, and repeat pixels if it is larger than the map."""
    x = np.random.default_rng(0).standard_normal((2, *old, 3))
    expected = np.zeros((2, side, side, 3))
    for y in range(side):
        for z in range(side):
            top, left = y * old[0] // side, z * old[1] // side
            bottom, right = -(-(y + 1) * old[0] // side), -(-(z + 1) * old[1] // side)
            expected[:, y, z] = x[:, top:bottom, left:right].mean(axis=(1, 2))
    np.testing.assert_allclose(resize.adaptive_average_pool(jnp.asarray(x), side), expected, atol=1e-12)
