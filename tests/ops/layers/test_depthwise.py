"""Depthwise convolution: cases by hand, comparison with one pixel at a time, and between the algorithms."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dat_jax.ops import dispatch
from dat_jax.ops.layers.depthwise import depthwise_conv
from tests.reference import compare, convolution

NAMES = dispatch.IMPLEMENTATIONS["depthwise_conv"]


def convolve(stride, padding, implementation="auto"):
    return functools.partial(depthwise_conv, stride=stride, padding=padding, implementation=implementation)


def make_arguments(map_shape, kernel_size, *, channels=2, batch=2):
    return compare.normal(0, (batch, *map_shape, channels), (kernel_size, kernel_size, 1, channels))


@pytest.mark.parametrize("implementation", NAMES)
def test_ones_count_the_pixels_under_the_kernel(implementation):
    out = compare.run(convolve(1, 1, implementation), np.ones((1, 3, 3, 1)), np.ones((3, 3, 1, 1)))
    np.testing.assert_allclose(out[0, :, :, 0], [[4, 6, 4], [6, 9, 6], [4, 6, 4]])


@pytest.mark.parametrize("implementation", NAMES)
@pytest.mark.parametrize("stride", [1, 2])
def test_kernel_is_not_rotated(implementation, stride):
    x, kernel = np.arange(1.0, 10.0).reshape(1, 3, 3, 1), np.zeros((2, 2, 1, 1))
    kernel[0, 1] = 1.0
    out = compare.run(convolve(stride, 0, implementation), x, kernel)
    np.testing.assert_allclose(out[0, :, :, 0], [[2, 3], [5, 6]] if stride == 1 else [[2]])


@pytest.mark.parametrize("implementation", NAMES)
def test_each_channel_has_its_own_kernel(implementation):
    x, kernel = np.ones((1, 2, 2, 2)), np.asarray([3.0, 5.0]).reshape(1, 1, 1, 2)
    out = compare.run(convolve(1, 0, implementation), x, kernel)
    np.testing.assert_allclose(out, np.broadcast_to([3.0, 5.0], (1, 2, 2, 2)))


@pytest.mark.parametrize(
    ("map_shape", "kernel_size", "stride", "padding"),
    [
        ((1, 1), 1, 1, 0),
        ((1, 1), 3, 1, 1),
        ((1, 5), 3, 1, 1),
        ((4, 4), 3, 1, 1),
        ((5, 3), 3, 1, 0),
        ((3, 4), 3, 1, 2),
        ((2, 3), 3, 1, 4),  # padding beyond the kernel
        ((4, 5), 2, 1, 1),
        ((4, 6), 2, 2, 0),
        ((5, 7), 3, 2, 1),
        ((8, 8), 5, 4, 2),
        ((9, 11), 9, 8, 4),
        ((3, 2), 7, 4, 3),  # a kernel larger than the map
        ((7, 5), 1, 3, 0),
        ((16, 9), 3, 1, 1),  # many rows: their sum is split
        ((9, 15), 3, 1, 1),  # their sum is split into odd parts
    ],
)
def test_value_and_gradients_equal_one_pixel_at_a_time(x64, map_shape, kernel_size, stride, padding):
    arguments = make_arguments(map_shape, kernel_size)
    functions = {name: convolve(stride, padding, name) for name in NAMES}
    expected = functools.partial(convolution.depthwise_conv, stride=stride, padding=padding)
    compare.assert_same(functions, expected, *arguments)


def test_auto_equals_plain(x64):
    arguments = make_arguments((6, 5), 3, channels=4)
    compare.assert_same({"auto": convolve(1, 1, "auto")}, convolve(1, 1, "plain"), *arguments)


@compare.few_examples(15)
@given(
    kernel_size=st.integers(1, 5),
    extra=st.tuples(st.integers(0, 8), st.integers(0, 8)),
    stride=st.integers(1, 4),
    padding=st.integers(0, 5),
)
def test_shifts_equal_the_plain_convolution(x64, kernel_size, extra, stride, padding):
    map_shape = tuple(max(1, kernel_size - 2 * padding) + more for more in extra)
    arguments = make_arguments(map_shape, kernel_size)
    actual, expected = (compare.run(convolve(stride, padding, name), *arguments) for name in NAMES)
    assert actual.shape[1:3] == tuple((side + 2 * padding - kernel_size) // stride + 1 for side in map_shape)
    np.testing.assert_allclose(actual, expected, atol=1e-12)


@pytest.mark.parametrize("shape", [(3, 3, 1, 4), (3, 2, 1, 2), (3, 3, 2, 1), (3, 3, 2)])
def test_kernel_of_another_shape_raises(shape):
    with pytest.raises(
        ValueError, match=rf"expected a kernel \(K, K, 1, 2\), got \({shape[0]}, {shape[1]}, {shape[2]}"
    ):
        depthwise_conv(jnp.zeros((1, 4, 4, 2)), jnp.zeros(shape))


@pytest.mark.parametrize("implementation", NAMES)
def test_kernel_larger_than_the_padded_map_raises(implementation):
    with pytest.raises(ValueError, match=r"A 5 x 5 kernel does not fit into a padded map of \(9, 2\) \+ 2"):
        convolve(1, 1, implementation)(jnp.zeros((1, 9, 2, 1)), jnp.zeros((5, 5, 1, 1)))


def test_unknown_implementation_raises():
    with pytest.raises(
        ValueError, match="depthwise_conv has no implementation 'tiles'; choose one of auto, plain, shifts"
    ):
        convolve(1, 1, "tiles")(jnp.zeros((1, 4, 4, 1)), jnp.zeros((3, 3, 1, 1)))


@pytest.mark.parametrize("implementation", NAMES)
@pytest.mark.parametrize("stride", [1, 2])
def test_bfloat16_gives_bfloat16(implementation, stride):
    arguments = make_arguments((5, 6), 3)
    compare.assert_close_in_bfloat16(convolve(stride, 1, implementation), *arguments, tolerance=0.1)
