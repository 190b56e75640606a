"""Attention as a residual branch: the kernels compared with the plain operations, and with the ops that they consist of."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from dat_jax.ops.attention.branches import (
    deformable_branch,
    deformable_uses_pallas,
    neighborhood_branch,
    neighborhood_uses_pallas,
)
from dat_jax.ops.attention.deformable import deformable_attention
from dat_jax.ops.attention.neighborhood import neighborhood_attention
from dat_jax.ops.layers.normalization import layer_norm
from tests.helpers.tiers import slow
from tests.reference import compare

FACTORS = np.array([0.0, 1.25])  # the first example's branch is dropped


def make_neighborhood(map_shape, kernel_size, heads, width):
    channels, side = heads * width, 2 * kernel_size - 1
    shapes = (channels,), (channels,), (channels, 3 * channels), (3 * channels,), (heads, side, side)
    arrays = compare.normal(0, (2, *map_shape, channels), *shapes, (channels, channels), (channels,))
    arrays[3] /= channels**0.5
    return *arrays, FACTORS


def make_deformable(map_shape, heads, groups, keys, width):
    channels = heads * width
    pairs, table = (2, keys, channels), (heads, *(2 * size - 1 for size in map_shape))
    shapes = (channels,), (channels,), (channels, channels), (channels,), pairs, pairs
    arrays = compare.normal(0, (2, *map_shape, channels), *shapes)
    points = np.random.default_rng(1).uniform(0, np.asarray(map_shape) - 1, (2, groups, keys, 2))
    return *arrays, points, *compare.normal(2, table, (channels, channels), (channels,)), FACTORS


def with_implementation(function, name, **options):
    return functools.partial(function, implementation=name, **options)


@pytest.mark.parametrize(
    ("map_shape", "kernel_size", "heads", "width"), [((5, 4), 3, 2, 3), slow((7, 9), 5, 1, 4), slow((3, 3), 3, 3, 2)]
)
def test_neighborhood_kernel_equals_the_plain_operations(x64, map_shape, kernel_size, heads, width):
    arguments = make_neighborhood(map_shape, kernel_size, heads, width)
    options = dict(kernel_size=kernel_size, num_heads=heads)
    functions = {name: with_implementation(neighborhood_branch, name, **options) for name in ("pallas", "products")}
    compare.assert_same(functions, with_implementation(neighborhood_branch, "plain", **options), *arguments)


@pytest.mark.parametrize(
    ("map_shape", "heads", "groups", "keys", "width"), [((4, 5), 4, 2, 6, 3), slow((7, 1), 3, 3, 9, 2)]
)
def test_deformable_kernel_equals_the_plain_operations(x64, map_shape, heads, groups, keys, width):
    arguments = make_deformable(map_shape, heads, groups, keys, width)
    functions = {name: with_implementation(deformable_branch, name, num_heads=heads) for name in ("pallas", "products")}
    compare.assert_same(functions, with_implementation(deformable_branch, "plain", num_heads=heads), *arguments)


def test_the_kernel_is_not_used_with_a_table_for_another_map():
    arguments = [jnp.asarray(array) for array in make_deformable((4, 5), 4, 2, 6, 3)]
    arguments[8] = jnp.ones((4, 5, 7))  # for a map of 3 x 4
    outputs = [deformable_branch(*arguments, num_heads=4, implementation=name) for name in ("pallas", "products")]
    np.testing.assert_array_equal(*outputs)


def test_a_branch_consists_of_its_parts():
    x, *norm, kernel, bias, table, kernel_out, bias_out, factors = make_neighborhood((5, 4), 3, 2, 3)
    packed = np.asarray(layer_norm(jnp.asarray(x), *norm)) @ kernel + bias
    out = neighborhood_attention(
        *jnp.split(jnp.asarray(packed), 3, axis=-1), jnp.asarray(table), kernel_size=3, num_heads=2
    )
    expected = x + factors.reshape(2, 1, 1, 1) * (np.asarray(out) @ kernel_out + bias_out)
    arguments = (x, *norm, kernel, bias, table, kernel_out, bias_out, factors)
    actual = compare.run(with_implementation(neighborhood_branch, "plain", kernel_size=3, num_heads=2), *arguments)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(actual[0], x[0], rtol=1e-6)

    x, *norm, kernel, bias, key, value, points, table, kernel_out, bias_out, factors = arguments = make_deformable(
        (4, 5), 2, 1, 6, 3
    )
    query = np.asarray(layer_norm(jnp.asarray(x), *norm)) @ kernel + bias
    options = dict(num_heads=2, points_inside=True)
    lookup = dict(points=jnp.asarray(points), table=jnp.asarray(table))
    out = deformable_attention(jnp.asarray(query), jnp.asarray(key), jnp.asarray(value), **lookup, **options)
    expected = x + factors.reshape(2, 1, 1, 1) * (np.asarray(out) @ kernel_out + bias_out)
    actual = compare.run(with_implementation(deformable_branch, "plain", num_heads=2), *arguments)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", ["products", "pallas"])
def test_bfloat16_is_close_to_float32(implementation):
    arguments = [x / 4 if index else x for index, x in enumerate(make_neighborhood((6, 5), 3, 2, 8))]
    branch = with_implementation(neighborhood_branch, implementation, kernel_size=3, num_heads=2)
    compare.assert_close_in_bfloat16(branch, *arguments, tolerance=5e-2, keep_float32=range(1, 9))
    arguments = make_deformable((6, 5), 4, 2, 7, 8)
    arguments = [x / 4 if index and index != 7 else x for index, x in enumerate(arguments)]
    branch = with_implementation(deformable_branch, implementation, num_heads=4)
    compare.assert_close_in_bfloat16(branch, *arguments, tolerance=5e-2, keep_float32=(1, 2, 3, 4, 7, 8, 9, 10, 11))


def test_kernels_are_used_if_requested_and_possible():
    options = dict(kernel_size=7, num_heads=2)
    assert neighborhood_uses_pallas((1, 14, 14, 64), **options, implementation="pallas")
    assert not neighborhood_uses_pallas((1, 14, 14, 64), **options)
    assert not neighborhood_uses_pallas((1, 6, 14, 64), **options, implementation="pallas")
    assert not neighborhood_uses_pallas((1, 100, 100, 64), **options, implementation="pallas")
    assert not neighborhood_uses_pallas((1, 14, 14, 1024), **options, implementation="pallas")
    options = dict(points=(1, 1, 49, 2), num_heads=2)
    fitting = dict(**options, table=(2, 27, 27))
    assert deformable_uses_pallas((1, 14, 14, 64), **fitting, implementation="pallas")
    assert not deformable_uses_pallas((1, 14, 14, 64), **fitting)
    assert not deformable_uses_pallas((1, 14, 13, 64), **fitting, implementation="pallas")
    assert not deformable_uses_pallas((1, 14, 14, 1024), **fitting, implementation="pallas")
