"""Bilinear sampling: cases by hand, comparison with the definition, and between the algorithms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dat_jax.ops import dispatch
from dat_jax.ops.attention.grid_sample import grid_sample, linear_weights, to_pixels
from tests.helpers.tiers import slow
from tests.reference import compare, sampling

IMPLEMENTATIONS = ("auto", "plain", *dispatch.IMPLEMENTATIONS["grid_sample"])
FAST = ("gather", "matmul")


def samplers(names):
    return {name: functools.partial(grid_sample, implementation=name) for name in names}


def sample_one(features, points, implementation):
    """Samples a map (H, W) at points (N, 2): (N,)."""
    return grid_sample(features[None, ..., None], points[None, None], implementation=implementation)[0, :, 0]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_points_of_a_two_by_two_map_by_hand(implementation):
    expected = {
        (0.0, 0.0): 1.0,
        (1.0, 1.0): 4.0,
        (0.5, 0.5): 2.5,
        (0.0, 0.25): 1.25,
        (0.25, 1.0): 2.5,
        (-0.5, 0.0): 0.5,
        (1.5, 1.5): 1.0,
        (-1.0, 0.0): 0.0,
        (0.0, 2.0): 0.0,
        (-7.0, 9.0): 0.0,
        (1e12, -1e12): 0.0,
    }
    sample = functools.partial(sample_one, implementation=implementation)
    actual = compare.run(sample, np.asarray([[1.0, 2.0], [3.0, 4.0]]), np.asarray(list(expected)))
    np.testing.assert_allclose(actual, list(expected.values()), rtol=1e-6)


@pytest.mark.parametrize("implementation", dispatch.IMPLEMENTATIONS["grid_sample"])
def test_gradient_on_pixel_lines_is_the_one_to_the_right(implementation):
    features = np.asarray([[1.0, 4.0, 9.0]])
    points = np.asarray([[0.0, column] for column in (-2.0, -1.0, 0.0, 0.5, 1.0, 2.0, 3.0)])
    gradient = compare.run(jax.grad(lambda f, p: sample_one(f, p, implementation).sum(), argnums=1), features, points)
    np.testing.assert_allclose(gradient[:, 1], [0, 1, 3, 3, 5, -9, 0], rtol=1e-6)
    np.testing.assert_allclose(gradient[:, 0], [0, 0, -1, -2.5, -4, -9, 0], rtol=1e-6)


@pytest.mark.parametrize("implementation", dispatch.IMPLEMENTATIONS["grid_sample"])
def test_gradient_of_the_map_is_the_weight_of_each_pixel(implementation):
    features, point = np.zeros((2, 3)), np.asarray([[0.25, 1.5]])
    gradient = compare.run(jax.grad(lambda f, p: sample_one(f, p, implementation).sum()), features, point)
    np.testing.assert_allclose(gradient, [[0, 0.375, 0.375], [0, 0.125, 0.125]], rtol=1e-6)


def test_each_group_of_channels_has_its_own_points():
    features = np.arange(8.0).reshape(1, 1, 2, 4)  # channels 0 1 | 2 3 of pixels 0, 1
    points = np.asarray([[0.0, 0.0], [0.0, 1.0]]).reshape(1, 2, 1, 2)
    np.testing.assert_array_equal(compare.run(grid_sample, features, points)[0, 0], [0, 1, 6, 7])


@pytest.mark.parametrize(
    ("shape", "groups", "keys", "names"),
    [
        slow((1, 1, 1, 1), 1, 3, IMPLEMENTATIONS),
        ((2, 2, 3, 4), 2, 5, IMPLEMENTATIONS),
        ((2, 1, 5, 4), 4, 6, FAST),
        slow((1, 4, 1, 3), 1, 1, FAST),
        slow((2, 5, 5, 6), 3, 7, FAST),
        slow((3, 4, 7, 2), 1, 9, FAST),
        ((1, 65, 64, 2), 2, 3, (*FAST, "auto")),  # "auto" changes its choice at this size
    ],
)
def test_value_and_gradients_equal_the_definition(x64, shape, groups, keys, names):
    (features,) = compare.normal(0, shape)
    points = compare.random_points(1, (shape[0], groups, keys), shape[1:3])
    compare.assert_same(samplers(names), sampling.grid_sample, features, points)


def test_algorithms_agree_on_pixel_lines_and_borders(x64):
    (features,) = compare.normal(0, (1, 2, 3, 2))
    lines = [(float(y), x / 2) for y in range(-2, 4) for x in range(-4, 9)]
    points = np.asarray(lines)[None, None]
    reference = samplers(["gather"])["gather"]
    compare.assert_same(samplers(["matmul", "map_coordinates"]), reference, features, points)
    value = compare.run(sampling.grid_sample, features, points)
    np.testing.assert_allclose(compare.run(reference, features, points), value, atol=1e-12)


@compare.few_examples(12)
@given(height=st.integers(1, 6), width=st.integers(1, 6), implementation=st.sampled_from(FAST))
def test_pixel_centers_return_the_pixels(x64, height, width, implementation):
    (features,) = compare.normal(height + 7 * width, (2, height, width, 3))
    centers = np.moveaxis(np.indices((height, width), float), 0, -1).reshape(1, 1, -1, 2)
    actual = compare.run(samplers(FAST)[implementation], features, np.tile(centers, (2, 1, 1, 1)))
    np.testing.assert_array_equal(actual, features.reshape(2, height * width, 3))


@pytest.mark.slow
@compare.few_examples(12)
@given(height=st.integers(2, 9), width=st.integers(2, 9), seed=st.integers(0, 99))
def test_a_plane_is_reproduced_between_the_pixels(x64, height, width, seed):
    a, b, c = np.random.default_rng(seed).normal(size=3)
    y, x = np.indices((height, width))
    points = compare.random_points(seed, (1, 1, 5), (height, width), margin=0.0)
    for name in FAST:
        actual = compare.run(samplers(FAST)[name], (a + b * y + c * x)[None, ..., None], points)
        np.testing.assert_allclose(actual[..., 0], a + b * points[:, 0, :, 0] + c * points[:, 0, :, 1], atol=1e-12)


@compare.few_examples(12)
@given(size=st.integers(1, 12), position=st.floats(-3, 14))
def test_linear_weights_equal_the_hat_function(x64, size, position):
    weights = compare.run(functools.partial(linear_weights, size=size), np.asarray([position]))
    hat = np.maximum(0, 1 - np.abs(np.arange(size) - position))
    np.testing.assert_allclose(weights[0], hat, atol=1e-12)
    if 0 <= position <= size - 1:
        np.testing.assert_allclose(weights.sum(), 1, atol=1e-12)


@pytest.mark.parametrize(
    ("map_shape", "expected"),
    [((5, 9), [[0, 8], [2, 4], [4, 0], [5, 6]]), ((1, 3), [[0, 2], [0, 1], [0, 0], [0, 1.5]]), ((1, 1), [[0, 0]] * 4)],
)
def test_to_pixels_by_hand(map_shape, expected):
    normalized = np.asarray([[-1.0, 1.0], [0.0, 0.0], [1.0, -1.0], [1.5, 0.5]])
    np.testing.assert_array_equal(compare.run(functools.partial(to_pixels, map_shape=map_shape), normalized), expected)


@pytest.mark.parametrize("shape", [(2, 3, 4, 2), (1, 1, 4, 2), (2, 2, 4, 3), (2, 2, 4)])
def test_points_of_another_shape_raise(shape):
    with pytest.raises(
        ValueError, match=r"expected points \(B, G, N, 2\) with B = 2 and G a divisor of 4 .* got .* \((2|1), "
    ):
        grid_sample(jnp.zeros((2, 3, 3, 4)), jnp.zeros(shape))


def test_unknown_implementation_raises():
    with pytest.raises(
        ValueError, match="grid_sample has no implementation 'slice'; choose one of auto, plain, matmul"
    ):
        grid_sample(jnp.zeros((1, 2, 2, 1)), jnp.zeros((1, 1, 1, 2)), implementation="slice")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_features_give_bfloat16(implementation):
    (features,) = compare.normal(0, (2, 3, 4, 4))
    points = compare.random_points(1, (2, 2, 5), (3, 4))
    sample = samplers(IMPLEMENTATIONS)[implementation]
    compare.assert_close_in_bfloat16(sample, features, points, tolerance=0.02, keep_float32=(1,))
