"""Window attention, plain and shifted: cases by hand, and comparison with the rule for every pair of pixels."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dat_jax.ops.attention.window import relative_position_index, window_attention
from tests.reference import attention as reference
from tests.reference import compare


def attend(window_size, num_heads, shifted):
    return functools.partial(window_attention, window_size=window_size, num_heads=num_heads, shifted=shifted)


def make_arguments(map_shape, window_size, *, heads, width=2, batch=2):
    maps = (batch, *map_shape, heads * width)
    return compare.normal(0, maps, maps, maps, ((2 * window_size - 1) ** 2, heads))


def average(value, *, window_size, shifted):
    """Attention on (H, W) values with equal logits, except for the mask."""
    value = np.asarray(value, float)[None, ..., None]
    table = np.zeros(((2 * window_size - 1) ** 2, 1))
    zeros = np.zeros(value.shape)
    return compare.run(attend(window_size, 1, shifted), zeros, zeros, value, table)[0, :, :, 0]


def test_equal_logits_give_the_mean_of_each_window():
    value = [[0, 2, 10, 12], [4, 6, 14, 16]]
    np.testing.assert_allclose(average(value, window_size=2, shifted=False), [[3, 3, 13, 13]] * 2, rtol=1e-6)


def test_shifted_windows_separate_pixels_that_only_the_roll_joined():
    value = np.arange(16).reshape(4, 4)
    expected = [[0, 1.5, 1.5, 3], [6, 7.5, 7.5, 9], [6, 7.5, 7.5, 9], [12, 13.5, 13.5, 15]]
    np.testing.assert_allclose(average(value, window_size=2, shifted=True), expected, rtol=1e-6)


def test_odd_shifted_windows_are_rolled_by_the_larger_half():
    value = np.arange(6)[None] * np.ones((3, 1))
    row = [0.5, 0.5, 3, 3, 3, 5]  # columns 0 1 | 2 3 4 | 5
    np.testing.assert_allclose(average(value, window_size=3, shifted=True), [row] * 3, rtol=1e-6)


def test_penalty_of_shifted_windows_is_100():
    value = np.arange(4.0).reshape(1, 2, 2, 1)  # every pixel is one region; the roll makes it [[3, 2], [1, 0]]
    zeros, table = np.zeros(value.shape), np.zeros((9, 1))
    table[(0 + 1) * 3 + (1 + 1)] = 100.0  # the query one to the right of the key
    out = compare.run(attend(2, 1, True), zeros, zeros, value, table)
    np.testing.assert_allclose(out[0, :, :, 0], [[0.5, 1], [2.5, 3]], rtol=1e-6)


def test_table_is_read_at_query_minus_key():
    value = np.arange(4.0).reshape(1, 2, 2, 1)
    zeros, table = np.zeros(value.shape), np.zeros((9, 1))
    table[(1 + 1) * 3 + (0 + 1)] = 99.0  # the query one below the key
    out = compare.run(attend(2, 1, False), zeros, zeros, value, table)
    np.testing.assert_allclose(out[0, :, :, 0], [[1.5, 1.5], [0, 1]], rtol=1e-6)


@pytest.mark.parametrize("shifted", [False, True])
def test_windows_of_one_pixel_return_the_values(shifted):
    query, key, value, table = make_arguments((2, 3), 1, heads=2)
    np.testing.assert_allclose(compare.run(attend(1, 2, shifted), query, key, value, table), value, rtol=1e-6)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(
    ("map_shape", "window_size", "heads"),
    [((1, 1), 1, 1), ((2, 2), 2, 2), ((3, 6), 3, 1), ((4, 6), 2, 3), ((8, 4), 4, 2), ((7, 7), 7, 1), ((10, 5), 5, 1)],
)
def test_value_and_gradients_equal_the_rule_for_every_pair(x64, map_shape, window_size, heads, shifted):
    arguments = make_arguments(map_shape, window_size, heads=heads)
    expected = functools.partial(reference.window_attention, window_size=window_size, num_heads=heads, shifted=shifted)
    compare.assert_same({"window_attention": attend(window_size, heads, shifted)}, expected, *arguments)


@pytest.mark.slow
@compare.few_examples(12)
@given(
    window_size=st.integers(1, 4),
    windows=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    heads=st.integers(1, 3),
    shifted=st.booleans(),
)
def test_constant_values_give_the_constant(x64, window_size, windows, heads, shifted):
    map_shape = tuple(window_size * count for count in windows)
    query, key, value, table = make_arguments(map_shape, window_size, heads=heads, batch=1)
    out = compare.run(attend(window_size, heads, shifted), query, key, np.full_like(value, 0.5), table)
    np.testing.assert_allclose(out, 0.5, rtol=1e-12)


@pytest.mark.parametrize("window_size", [1, 2, 3, 4])
def test_relative_position_index_follows_the_formula(window_size):
    w, index = window_size, relative_position_index(window_size)
    for q, (qi, qj) in enumerate(reference.pixels((w, w))):
        for k, (ki, kj) in enumerate(reference.pixels((w, w))):
            assert index[q, k] == (qi - ki + w - 1) * (2 * w - 1) + (qj - kj + w - 1)


@pytest.mark.parametrize("map_shape", [(4, 5), (5, 4), (1, 1)])
def test_map_with_partial_windows_raises(map_shape):
    maps, table = jnp.zeros((1, *map_shape, 2)), jnp.zeros((9, 1))
    with pytest.raises(ValueError, match=f"multiples of 2, got {map_shape[0]} x {map_shape[1]}; pad"):
        attend(2, 1, False)(maps, maps, maps, table)


@pytest.mark.parametrize("shape", [(9, 2), (4, 1), (3, 3)])
def test_table_of_another_shape_raises(shape):
    maps = jnp.zeros((1, 4, 4, 2))
    with pytest.raises(ValueError, match=rf"expected a table \(9, 1\), got \({shape[0]}, {shape[1]}\)"):
        attend(2, 1, True)(maps, maps, maps, jnp.zeros(shape))


@pytest.mark.parametrize("shifted", [False, True])
def test_bfloat16_gives_bfloat16(shifted):
    arguments = make_arguments((4, 6), 2, heads=2, width=4)
    compare.assert_close_in_bfloat16(attend(2, 2, shifted), *arguments, tolerance=0.05)
