"""Deformable attention: key grid, key positions, and attention with a position bias."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dat_jax.ops import dispatch
from dat_jax.ops.attention import deformable
from dat_jax.ops.layers.depthwise import depthwise_conv
from tests.helpers.tiers import slow
from tests.reference import attention as reference
from tests.reference import compare, sampling


@pytest.mark.parametrize(
    ("map_shape", "kernel_size", "stride", "expected"),
    [
        ((56, 56), 9, 8, (7, 7)),
        ((14, 19), 5, 2, (7, 10)),
        ((7, 7), 3, 1, (7, 7)),
        ((8, 9), 2, 2, (4, 4)),
        ((1, 5), 3, 1, (1, 5)),
    ],
)
def test_key_grid_by_hand(map_shape, kernel_size, stride, expected):
    assert deformable.key_grid_shape(map_shape, kernel_size=kernel_size, stride=stride) == expected


@compare.few_examples(12)
@given(
    map_shape=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    half=st.integers(0, 4),
    stride=st.integers(1, 8),
)
def test_key_grid_is_the_shape_of_the_convolution(map_shape, half, stride):
    size = 2 * half + 1
    convolve = functools.partial(depthwise_conv, stride=stride, padding=0 if size == stride else half)
    if size == stride and min(map_shape) < size:
        map_shape = tuple(side + size for side in map_shape)
    out = jax.eval_shape(
        functools.partial(convolve, implementation="conv"), jnp.zeros((1, *map_shape, 1)), jnp.zeros((size, size, 1, 1))
    )
    assert deformable.key_grid_shape(map_shape, kernel_size=size, stride=stride) == out.shape[1:3]


def test_reference_points_by_hand():
    points = deformable.reference_points((3, 2))
    np.testing.assert_allclose(points[:, 0, 0], [-0.5, 0.5, 1.5])
    np.testing.assert_allclose(points[0, :, 1], [0, 2])
    np.testing.assert_array_equal(points[:, 0], np.stack([points[:, 0, 0], [0, 0, 0]], axis=-1))
    np.testing.assert_array_equal(deformable.reference_points((1, 1)), [[[0, 0]]])


def test_free_offsets_are_clamped():
    offsets = np.asarray([[-0.25, 0.25], [-0.75, 0.25], [-3.0, -0.5]]).reshape(1, 1, 3, 1, 2)
    positions = compare.run(functools.partial(deformable.key_positions, range_factor=-1), offsets)
    np.testing.assert_allclose(positions[0, 0, :, 0], [[-0.75, 0.25], [-0.25, 0.25], [-1, -0.5]])


def test_bounded_offsets_move_at_most_the_factor_and_are_not_clamped():
    offsets = np.asarray([[0.0, 0.0], [99.0, -99.0], [99.0, 0.0]]).reshape(1, 1, 3, 1, 2)
    positions = compare.run(functools.partial(deformable.key_positions, range_factor=2), offsets)
    np.testing.assert_allclose(positions[0, 0, :, 0], [[-0.5, 0], [1.5, -2], [2.5, 0]])


def test_step_of_bounded_offsets_is_rounded_to_float32(x64):
    offsets = np.full((1, 1, 4, 4, 2), 0.5)
    positions = compare.run(functools.partial(deformable.key_positions, range_factor=2.0), offsets)
    displacements = positions - np.asarray(deformable.reference_points((4, 4), jnp.float64))
    np.testing.assert_allclose(displacements, np.tanh(0.5) * 2 * np.float64(np.float32(1 / 3)), rtol=0, atol=1e-15)


@pytest.mark.parametrize("key_shape", [(1, 1), (1, 4), (3, 2)])
@pytest.mark.parametrize("range_factor", [-1.0, 0.0, 2.0])
def test_positions_equal_the_definition(x64, key_shape, range_factor):
    np.testing.assert_allclose(
        deformable.reference_points(key_shape, jnp.float64), sampling.reference_points(key_shape), atol=1e-15
    )
    (offsets,) = compare.normal(0, (2, 3, *key_shape, 2))
    compare.assert_same(
        {"key_positions": functools.partial(deformable.key_positions, range_factor=range_factor)},
        functools.partial(sampling.key_positions, range_factor=range_factor),
        offsets,
    )


@pytest.mark.parametrize("key_shape", [(1, 1), (1, 4), (3, 2)])
@pytest.mark.parametrize("range_factor", [-1.0, 0.0, 2.0])
def test_positions_of_the_released_form_equal_the_definition(x64, key_shape, range_factor):
    np.testing.assert_allclose(
        deformable.reference_points(key_shape, jnp.float64, form="cvpr2022"),
        sampling.reference_points(key_shape, released=True),
        atol=1e-15,
    )
    (offsets,) = compare.normal(0, (2, 3, *key_shape, 2))
    compare.assert_same(
        {"key_positions": functools.partial(deformable.key_positions, range_factor=range_factor, form="cvpr2022")},
        functools.partial(sampling.released_key_positions, range_factor=range_factor),
        offsets,
    )


def test_positions_of_the_released_form_by_hand():
    points = deformable.reference_points((4, 1), form="cvpr2022")
    np.testing.assert_allclose(points[:, 0], [[-0.75, 0], [-0.25, 0], [0.25, 0], [0.75, 0]])
    offsets = np.asarray([[0.0, 0.0], [99.0, -99.0]]).reshape(1, 1, 2, 1, 2)
    bounded = compare.run(functools.partial(deformable.key_positions, range_factor=2, form="cvpr2022"), offsets)
    np.testing.assert_allclose(bounded[0, 0, :, 0], [[-0.5, 0], [1.5, -2]])
    squashed = compare.run(functools.partial(deformable.key_positions, range_factor=-1, form="cvpr2022"), offsets)
    np.testing.assert_allclose(squashed[0, 0, :, 0], [[np.tanh(-0.5), 0], [1, -1]], rtol=1e-6)


def test_unknown_form_raises():
    with pytest.raises(ValueError, match="'cvpr2023'; choose one of dat_pp, cvpr2022"):
        deformable.key_positions(jnp.zeros((1, 1, 2, 2, 2)), range_factor=2, form="cvpr2023")


@pytest.mark.parametrize("form", deformable.FORMS)
def test_positions_of_float32_offsets_are_float32(form):
    assert deformable.key_positions(jnp.zeros((1, 1, 2, 2, 2)), range_factor=2, form=form).dtype == jnp.float32


def make_arguments(map_shape, table_map, *, heads, groups, keys, width, batch=2):
    channels = heads * width
    sides = (2 * size - 1 for size in table_map)
    shapes = ((batch, *map_shape, channels), (batch, keys, channels), (batch, keys, channels), (heads, *sides))
    query, key, value, table = compare.normal(0, *shapes)
    extent = np.minimum(np.asarray(map_shape) - 1, 1)  # a side of one pixel has all keys at 0
    return query, key, value, compare.random_points(1, (batch, groups, keys), map_shape) * extent, table


def attend(num_heads, implementation="auto", **options):
    def function(query, key, value, points, table):
        return deformable.deformable_attention(
            query, key, value, num_heads=num_heads, points=points, table=table, implementation=implementation, **options
        )

    return function


@pytest.mark.parametrize(
    ("map_shape", "table_map", "heads", "groups", "keys"),
    [
        slow((2, 3), (2, 3), 1, 1, 1),
        ((3, 3), (3, 3), 4, 2, 5),
        slow((4, 2), (4, 2), 3, 3, 4),
        slow((3, 4), (2, 2), 2, 1, 3),
        ((3, 2), (4, 5), 4, 2, 2),
    ],
)
def test_value_and_gradients_equal_the_reference(x64, map_shape, table_map, heads, groups, keys):
    arguments = make_arguments(map_shape, table_map, heads=heads, groups=groups, keys=keys, width=3)
    functions = {name: attend(heads, name) for name in ("auto", "plain")}
    compare.assert_same(functions, functools.partial(reference.deformable_attention, num_heads=heads), *arguments)


@pytest.mark.parametrize("map_shape", [(1, 1), (1, 3), (4, 1)])
@pytest.mark.parametrize("implementation", ["auto", "plain"])
def test_maps_of_one_pixel_equal_the_reference(x64, map_shape, implementation):
    arguments = make_arguments(map_shape, map_shape, heads=2, groups=2, keys=3, width=2)
    expected = compare.run(functools.partial(reference.deformable_attention, num_heads=2), *arguments)
    np.testing.assert_allclose(compare.run(attend(2, implementation), *arguments), expected, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("map_shape", "table_map", "heads", "groups", "tile_shape"),
    [
        ((4, 6), (4, 6), 2, 1, (2, 3)),
        ((5, 7), (5, 7), 4, 2, (2, 3)),  # the last tiles reach over the border
        ((5, 3), (5, 3), 2, 2, (5, 1)),
        ((3, 5), (3, 5), 1, 1, (1, 1)),
        ((5, 4), (3, 2), 2, 1, (3, 3)),
        ((4, 4), (6, 6), 2, 1, (7, 3)),  # a tile higher than the map
    ],
)
def test_tiles_equal_the_whole_map(x64, map_shape, table_map, heads, groups, tile_shape):
    query, key, value, _, table = make_arguments(map_shape, table_map, heads=heads, groups=groups, keys=5, width=2)
    points = compare.random_points(1, (2, groups, 5), map_shape, margin=8.0)  # also far outside
    names = ("slice", "matmul", "gather") if map_shape == table_map else ("matmul", "gather")
    functions = {name: attend(heads, name, tile_shape=tile_shape) for name in names}
    whole = attend(heads, "gather", tile_shape=map_shape)
    compare.assert_same(functions, whole, query, key, value, points, table)


def test_tiles_without_a_bias_equal_the_whole_map(x64):
    query, key, value, *_ = make_arguments((5, 7), (5, 7), heads=2, groups=1, keys=4, width=3)
    whole, tiles = (
        functools.partial(deformable.deformable_attention, num_heads=2, tile_shape=shape) for shape in ((5, 7), (3, 2))
    )
    compare.assert_same({"tiles": tiles}, whole, query, key, value)


def test_large_map_has_no_array_of_all_query_key_pairs():
    """In forward and backward pass: 2 heads x 96 x 160 queries x 600 keys would be 18 million numbers."""
    arguments = make_arguments((96, 160), (14, 14), heads=2, groups=1, keys=600, width=2, batch=1)
    program = jax.make_jaxpr(jax.grad(lambda *a: attend(2)(*a).sum(), argnums=(0, 1, 2, 3, 4)))(*arguments)

    def sizes(jaxpr):
        for equation in jaxpr.eqns:
            yield from (variable.aval.size for variable in equation.outvars)
            for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from sizes(inner)

    array_sizes = list(sizes(program.jaxpr))
    assert len(array_sizes) > 100
    assert max(array_sizes) <= dispatch.MAX_PAIRS


@pytest.mark.parametrize(
    ("map_shape", "pairs", "expected"),
    [
        ((56, 56), 2 * 49, (56, 56)),
        ((200, 336), 2 * 1050, (5, 336)),
        ((3, 2**24), 1, (1, 2**22)),
        ((2, 2), 2**23, (1, 1)),
    ],
)
def test_query_tiles_by_hand(map_shape, pairs, expected):
    assert dispatch.choose_query_tile(map_shape, pairs_per_query=pairs) == expected


@pytest.mark.parametrize("bias_batch", [None, 1, 2])
def test_array_bias_or_no_bias_equals_the_reference(x64, bias_batch):
    arguments = compare.normal(0, (2, 2, 3, 4), (2, 5, 4), (2, 5, 4), *([(bias_batch, 2, 6, 5)] if bias_batch else []))

    def expected(query, key, value, bias=None):
        return reference.attend(query.reshape(2, 6, 4), key, value, num_heads=2, bias=bias).reshape(query.shape)

    def function(query, key, value, bias=None):
        return deformable.deformable_attention(query, key, value, num_heads=2, bias=bias)

    compare.assert_same({"deformable_attention": function}, expected, *arguments)


@pytest.mark.parametrize("kind", ["table", "bias", "none"])
def test_weights_times_values_equal_the_attention(x64, kind):
    query, key, value, points, table = make_arguments((5, 4), (3, 6), heads=4, groups=2, keys=7, width=3)
    (bias,) = compare.normal(2, (2, 4, 20, 7))
    options = {"table": dict(points=points, table=table), "bias": dict(bias=bias), "none": {}}[kind]
    weights = compare.run(
        functools.partial(deformable.deformable_attention_weights, num_heads=4, **options), query, key
    )
    assert weights.shape == (2, 4, 20, 7)
    np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=1e-5)
    expected = compare.run(
        functools.partial(deformable.deformable_attention, num_heads=4, **options), query, key, value
    )
    out = np.einsum("bmqk,bkmd->bqmd", weights, value.reshape(2, 7, 4, 3)).reshape(expected.shape)
    np.testing.assert_allclose(out, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
@compare.few_examples(12)
@given(
    map_shape=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    groups=st.integers(1, 3),
    keys=st.integers(1, 4),
)
def test_constant_values_give_the_constant(x64, map_shape, groups, keys):
    query, key, value, points, table = make_arguments(
        map_shape, map_shape, heads=2 * groups, groups=groups, keys=keys, width=2
    )
    out = compare.run(attend(2 * groups), query, key, np.full_like(value, 0.5), points, table)
    np.testing.assert_allclose(out, 0.5, rtol=1e-12)


@pytest.mark.parametrize("argument_names", [("table",), ("table", "bias"), ("table", "points", "bias")])
def test_table_without_points_or_with_a_bias_raises(argument_names):
    shapes = {"table": (1, 3, 3), "points": (1, 1, 2, 2), "bias": (1, 1, 4, 2)}
    options = {name: jnp.zeros(shapes[name]) for name in argument_names}
    query, keys = jnp.zeros((1, 2, 2, 3)), jnp.zeros((1, 2, 3))
    with pytest.raises(ValueError, match="expected either a table with points, or a bias"):
        deformable.deformable_attention(query, keys, keys, num_heads=1, **options)
    with pytest.raises(ValueError, match="expected either a table with points, or a bias"):
        deformable.deformable_attention_weights(query, keys, num_heads=1, **options)


@pytest.mark.parametrize("implementation", ["auto", "plain"])
def test_bfloat16_gives_bfloat16(implementation):
    arguments = make_arguments((3, 4), (3, 4), heads=4, groups=2, keys=5, width=4)
    compare.assert_close_in_bfloat16(attend(4, implementation), *arguments, tolerance=0.05, keep_float32=(3, 4))
