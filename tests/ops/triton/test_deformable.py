"""Deformable attention kernels for GPUs, interpreted, against the plain products."""

import functools

import numpy as np
import pytest

from dat_jax.ops.attention.deformable import deformable_attention
from tests.helpers.tiers import slow
from tests.reference import compare


def make_arguments(map_shape, table_map, heads, groups, keys, *, width=2, batch=2):
    shapes = (batch, *map_shape, heads * width), (batch, keys, heads * width), (batch, keys, heads * width)
    query, key, value, table = compare.normal(0, *shapes, (heads, *(2 * size - 1 for size in table_map)))
    return query, key, value, compare.random_points(1, (batch, groups, keys), map_shape), table


def make_attend(heads, implementation, **options):
    def attend(query, key, value, points, table):
        arrays = dict(points=points, table=table)
        return deformable_attention(
            query, key, value, num_heads=heads, implementation=implementation, **arrays, **options
        )

    return attend


# Map, map of the table, heads, groups, keys, channels per head. Blocks have 64 queries and up to 64 keys.
FAST = [((5, 7), (5, 7), 4, 2, 6, 2), ((9, 8), (9, 8), 1, 1, 66, 3), ((4, 5), (3, 4), 2, 2, 5, 16)]
SLOW = [
    *[((1, 1), (1, 1), 1, 1, 1, 2), ((1, 9), (1, 9), 1, 1, 3, 2), ((9, 1), (9, 1), 1, 1, 3, 2)],
    *[((8, 8), (8, 8), 2, 1, 16, 2), ((8, 8), (8, 8), 2, 2, 17, 2), ((7, 7), (7, 7), 4, 4, 49, 2)],
    *[((14, 14), (14, 14), 4, 2, 49, 2), ((16, 9), (16, 9), 1, 1, 32, 2), ((3, 30), (3, 30), 1, 1, 4, 2)],
    *[((30, 3), (30, 3), 1, 1, 4, 2), ((12, 12), (12, 12), 2, 1, 130, 2), ((13, 5), (13, 5), 3, 3, 7, 5)],
    *[((6, 6), (7, 7), 2, 1, 4, 2), ((6, 11), (3, 5), 2, 2, 4, 2), ((10, 10), (5, 20), 1, 1, 9, 2)],
    *[((28, 28), (28, 28), 1, 1, 49, 2), ((11, 6), (11, 6), 6, 3, 8, 1), ((8, 9), (8, 9), 1, 1, 65, 20)],
]


@pytest.mark.parametrize(
    ("map_shape", "table_map", "heads", "groups", "keys", "width"), [*FAST, *(slow(*case) for case in SLOW)]
)
def test_a_table_equals_the_products(x64, map_shape, table_map, heads, groups, keys, width):
    arguments = make_arguments(map_shape, table_map, heads, groups, keys, width=width)
    compare.assert_same({"triton": make_attend(heads, "triton")}, make_attend(heads, "plain"), *arguments)


@pytest.mark.parametrize("tile_shape", [(2, 7), slow((3, 3)), slow((5, 4))])
def test_tiles_of_queries_equal_the_whole_map(x64, tile_shape):
    arguments = make_arguments((5, 7), (5, 7), 2, 1, 6)
    functions = {"tiles": make_attend(2, "triton", tile_shape=tile_shape)}
    compare.assert_same(functions, make_attend(2, "plain"), *arguments)


@pytest.mark.parametrize(
    ("map_shape", "table_map"), [((5, 4), (5, 4)), slow((4, 6), (7, 3)), slow((8, 8), (8, 8)), slow((1, 5), (1, 5))]
)
def test_queries_at_the_centers_of_pixels(x64, map_shape, table_map):
    arguments = make_arguments(map_shape, table_map, 2, 2, 4)
    functions = {"triton": make_attend(2, "triton", query_grid="centers")}
    compare.assert_same(functions, make_attend(2, "plain", query_grid="centers"), *arguments)


