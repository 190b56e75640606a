"""Kernels that process a map in spans of rows, compared with the plain algorithms: values and gradients of all arguments."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from dat_jax.ops import dispatch
from dat_jax.ops.attention import deformable, neighborhood
from dat_jax.ops.attention.deformable import deformable_attention
from dat_jax.ops.attention.neighborhood import neighborhood_attention
from dat_jax.ops.layers import mlp
from dat_jax.ops.layers.mlp import conv_mlp
from dat_jax.ops.pallas import deformable as pallas_deformable
from dat_jax.ops.pallas import deformable_rows, mlp_spans, neighborhood_spans
from dat_jax.ops.pallas import neighborhood as pallas_neighborhood
from tests.helpers.tiers import slow
from tests.reference import compare

# Largest difference of a result or gradient from the plain algorithm in float32, relative to its largest value.
TOLERANCES = {"float32": 3e-5, "bfloat16": 0.03}
BLOCK_ROWS = 8  # at most, so that small maps have several blocks

# (map, window, heads)
NEIGHBORHOOD = [
    ((9, 20), 3, 2),
    ((13, 17), 7, 1),
    *(
        slow(*case)
        for case in (
            ((1, 1), 1, 1),
            ((1, 40), 1, 2),
            ((40, 1), 1, 1),
            ((3, 3), 3, 1),
            ((7, 7), 7, 2),
            ((7, 50), 7, 1),
            ((50, 7), 7, 1),
            ((8, 8), 7, 3),
            ((10, 37), 5, 1),
            ((16, 16), 5, 2),
            ((17, 33), 4, 1),
            ((23, 40), 7, 2),
            ((24, 24), 7, 1),
            ((25, 42), 7, 1),
            ((31, 16), 2, 1),
            ((32, 48), 7, 1),
            ((33, 15), 9, 1),
            ((48, 48), 7, 1),
            ((57, 19), 9, 1),
            ((96, 96), 7, 1),
            ((200, 336), 7, 1),
        )
    ),
]
# (map, map of the table, heads, groups, keys, query grid, whether all keys are inside the map)
DEFORMABLE = [
    ((7, 12), (4, 5), 2, 1, 6, "corners", True),
    *(
        slow(*case)
        for case in (
            ((6, 7), (5, 4), 2, 2, 5, "centers", False),
            ((1, 1), (1, 1), 1, 1, 1, "corners", True),
            ((1, 9), (3, 5), 1, 1, 3, "corners", True),
            ((9, 1), (5, 3), 2, 1, 2, "corners", False),
            ((2, 3), (7, 9), 2, 2, 3, "corners", True),
            ((6, 9), (6, 9), 4, 2, 5, "corners", True),
            ((9, 6), (9, 6), 2, 1, 7, "corners", False),
            ((9, 13), (4, 6), 2, 1, 4, "corners", False),
            ((9, 5), (12, 14), 2, 2, 4, "corners", True),
            ((10, 10), (5, 5), 2, 1, 9, "centers", True),
            ((14, 14), (14, 14), 4, 4, 9, "corners", True),
            ((16, 24), (12, 12), 2, 1, 16, "corners", True),
            ((17, 11), (12, 12), 2, 2, 8, "centers", False),
            ((25, 42), (7, 7), 2, 1, 20, "corners", True),
            ((28, 28), (28, 28), 2, 2, 10, "corners", True),
            ((33, 31), (56, 56), 1, 1, 5, "corners", True),
            ((48, 48), (28, 28), 1, 1, 12, "corners", True),
            ((50, 84), (14, 14), 2, 1, 10, "corners", True),
            ((96, 96), (56, 56), 2, 1, 12, "corners", True),
            ((200, 336), (56, 56), 1, 1, 6, "corners", True),
        )
    ),
]
# (map, channels, hidden channels)
MLP = [
    ((11, 8), 3, 6),
    *(
        slow(*case)
        for case in (
            ((9, 5), 3, 256),
            ((1, 1), 2, 4),
            ((1, 20), 2, 4),
            ((20, 1), 2, 4),
            ((1, 3), 2, 4),
            ((2, 2), 4, 8),
            ((3, 16), 4, 8),
            ((7, 7), 4, 128),
            ((8, 32), 2, 6),
            ((13, 16), 2, 8),
            ((16, 16), 4, 16),
            ((17, 9), 4, 16),
            ((25, 42), 4, 16),
            ((31, 24), 4, 256),
            ((40, 3), 4, 16),
            ((48, 48), 4, 16),
            ((50, 84), 4, 16),
            ((57, 19), 4, 16),
            ((96, 96), 8, 32),
            ((200, 336), 4, 16),
        )
    ),
]


@pytest.fixture(autouse=True)
def spans(monkeypatch):
    """Kernels of whole maps are not used, and blocks are small."""
    monkeypatch.setattr(pallas_neighborhood, "MAX_UNROLLED_PIXELS", 0)
    monkeypatch.setattr(pallas_deformable, "MAX_UNROLLED_PIXELS", 0)
    monkeypatch.setattr(mlp, "MAX_UNROLLED_PIXELS", 0)
    monkeypatch.setattr(neighborhood_spans, "_MAX_ROWS", BLOCK_ROWS)
    monkeypatch.setattr(deformable_rows, "_BLOCK_PIXELS", 60)
    monkeypatch.setattr(mlp_spans, "_BLOCK_PIXELS", 100)
    neighborhood_spans.choose_tiling.cache_clear()
    yield
    neighborhood_spans.choose_tiling.cache_clear()


def make_neighborhood(map_shape, kernel_size, heads, *, width=4):
    maps, side = (2, *map_shape, heads * width), 2 * kernel_size - 1
    attend = functools.partial(neighborhood_attention, kernel_size=kernel_size, num_heads=heads)
    return attend, compare.normal(0, maps, maps, maps, (heads, side, side))


def make_deformable(map_shape, table_map, heads, groups, keys, grid, inside, *, width=4):
    rng, channels = np.random.default_rng(1), heads * width
    margin = 0.0 if inside else 5.0
    extent = np.asarray(map_shape if grid == "corners" else table_map) - 1
    points = rng.uniform(-margin, extent + margin, (2, groups, keys, 2))
    shapes = (2, *map_shape, channels), (2, keys, channels), (2, keys, channels)
    *arrays, table = compare.normal(0, *shapes, (heads, *(2 * size - 1 for size in table_map)))

    def attend(query, key, value, points, table, *, implementation):
        options = dict(num_heads=heads, points_inside=inside, query_grid=grid)
        if implementation == "plain":  # whose lookup is the gather, slow to compile
            implementation = "matmul"
        return deformable_attention(
            query, key, value, points=points, table=table, implementation=implementation, **options
        )

    return attend, [*arrays, points, table]


def make_mlp(map_shape, channels, hidden):
    shapes = (channels, hidden), (hidden,), (3, 3, 1, hidden), (hidden,), (hidden, channels), (channels,)
    x, *parameters = compare.normal(0, (2, *map_shape, channels), *shapes)
    return conv_mlp, [x, *(y / np.sqrt(max(1, y.shape[0] if y.ndim == 2 else 1)) for y in parameters)]


def assert_close(function, arguments, *, rounded, dtype, mean=0.0):
    """Compares "pallas" with "plain" in float32, for arguments that are numbers of a dtype.

    The gradients are those of a weighted sum of the result, with weights around ``mean``.
    """
    arguments = [
        np.asarray(x, np.float32).astype(dtype if index < rounded else np.float32) for index, x in enumerate(arguments)
    ]

    def differentiate(implementation, arguments):
        def loss(*arguments):
            out = function(*arguments, implementation=implementation).astype(jnp.float32)
            weights = mean + jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
            return (out * weights).sum(), out

        differentiated = jax.value_and_grad(loss, argnums=tuple(range(len(arguments))), has_aux=True)
        (_, out), gradients = jax.jit(differentiated, compiler_options=compare.compiler_options())(*arguments)
        return out, *gradients

    actual = differentiate("pallas", arguments)
    expected = differentiate("plain", [np.asarray(x, np.float32) for x in arguments])
    for index, (x, y) in enumerate(zip(actual, expected, strict=True)):
        x, y = np.asarray(x, np.float32), np.asarray(y)
        error = np.abs(x - y).max() / max(np.abs(y).max(), 1e-3)
        assert error < TOLERANCES[dtype], (index, error)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("map_shape", "kernel_size", "heads"), NEIGHBORHOOD)
def test_neighborhood_attention(map_shape, kernel_size, heads, dtype):
    attend, arguments = make_neighborhood(map_shape, kernel_size, heads)
    assert neighborhood.fits_kernel(arguments[0].shape, dtype, kernel_size=kernel_size, num_heads=heads)
    assert_close(attend, arguments, rounded=3, dtype=dtype)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("map_shape", "table_map", "heads", "groups", "keys", "grid", "inside"), DEFORMABLE)
def test_deformable_attention(map_shape, table_map, heads, groups, keys, grid, inside, dtype):
    attend, arguments = make_deformable(map_shape, table_map, heads, groups, keys, grid, inside)
    assert_close(attend, arguments, rounded=3, dtype=dtype)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("map_shape", "channels", "hidden"), MLP)
def test_mlp(map_shape, channels, hidden, dtype):
    function, arguments = make_mlp(map_shape, channels, hidden)
    # The gradient of the last bias is the sum of the weights. With a mean of 0 they cancel.
    assert_close(function, arguments, rounded=1, dtype=dtype, mean=1.0)


def test_neighborhood_attention_is_exact_in_float64(x64):
    attend, arguments = make_neighborhood((17, 20), 7, 2, width=2)
    plain, kernel = (functools.partial(attend, implementation=name) for name in ("plain", "pallas"))
    compare.assert_same({"pallas": kernel}, plain, *arguments)


@pytest.mark.parametrize("on_centers", [False, slow(True)])
def test_deformable_attention_is_exact_in_float64(x64, on_centers):
    """On pixel centers the derivative has two limits; all implementations use the same one."""
    size = (9, 5) if on_centers else (4, 6)
    attend, arguments = make_deformable((9, 5), size, 2, 1, 3, "corners", True, width=2)
    if on_centers:
        arguments[3] = np.round(arguments[3])
    plain, kernel = (functools.partial(attend, implementation=name) for name in ("plain", "pallas"))
    compare.assert_same({"pallas": kernel}, plain, *arguments)


def test_mlp_is_exact_in_float64(x64):
    function, arguments = make_mlp((11, 6), 2, 4)
    plain, kernel = (functools.partial(function, implementation=name) for name in ("plain", "pallas"))
    compare.assert_same({"pallas": kernel}, plain, *arguments)


def test_deformable_attention_without_a_bias(x64):
    _, (query, key, value, *_) = make_deformable((7, 9), (1, 1), 2, 1, 4, "corners", True)
    plain, kernel = (
        functools.partial(deformable_attention, num_heads=2, implementation=name) for name in ("plain", "pallas")
    )
    compare.assert_same({"pallas": kernel}, plain, query, key, value)


@pytest.mark.parametrize("make", [make_neighborhood, slow(make_deformable), slow(make_mlp)])
def test_an_example_does_not_depend_on_the_one_before_it(make):
    """What a kernel carries from step to step is of one example."""
    case = {
        make_neighborhood: ((10, 20), 5, 1),
        make_deformable: ((7, 12), (4, 5), 2, 1, 6, "corners", True),
        make_mlp: ((11, 8), 3, 6),
    }[make]
    function, arguments = make(*case)
    arguments = [np.asarray(x, np.float32) for x in arguments]

    def run(x):
        value, pull = jax.vjp(lambda x: function(x, *arguments[1:], implementation="pallas"), x)
        return value[1], pull(jnp.ones_like(value))[0][1]

    x = arguments[0]
    spoiled = x.copy()
    spoiled[0] = np.nan
    for actual, expected in zip(jax.jit(run)(spoiled), jax.jit(run)(x), strict=True):
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.slow
def test_a_mesh_of_devices_gives_the_result_of_one_device():
    attend, arguments = make_neighborhood((9, 20), 3, 1)
    arguments = [np.asarray(x, np.float32) for x in arguments]

    def loss(*arguments):
        return (attend(*arguments, implementation="pallas") ** 2).sum()

    expected = jax.jit(lambda *a: jax.value_and_grad(loss, argnums=(0, 1, 2, 3))(*a))(*arguments)
    mesh = jax.make_mesh((2,), ("a",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    with dispatch.split_batch(mesh, ("a",)):
        actual = jax.jit(lambda *a: jax.value_and_grad(loss, argnums=(0, 1, 2, 3))(*a))(*arguments)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)


def test_sizes_use_another_implementation():
    attend, arguments = make_neighborhood((9, 20), 3, 1)
    sizes = np.asarray([[9, 20], [5, 7]], np.int32)
    names = ("pallas", "auto")
    actual, expected = (
        compare.run(functools.partial(attend, sizes=sizes, implementation=n), *arguments) for n in names
    )
    np.testing.assert_array_equal(actual, expected)


def test_large_maps_have_kernels(monkeypatch):
    """The maps of classifiers at 384 pixels and of detectors at 800 x 1344."""
    monkeypatch.undo()  # kernels of whole maps too
    neighborhood_spans.choose_tiling.cache_clear()
    for height, width, channels, heads, keys, side in (
        (96, 96, 128, 4, 144, 56),
        (200, 336, 64, 2, 1050, 56),
        (200, 336, 128, 4, 1050, 56),
        (100, 168, 128, 4, 1050, 28),
        (100, 168, 256, 8, 1050, 28),
    ):
        shape, dtype = (2, height, width, channels), jnp.bfloat16
        assert neighborhood.fits_kernel(shape, dtype, kernel_size=7, num_heads=heads)
        assert mlp.fits_kernel(shape, 4 * channels, dtype=dtype)
        tables = dict(points_shape=(2, heads // 2, keys, 2), table_shape=(heads, 2 * side - 1, 2 * side - 1))
        kernel = deformable.choose_kernel(
            shape, dtype, key_shape=(2, keys, channels), num_heads=heads, points_inside=True, **tables
        )
        assert kernel == "rows"


def test_calls_without_a_kernel_use_auto():
    shape = (1, 200, 336, 65536)
    assert not neighborhood.fits_kernel(shape, jnp.float32, kernel_size=7, num_heads=2)
    assert not deformable.fits_kernel(shape, jnp.float32, key_shape=(1, 1050, 65536), num_heads=2)
    assert not deformable.fits_kernel(
        (1, 96, 96, 64), jnp.float32, key_shape=(1, 9, 64), bias_shape=(1, 2, 9216, 9), num_heads=2
    )
