"""Position bias: cases by hand, comparison with sampling the table at every pair, and between the algorithms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dat_jax.ops import dispatch
from dat_jax.ops.attention import position_bias
from dat_jax.ops.attention.grid_sample import to_pixels
from tests.helpers.tiers import slow
from tests.reference import compare, sampling

IMPLEMENTATIONS = ("auto", "plain", *dispatch.IMPLEMENTATIONS["position_bias"])
FITTING = ("slice", "matmul", "gather")
ANY_SIZE = ("matmul", "gather")


def lookups(names, map_shape):
    return {
        name: functools.partial(position_bias.table_position_bias, map_shape=map_shape, implementation=name)
        for name in names
    }


def make_table(seed, heads, map_shape):
    (table,) = compare.normal(seed, (heads, *(2 * size - 1 for size in map_shape)))
    return table


def bias_of_keys(table, keys, map_shape, implementation):
    """Bias (H, W, N) of keys (N, 2), for a table of one head."""
    table, points = np.asarray(table)[None], np.asarray(keys)[None, None]
    return compare.run(lookups(IMPLEMENTATIONS, map_shape)[implementation], table, points).reshape(*map_shape, -1)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_keys_of_a_two_by_two_map_by_hand(implementation):
    table = np.arange(1.0, 10.0).reshape(3, 3)  # entry (1, 1), 5.0, has displacement zero
    keys = [(0.0, 0.0), (1.0, 1.0), (0.5, 0.0), (-1.0, 0.0), (-9.0, 0.5), (1e12, -1e12)]
    bias = bias_of_keys(table, keys, (2, 2), implementation)
    np.testing.assert_allclose(bias[..., 0], [[5, 6], [8, 9]])
    np.testing.assert_allclose(bias[..., 1], [[1, 2], [4, 5]])
    np.testing.assert_allclose(bias[..., 2], [[3.5, 4.5], [6.5, 7.5]])
    np.testing.assert_allclose(bias[..., 3], [[8, 9], [0, 0]])  # the lower row is outside the table
    np.testing.assert_allclose(bias[..., 4:], np.zeros((2, 2, 2)))


@pytest.mark.parametrize("implementation", [name for name in IMPLEMENTATIONS if name != "slice"])
def test_table_of_another_map_size_is_stretched(implementation):
    table = np.outer(np.ones(3), [1.0, 2.0, 4.0])  # made for a 2 x 2 map, used for three columns
    bias = bias_of_keys(table, [(0.0, 1.0), (0.0, 0.0)], (2, 3), implementation)
    np.testing.assert_allclose(bias[0, :, 0], [1.5, 2, 3])
    np.testing.assert_allclose(bias[0, :, 1], [2, 3, 4])


@pytest.mark.parametrize("implementation", FITTING)
def test_map_of_one_pixel_has_one_entry(implementation):
    assert bias_of_keys([[3.0]], [(0.0, 0.0)], (1, 1), implementation).item() == 3.0


def test_heads_of_a_group_are_consecutive():
    table = np.arange(1.0, 5.0)[:, None, None] * np.ones((1, 3, 3))
    points = np.asarray([[0.0, 0.0], [-9.0, 0.0]]).reshape(1, 2, 1, 2)  # the second group's key is far away
    bias = compare.run(lookups(["auto"], (2, 2))["auto"], table, points)
    np.testing.assert_array_equal(bias[0, :, 0, 0], [1, 2, 0, 0])


@pytest.mark.parametrize(
    ("map_shape", "table_map", "heads", "groups", "keys", "names"),
    [
        ((2, 2), (2, 2), 2, 1, 3, (*FITTING, "map_coordinates", "auto", "plain")),
        slow((1, 1), (1, 1), 1, 1, 2, FITTING),
        slow((1, 4), (1, 4), 2, 2, 3, FITTING),
        slow((5, 1), (5, 1), 4, 2, 3, FITTING),
        ((3, 5), (3, 5), 6, 3, 4, FITTING),
        ((2, 3), (4, 2), 2, 1, 2, (*ANY_SIZE, "map_coordinates", "auto")),  # one side larger, one smaller
        slow((5, 4), (3, 3), 4, 2, 3, ANY_SIZE),
        slow((3, 3), (7, 5), 2, 2, 5, ANY_SIZE),
        slow((1, 1), (3, 2), 2, 1, 1, ANY_SIZE),
        ((1, 3), (2, 2), 2, 1, 4, ANY_SIZE),
        slow((4, 4), (1, 1), 1, 1, 2, ANY_SIZE),
    ],
)
def test_value_and_gradients_equal_the_definition(x64, map_shape, table_map, heads, groups, keys, names):
    table = make_table(0, heads, table_map)
    points = compare.random_points(1, (2, groups, keys), map_shape)
    extent = np.minimum(np.asarray(map_shape) - 1, 1).reshape(1, 1, 1, 2)  # a side of one pixel has all keys at 0

    def on_map(lookup):
        return lambda table, points: lookup(table, points * extent)

    def reference(table, points):
        return sampling.position_bias(table, sampling.to_normalized(points, map_shape), map_shape)

    functions = {name: on_map(lookup) for name, lookup in lookups(names, map_shape).items()}
    compare.assert_same(functions, reference, table, points)


@pytest.mark.parametrize(("map_shape", "table_map"), [((2, 3), (2, 3)), ((1, 2), (1, 2)), ((3, 3), (2, 4))])
def test_algorithms_agree_on_pixel_lines(x64, map_shape, table_map):
    table = make_table(0, 1, table_map)
    lines = [(y / 2, float(x)) for y in range(-2, 6) for x in range(-2, 5)]
    points = np.asarray(lines)[None, None]
    names = ("slice", "matmul") if map_shape == table_map else ("matmul",)
    compare.assert_same(
        lookups(names, map_shape), lookups(("gather",), map_shape)["gather"], table, points, tolerance=1e-12
    )


@pytest.mark.parametrize("implementation", ["slice", "matmul", "gather"])
def test_gradient_on_pixel_lines_is_the_one_to_the_right_in_the_table(implementation):
    table, keys = np.asarray([[[1.0, 4.0, 9.0]]]), np.asarray([[0.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    lookup = lookups(IMPLEMENTATIONS, (1, 2))[implementation]
    slope = jax.grad(lambda table, points: lookup(table, points)[:, :, 0].sum(), argnums=1)
    slopes = compare.run(slope, table, keys[None, None])
    np.testing.assert_allclose(slopes[0, 0, :, 1], [-5, -3, 9])


@pytest.mark.slow
@compare.few_examples(10)
@given(
    map_shape=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    groups=st.integers(1, 3),
    heads=st.integers(1, 2),
    seed=st.integers(0, 99),
)
def test_slice_equals_matmul(x64, map_shape, groups, heads, seed):
    table = make_table(seed, groups * heads, map_shape)
    points = compare.random_points(seed, (2, groups, 4), map_shape, margin=float(2 * max(map_shape)))
    expected, actual = (compare.run(f, table, points) for f in lookups(("matmul", "slice"), map_shape).values())
    np.testing.assert_allclose(actual, expected, atol=1e-12)


@pytest.mark.slow
@compare.few_examples(10)
@given(
    map_shape=st.tuples(st.integers(1, 6), st.integers(1, 6)), table_map=st.tuples(st.integers(1, 6), st.integers(1, 6))
)
def test_bias_of_a_constant_table_is_constant_for_keys_on_the_map(x64, map_shape, table_map):
    table = np.full((2, *(2 * size - 1 for size in table_map)), 3.0)
    points = compare.random_points(0, (1, 2, 5), map_shape, margin=0.0)
    for name, lookup in lookups(("matmul", "auto"), map_shape).items():
        np.testing.assert_allclose(compare.run(lookup, table, points), 3.0, rtol=1e-12, err_msg=name)


def test_log_displacements_by_hand():
    keys = np.asarray([[0.0, 0.0], [0.25, -0.25], [1.75, -1.75]])[None, None]
    out = compare.run(functools.partial(position_bias.log_displacements, map_shape=(3, 3)), keys)[0, 0]
    np.testing.assert_allclose(out[4], [[0, 0], [-1 / 3, 1 / 3], [-1, 1]], atol=1e-6)
    np.testing.assert_allclose(out[0, 0], [-np.log2(5) / 3, -np.log2(5) / 3], rtol=1e-6)


@pytest.mark.parametrize("map_shape", [(1, 1), (1, 4), (3, 2)])
def test_log_displacements_equal_the_definition(x64, map_shape):
    (positions,) = compare.normal(0, (2, 2, 3, 2))
    compare.assert_same(
        {"log_displacements": functools.partial(position_bias.log_displacements, map_shape=map_shape)},
        functools.partial(sampling.log_displacements, map_shape=map_shape),
        positions,
    )


@pytest.mark.parametrize("shape", [(3, 3, 3), (3, 3)])
def test_table_that_does_not_fit_the_groups_raises(shape):
    with pytest.raises(ValueError, match=r"expected a table .* M a multiple of 2 groups, got \(3, 3"):
        position_bias.table_position_bias(jnp.zeros(shape), jnp.zeros((1, 2, 1, 2)), map_shape=(2, 2))


def test_slice_on_another_map_size_raises():
    with pytest.raises(ValueError, match=r'"slice" expected .* got a table \(3, 3\) for the map \(2, 3\); "matmul"'):
        bias_of_keys(jnp.zeros((3, 3)), jnp.zeros((1, 2)), (2, 3), "slice")


def test_unknown_implementation_raises():
    points = jnp.zeros((1, 1, 1, 2))
    with pytest.raises(
        ValueError, match="position_bias has no implementation 'conv'; choose one of auto, plain, slice"
    ):
        position_bias.table_position_bias(jnp.zeros((1, 3, 3)), points, map_shape=(2, 2), implementation="conv")


@pytest.mark.parametrize("implementation", FITTING)
def test_bias_of_a_bfloat16_table_is_float32(implementation):
    table = make_table(0, 2, (2, 3))
    points = compare.random_points(1, (1, 1, 4), (2, 3))
    lookup = lookups(FITTING, (2, 3))[implementation]
    actual = compare.run(lookup, table.astype(jnp.bfloat16), points)
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, compare.run(lookup, table, points), atol=0.02)


@pytest.mark.parametrize("map_shape", [(3, 5), slow((4, 4)), slow((1, 1)), slow((1, 4)), slow((7, 2))])
@pytest.mark.parametrize("table_map", [(2, 3), slow((4, 4)), slow((1, 5))])
def test_centers_equal_the_definition_in_every_implementation(x64, map_shape, table_map):
    """Queries at half pixels, as in the released DAT v1, on the map size of the table and on others."""
    (positions,) = compare.normal(2, (2, 2, 3, 2))

    def lookup(table, positions, implementation):
        points = to_pixels(positions, table_map)
        options = dict(map_shape=map_shape, query_grid="centers", implementation=implementation)
        return position_bias.table_position_bias(table, points, **options)

    compare.assert_same(
        {name: functools.partial(lookup, implementation=name) for name in IMPLEMENTATIONS},
        functools.partial(sampling.position_bias, map_shape=map_shape, released=True),
        make_table(3, 4, table_map),
        positions,
    )


def test_centers_of_a_map_of_two_by_hand():
    table = np.arange(1.0, 10.0).reshape(1, 3, 3)
    lookup = functools.partial(position_bias.table_position_bias, map_shape=(2, 2), query_grid="centers")
    # Queries are at 0.25 and 0.75 of a table row, the key is at 0.5: a quarter of a row before and after the middle.
    bias = compare.run(lookup, table, np.full((1, 1, 1, 2), 0.5)).reshape(2, 2)
    np.testing.assert_allclose(bias, [[4.0, 4.5], [5.5, 6.0]])


def test_unknown_query_grid_raises():
    with pytest.raises(ValueError, match="'edges'; choose one of corners, centers"):
        position_bias.table_position_bias(
            jnp.zeros((1, 3, 3)), jnp.zeros((1, 1, 1, 2)), map_shape=(2, 2), query_grid="edges"
        )
