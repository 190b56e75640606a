"""Neighborhood attention kernels for GPUs, interpreted, against the plain gather."""

import functools

import numpy as np
import pytest

from dat_jax.ops.attention.neighborhood import neighborhood_attention
from tests.helpers.tiers import slow
from tests.reference import compare


def make_arguments(map_shape, kernel_size, heads, width, *, batch=2):
    side = 2 * kernel_size - 1
    shape = (batch, *map_shape, heads * width)
    return compare.normal(0, shape, shape, shape, (heads, side, side))


def make_attend(kernel_size, heads, implementation):
    return functools.partial(
        neighborhood_attention, kernel_size=kernel_size, num_heads=heads, implementation=implementation
    )


# Map, window, heads, channels per head. Tiles are 4 x 16, and blocks of channels at least 16 wide.
FAST = [((5, 18), 3, 2, 2), ((7, 7), 7, 1, 3), ((9, 17), 5, 1, 16)]
SLOW = [
    *[((3, 3), 3, 1, 4), ((4, 16), 3, 1, 4), ((8, 32), 3, 2, 4), ((3, 40), 3, 1, 2), ((40, 3), 3, 1, 2)],
    *[((5, 5), 3, 3, 1), ((6, 33), 5, 1, 2), ((33, 6), 5, 1, 2), ((5, 5), 5, 2, 2), ((16, 16), 5, 1, 4)],
    *[((7, 50), 7, 1, 2), ((50, 7), 7, 1, 2), ((14, 14), 7, 2, 2), ((28, 28), 7, 1, 2), ((13, 19), 7, 2, 3)],
    *[((8, 8), 7, 1, 4), ((12, 48), 7, 1, 2), ((17, 31), 7, 1, 5), ((9, 9), 9, 1, 2), ((11, 26), 9, 1, 2)],
    *[((11, 11), 11, 1, 2), ((12, 35), 11, 1, 2), ((13, 13), 13, 1, 2), ((15, 34), 13, 1, 2), ((1, 9), 1, 1, 2)],
    *[((6, 6), 1, 2, 2), ((4, 20), 4, 1, 2), ((10, 10), 2, 1, 2), ((9, 21), 6, 1, 2), ((10, 12), 7, 1, 20)],
]


@pytest.mark.parametrize(("map_shape", "kernel_size", "heads", "width"), [*FAST, *(slow(*case) for case in SLOW)])
def test_the_kernels_equal_the_gather(x64, map_shape, kernel_size, heads, width):
    arguments = make_arguments(map_shape, kernel_size, heads, width)
    functions = {"triton": make_attend(kernel_size, heads, "triton")}
    compare.assert_same(functions, make_attend(kernel_size, heads, "plain"), *arguments)


@pytest.mark.slow
@pytest.mark.parametrize(("map_shape", "width"), [((96, 96), 2), ((200, 336), 1)])
def test_large_maps(map_shape, width):
    arguments = [np.asarray(x, np.float32) for x in make_arguments(map_shape, 7, 1, width, batch=1)]
    expected = compare.value_and_gradients(make_attend(7, 1, "tiles"), *arguments)
    for index, actual in enumerate(compare.value_and_gradients(make_attend(7, 1, "triton"), *arguments)):
        np.testing.assert_allclose(actual, expected[index], rtol=1e-3, atol=2e-4 * np.abs(expected[index]).max())


@pytest.mark.parametrize(
    ("map_shape", "kernel_size"), [((7, 18), 3), slow((14, 14), 7), slow((9, 25), 5), slow((7, 7), 7)]
)
def test_bfloat16_is_as_close_as_the_plain_implementation(map_shape, kernel_size):
    """Gradients too: the difference from float32 is at most that of the plain implementation in bfloat16, and a little."""
    full = [np.asarray(x, np.float32) for x in make_arguments(map_shape, kernel_size, 2, 8)]
    compare.assert_close_in_bfloat16(make_attend(kernel_size, 2, "triton"), *full, tolerance=4e-2, keep_float32=(3,))
    half = [x.astype("bfloat16") for x in full[:3]] + full[3:]
    exact = compare.value_and_gradients(make_attend(kernel_size, 2, "plain"), *full)[1:]
    plain, triton = (
        compare.value_and_gradients(make_attend(kernel_size, 2, name), *half)[1:] for name in ("plain", "triton")
    )
    for index, expected in enumerate(exact):
        errors = [np.abs(x[index].astype(np.float32) - expected).max() for x in (plain, triton)]
        assert triton[index].dtype == plain[index].dtype
        assert errors[1] <= 1.5 * errors[0] + 0.01 * np.abs(expected).max()


def test_sizes_replace_the_kernel():
    arguments = [np.asarray(x, np.float32) for x in make_arguments((6, 7), 3, 2, 4)]
    sizes = np.array([[6, 7], [4, 5]])
    results = [
        compare.run(functools.partial(make_attend(3, 2, name), sizes=sizes), *arguments) for name in ("triton", "auto")
    ]
    np.testing.assert_array_equal(*results)
