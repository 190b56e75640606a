"""The kernel of deformable attention against the products; both ways its bias comes."""

import functools

import numpy as np
import pytest

from dat_jax.ops.attention import deformable as da
from dat_jax.ops.pallas import deformable as kernels
from tests.reference import compare


def make_arguments(map_shape, table_map, heads, groups, keys, *, width=3):
    rng = np.random.default_rng(1)
    maps = (2, *map_shape, heads * width), (2, keys, heads * width), (2, keys, heads * width)
    arrays = compare.normal(0, *maps, (heads, *(2 * size - 1 for size in table_map)))
    points = rng.uniform(0, np.asarray(map_shape) - 1, (2, groups, keys, 2))
    return *arrays[:3], points, arrays[3]


@pytest.mark.parametrize(
    ("map_shape", "table_map", "heads", "groups", "keys", "inside"),
    [
        ((4, 5), (4, 5), 4, 2, 6, True),  # sampled in the kernel
        ((4, 5), (4, 5), 2, 1, 3, False),  # given to the kernel
        ((4, 5), (3, 4), 2, 2, 5, True),  # likewise, from a table of another size
        ((7, 1), (7, 1), 3, 3, 9, True),
        ((1, 6), (1, 6), 1, 1, 2, True),
        ((9, 2), (9, 2), 2, 1, 4, True),
    ],
)
def test_a_table(x64, map_shape, table_map, heads, groups, keys, inside):
    arguments = make_arguments(map_shape, table_map, heads, groups, keys)

    def attend(query, key, value, points, table, *, implementation):
        options = dict(num_heads=heads, points_inside=inside, implementation=implementation)
        return da.deformable_attention(query, key, value, points=points, table=table, **options)

    plain = functools.partial(attend, implementation="matmul")
    compare.assert_same({"pallas": functools.partial(attend, implementation="pallas")}, plain, *arguments)


def test_keys_in_the_corners(x64):
    """On a pixel, where a derivative has two limits, it is the same one."""
    query, key, value, points, table = make_arguments((4, 5), (4, 5), 2, 1, 3)
    points[0, 0, :2] = [[0, 0], [3, 4]]
    points[1, 0, :2] = [[0, 4], [3, 0]]

    def attend(*arguments, implementation):
        query, key, value, points, table = arguments
        options = dict(num_heads=2, points_inside=True, implementation=implementation)
        return da.deformable_attention(query, key, value, points=points, table=table, **options)

    functions = {name: functools.partial(attend, implementation=name) for name in ("pallas", "matmul")}
    compare.assert_same(functions, functions["matmul"], query, key, value, points, table)


@pytest.mark.parametrize("batch", [1, 2, None])
def test_a_bias_that_is_given_or_none(x64, batch):
    query, key, value, *_ = make_arguments((3, 4), (3, 4), 2, 1, 5)
    bias = [] if batch is None else compare.normal(3, (batch, 2, 12, 5))

    def attend(query, key, value, *bias, implementation):
        bias = bias[0] if bias else None
        return da.deformable_attention(query, key, value, num_heads=2, bias=bias, implementation=implementation)

    plain = functools.partial(attend, implementation="plain")
    compare.assert_same({"pallas": functools.partial(attend, implementation="pallas")}, plain, query, key, value, *bias)


def test_bfloat16():
    arguments = make_arguments((6, 5), (6, 5), 4, 2, 7, width=8)

    def attend(query, key, value, points, table):
        options = dict(num_heads=4, points_inside=True, implementation="pallas")
        return da.deformable_attention(query, key, value, points=points, table=table, **options)

    compare.assert_close_in_bfloat16(attend, *arguments, tolerance=3e-2, kept=(3, 4))


def test_shifted_columns_by_hand():
    table = np.arange(15.0).reshape(1, 5, 3)  # of a map of 3 x 2
    shifted = np.asarray(kernels.shift_columns(table)).reshape(3, 7, 2)
    np.testing.assert_array_equal(shifted[0, :5, 0], table[0, :, 2])  # a key to the left of the map
    np.testing.assert_array_equal(shifted[1, :5], table[0, :, 1:])  # in the first column
    np.testing.assert_array_equal(shifted[2, :5], table[0, :, :2])  # in the last
    for outside in (shifted[:, 5:], shifted[0, :, 1]):
        np.testing.assert_array_equal(outside, 0)
