"""Deformable attention kernels of small maps against the plain products, with both kinds of bias."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from dat_jax.ops.attention.deformable import choose_kernel, deformable_attention
from dat_jax.ops.pallas.deformable import shift_columns
from tests.helpers.tiers import slow
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
        ((4, 5), (4, 5), 4, 2, 6, True),
        ((4, 5), (4, 5), 2, 1, 3, False),  # in rows, since keys may be outside the map
        ((4, 5), (3, 4), 2, 2, 5, True),  # in rows, since the table has another size
        slow((7, 1), (7, 1), 3, 3, 9, True),
        slow((1, 6), (1, 6), 1, 1, 2, True),
        slow((9, 2), (9, 2), 2, 1, 4, True),
    ],
)
def test_table_bias_equals_the_products(x64, map_shape, table_map, heads, groups, keys, inside):
    arguments = make_arguments(map_shape, table_map, heads, groups, keys)

    def attend(query, key, value, points, table, *, implementation):
        options = dict(num_heads=heads, points_inside=inside, implementation=implementation)
        return deformable_attention(query, key, value, points=points, table=table, **options)

    plain = functools.partial(attend, implementation="matmul")
    compare.assert_same({"pallas": functools.partial(attend, implementation="pallas")}, plain, *arguments)


@pytest.mark.parametrize(
    ("table_map", "inside", "expected"), [(24, True, "map"), (24, False, "rows"), (14, True, "rows")]
)
def test_the_kernel_looks_up_every_table(table_map, inside, expected):
    """No array of biases is computed for the kernel: it would be most of the bytes of dat_pp_base_384."""
    shapes = dict(
        key_shape=(2, 144, 512), points_shape=(2, 8, 144, 2), table_shape=(16, 2 * table_map - 1, 2 * table_map - 1)
    )
    kernel = choose_kernel((2, 24, 24, 512), jnp.bfloat16, num_heads=16, points_inside=inside, **shapes)
    assert kernel == expected


def test_gradients_agree_for_keys_on_pixel_centers(x64):
    """On a pixel center the derivative has two limits; all implementations use the same one."""
    query, key, value, points, table = make_arguments((4, 5), (4, 5), 2, 1, 3)
    points[0, 0, :2] = [[0, 0], [3, 4]]
    points[1, 0, :2] = [[0, 4], [3, 0]]

    def attend(*arguments, implementation):
        query, key, value, points, table = arguments
        options = dict(num_heads=2, points_inside=True, implementation=implementation)
        return deformable_attention(query, key, value, points=points, table=table, **options)

    functions = {name: functools.partial(attend, implementation=name) for name in ("pallas", "matmul")}
    compare.assert_same(functions, functions["matmul"], query, key, value, points, table)


@pytest.mark.parametrize("batch", [1, 2, None])
def test_array_bias_or_no_bias_equals_the_products(x64, batch):
    query, key, value, *_ = make_arguments((3, 4), (3, 4), 2, 1, 5)
    bias = [] if batch is None else compare.normal(3, (batch, 2, 12, 5))

    def attend(query, key, value, *bias, implementation):
        bias = bias[0] if bias else None
        return deformable_attention(query, key, value, num_heads=2, bias=bias, implementation=implementation)

    plain = functools.partial(attend, implementation="plain")
    compare.assert_same({"pallas": functools.partial(attend, implementation="pallas")}, plain, query, key, value, *bias)


def test_bfloat16_is_close_to_float32():
    arguments = make_arguments((6, 5), (6, 5), 4, 2, 7, width=8)

    def attend(query, key, value, points, table):
        options = dict(num_heads=4, points_inside=True, implementation="pallas")
        return deformable_attention(query, key, value, points=points, table=table, **options)

    compare.assert_close_in_bfloat16(attend, *arguments, tolerance=3e-2, keep_float32=(3, 4))


def test_shift_columns_by_hand():
    table = np.arange(15.0).reshape(1, 5, 3)  # of a map of 3 x 2
    shifted = np.asarray(shift_columns(table)).reshape(3, 7, 2)
    np.testing.assert_array_equal(shifted[0, :5, 0], table[0, :, 2])  # a key to the left of the map
    np.testing.assert_array_equal(shifted[1, :5], table[0, :, 1:])  # in the first column
    np.testing.assert_array_equal(shifted[2, :5], table[0, :, :2])  # in the last
    for outside in (shifted[:, 5:], shifted[0, :, 1]):
        np.testing.assert_array_equal(outside, 0)