@pytest.mark.parametrize("batch", [1, 2, None])
@pytest.mark.parametrize(("map_shape", "keys"), [((3, 4), 5), slow((9, 9), 70), slow((5, 13), 16)])
def test_an_array_or_no_bias_equals_the_products(x64, batch, map_shape, keys):
    query, key, value, *_ = make_arguments(map_shape, map_shape, 2, 1, keys)
    bias = [] if batch is None else compare.normal(3, (batch, 2, map_shape[0] * map_shape[1], keys))

    def attend(query, key, value, *bias, implementation):
        bias = bias[0] if bias else None
        return deformable_attention(query, key, value, num_heads=2, bias=bias, implementation=implementation)

    functions = {name: functools.partial(attend, implementation=name) for name in ("triton", "plain")}
    compare.assert_same(functions, functions["plain"], query, key, value, *bias)


def test_gradients_agree_for_keys_on_pixel_centers(x64):
    """On a pixel center the derivative has two limits; all implementations use the same one."""
    query, key, value, points, table = make_arguments((4, 5), (4, 5), 2, 1, 3)
    points[0, 0, :2] = [[0, 0], [3, 4]]
    points[1, 0, :2] = [[0, 4], [3, 0]]
    functions = {"triton": make_attend(2, "triton")}
    compare.assert_same(functions, make_attend(2, "matmul"), query, key, value, points, table)


def test_points_that_are_not_finite_or_far_away():
    """A point that is NaN makes the result of its example NaN. A point far away has no bias."""
    query, key, values, points, table = (np.asarray(x, np.float32) for x in make_arguments((4, 5), (4, 5), 2, 1, 3))
    points[0, 0, 1, 0], points[1, 0, 1] = np.nan, (1e30, -1e30)
    expected = compare.run(make_attend(2, "plain"), query, key, values, points, table)
    actual = compare.run(make_attend(2, "triton"), query, key, values, points, table)
    assert np.isnan(actual[0]).all()
    np.testing.assert_allclose(actual[1], expected[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("map_shape", "keys"), [((6, 5), 7), slow((14, 14), 49)])
def test_bfloat16_is_as_close_as_the_plain_implementation(map_shape, keys):
    """Gradients too: the difference from float32 is at most that of the plain implementation in bfloat16, and a little."""
    full = [np.asarray(x, np.float32) for x in make_arguments(map_shape, map_shape, 4, 2, keys, width=8)]
    compare.assert_close_in_bfloat16(make_attend(4, "triton"), *full, tolerance=4e-2, keep_float32=(3, 4))
    half = [x.astype("bfloat16") for x in full[:3]] + full[3:]
    exact = compare.value_and_gradients(make_attend(4, "plain"), *full)[1:]
    plain, triton = (compare.value_and_gradients(make_attend(4, name), *half)[1:] for name in ("plain", "triton"))
    for index, expected in enumerate(exact):
        errors = [np.abs(x[index].astype(np.float32) - expected).max() for x in (plain, triton)]
        assert triton[index].dtype == plain[index].dtype
        assert errors[1] <= 1.5 * errors[0] + 0.01 * np.abs(expected).max()


@pytest.mark.slow
def test_a_large_map_in_tiles():
    arguments = make_arguments((96, 96), (96, 96), 1, 1, 49, width=1, batch=1)
    arguments = [np.asarray(x, np.float32) for x in arguments]
    expected = compare.value_and_gradients(make_attend(1, "matmul"), *arguments)
    actual = compare.value_and_gradients(make_attend(1, "triton", tile_shape=(48, 96)), *arguments)
    for index, array in enumerate(actual):
        np.testing.assert_allclose(array, expected[index], rtol=1e-3, atol=2e-4 * np.abs(expected[index]).max())


def test_sizes_and_masks_replace_the_kernel():
    arguments = [np.asarray(x, np.float32) for x in make_arguments((6, 7), (6, 7), 2, 1, 5)]
    mask = np.array([[True] * 5, [True, False, True, True, False]])
    for options in (dict(sizes=np.array([[6, 7], [4, 5]])), dict(key_mask=mask)):
        results = [compare.run(make_attend(2, name, **options), *arguments) for name in ("triton", "auto")]
        np.testing.assert_array_equal(*results)
