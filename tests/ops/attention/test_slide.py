"""Slide attention: cases by hand, and comparison with two convolutions, one fixed and one learned."""

import functools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dat_jax.ops.attention.slide import slide_attention
from tests.reference import attention as reference
from tests.reference import compare


def attend(num_heads, scale=0.5):
    return functools.partial(slide_attention, num_heads=num_heads, scale=scale)


def make_arguments(map_shape, *, heads, width, batch=2):
    maps = (batch, *map_shape, heads * width)
    return compare.normal(0, maps, maps, maps, (3, 3, 1, 9 * width), (9 * width,), (heads, 9))


def attend_one_channel(query, value, *, kernel=None, bias=None, table=None):
    """Attention on (H, W) maps of one head with one channel. All keys are zero, like arguments that are None."""
    query, value = (np.asarray(x, float)[None, ..., None] for x in (query, value))
    kernel = np.zeros((3, 3, 1, 9)) if kernel is None else kernel
    bias = np.zeros(9) if bias is None else bias
    table = np.zeros((1, 9)) if table is None else table
    return compare.run(attend(1), query, np.zeros(value.shape), value, kernel, bias, table)[0, :, :, 0]


def test_equal_logits_give_the_mean_of_nine_shifted_copies():
    out = attend_one_channel(np.zeros((3, 3)), np.full((3, 3), 9.0))
    np.testing.assert_allclose(out, [[4, 6, 4], [6, 9, 6], [4, 6, 4]], rtol=1e-6)  # zero outside, and not masked


@pytest.mark.parametrize(("version", "shift"), [(0, (-1, -1)), (1, (-1, 0)), (4, (0, 0)), (5, (0, 1)), (6, (1, -1))])
def test_each_version_is_a_shifted_copy(version, shift):
    value = np.arange(1.0, 7.0).reshape(2, 3)
    table = np.zeros((1, 9))
    table[0, version] = 200.0  # with queries of one: all the weight on this version
    padded = np.pad(value, 1)
    expected = padded[1 + shift[0] : 3 + shift[0], 1 + shift[1] : 4 + shift[1]]
    np.testing.assert_allclose(attend_one_channel(np.ones((2, 3)), value, table=table), expected, rtol=1e-6)


def test_learned_convolution_and_bias_are_added_to_the_copy():
    kernel, bias, table = np.zeros((3, 3, 1, 9)), np.zeros(9), np.zeros((1, 9))
    kernel[1, 2, 0, 4] = 10.0  # version 4 gets ten times the pixel to the right
    bias[4] = 0.5
    table[0, 4] = 200.0
    out = attend_one_channel(np.ones((1, 3)), [[1, 2, 3]], kernel=kernel, bias=bias, table=table)
    np.testing.assert_allclose(out, [[21.5, 32.5, 3.5]], rtol=1e-6)


@pytest.mark.parametrize(
    ("map_shape", "heads", "width"), [((1, 1), 1, 1), ((1, 5), 2, 1), ((2, 1), 1, 3), ((3, 4), 2, 3), ((5, 5), 3, 2)]
)
def test_value_and_gradients_equal_the_reference(x64, map_shape, heads, width):
    arguments = make_arguments(map_shape, heads=heads, width=width)
    expected = functools.partial(reference.slide_attention, num_heads=heads, scale=0.5)
    compare.assert_same({"slide_attention": attend(heads)}, expected, *arguments)


@compare.few_examples(6)
@given(map_shape=st.tuples(st.integers(1, 6), st.integers(1, 6)), heads=st.integers(1, 3), width=st.integers(1, 3))
def test_any_shape_equals_the_reference(x64, map_shape, heads, width):
    arguments = make_arguments(map_shape, heads=heads, width=width, batch=1)
    expected = compare.run(functools.partial(reference.slide_attention, num_heads=heads, scale=0.5), *arguments)
    np.testing.assert_allclose(compare.run(attend(heads), *arguments), expected, atol=1e-10)


def test_bfloat16_gives_bfloat16():
    arguments = make_arguments((4, 3), heads=2, width=4)
    compare.assert_close_in_bfloat16(attend(2, scale=0.1), *arguments, tolerance=0.1)
