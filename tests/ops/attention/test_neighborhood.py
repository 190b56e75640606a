"""Neighborhood attention: cases by hand, comparison with the rule for every pair, and between the algorithms."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dat_jax.ops import dispatch
from dat_jax.ops.attention import neighborhood
from dat_jax.ops.attention.neighborhood import neighborhood_attention
from dat_jax.ops.attention.neighborhood_tiles import window_starts
from dat_jax.ops.cpu import neighborhood_rows
from tests.helpers.tiers import slow
from tests.reference import attention as reference
from tests.reference import compare

NAMES = dispatch.IMPLEMENTATIONS["neighborhood_attention"]


def attend(kernel_size, num_heads, implementation="auto"):
    return functools.partial(
        neighborhood_attention, kernel_size=kernel_size, num_heads=num_heads, implementation=implementation
    )


def make_arguments(map_shape, kernel_size, *, heads, width=2, batch=2):
    maps = (batch, *map_shape, heads * width)
    return compare.normal(0, maps, maps, maps, (heads, 2 * kernel_size - 1, 2 * kernel_size - 1))


@pytest.mark.parametrize("implementation", NAMES)
def test_equal_logits_give_the_mean_of_a_full_window(implementation):
    value = np.broadcast_to(np.arange(5.0)[None, None, :, None], (1, 3, 5, 1))
    zeros, table = np.zeros(value.shape), np.zeros((1, 5, 5))
    out = compare.run(attend(3, 1, implementation), zeros, zeros, value, table)
    np.testing.assert_allclose(out[0, :, :, 0], [[1, 1, 2, 3, 3]] * 3, rtol=1e-6)


@pytest.mark.parametrize("implementation", NAMES)
def test_table_is_read_at_key_minus_query(implementation):
    value = np.arange(9.0).reshape(1, 3, 3, 1)
    zeros, table = np.zeros(value.shape), np.zeros((1, 5, 5))
    table[0, 2 + 1, 2 - 1] = 99.0  # the key below, to the left
    out = compare.run(attend(3, 1, implementation), zeros, zeros, value, table)
    np.testing.assert_allclose(out[0, :, :, 0], [[4, 3, 4], [4, 6, 7], [4, 4, 4]], rtol=1e-6)


@pytest.mark.parametrize("implementation", NAMES)
def test_a_window_of_one_pixel_returns_the_values(implementation):
    query, key, value, table = make_arguments((2, 3), 1, heads=2)
    out = compare.run(attend(1, 2, implementation), query, key, value, table)
    np.testing.assert_allclose(out, value, rtol=1e-6)


@pytest.mark.parametrize(
    ("map_shape", "kernel_size", "heads"),
    [
        slow((1, 1), 1, 1),
        slow((1, 5), 1, 2),
        slow((3, 3), 3, 2),  # one window
        ((3, 9), 3, 1),
        slow((4, 5), 2, 2),
        ((9, 6), 5, 2),  # a side of 9 has two tiles, the last one not full
        slow((8, 17), 7, 1),
        slow((15, 13), 13, 1),  # a window larger than a tile
        ((11, 4), 4, 3),
        slow((23, 3), 3, 1),  # a tile whose halo touches no border
    ],
)
def test_value_and_gradients_equal_the_rule_for_every_pair(x64, map_shape, kernel_size, heads):
    arguments = make_arguments(map_shape, kernel_size, heads=heads)
    functions = {name: attend(kernel_size, heads, name) for name in NAMES}
    expected = functools.partial(reference.neighborhood_attention, kernel_size=kernel_size, num_heads=heads)
    compare.assert_same(functions, expected, *arguments)


@pytest.mark.parametrize("map_shape", [(7, 7), (20, 18)])
def test_auto_equals_plain(x64, map_shape):
    arguments = make_arguments(map_shape, 7, heads=2)
    compare.assert_same({"auto": attend(7, 2, "auto")}, attend(7, 2, "plain"), *arguments)


@pytest.mark.slow
@compare.few_examples(12)
@given(kernel_size=st.integers(1, 5), extra=st.tuples(st.integers(0, 7), st.integers(0, 7)), tile=st.integers(1, 6))
def test_tiles_of_any_side_equal_the_rule(x64, kernel_size, extra, tile):
    map_shape = tuple(kernel_size + more for more in extra)
    arguments = make_arguments(map_shape, kernel_size, heads=1, batch=1)
    expected = functools.partial(reference.neighborhood_attention, kernel_size=kernel_size, num_heads=1)
    with pytest.MonkeyPatch.context() as patch:
        for module in (neighborhood, neighborhood_rows):
            patch.setattr(module, "tile_side", lambda size, *_: min(size, tile))
        functions = {name: attend(kernel_size, 1, name) for name in ("tiles", "rows")}
        compare.assert_same(functions, expected, *arguments)


@pytest.mark.slow
@compare.few_examples(12)
@given(
    kernel_size=st.integers(1, 6), extra=st.tuples(st.integers(0, 9), st.integers(0, 9)), name=st.sampled_from(NAMES)
)
def test_constant_values_give_the_constant(x64, kernel_size, extra, name):
    query, key, value, table = make_arguments(
        tuple(kernel_size + more for more in extra), kernel_size, heads=2, batch=1
    )
    out = compare.run(attend(kernel_size, 2, name), query, key, np.full_like(value, 0.5), table)
    np.testing.assert_allclose(out, 0.5, rtol=1e-12)


@compare.few_examples(100)
@given(size=st.integers(1, 40), kernel_size=st.integers(1, 40))
def test_window_starts_follow_the_rule(size, kernel_size):
    kernel_size = min(size, kernel_size)
    windows = [reference.neighborhood(position, size, kernel_size) for position in range(size)]
    np.testing.assert_array_equal(window_starts(size, kernel_size), [window.start for window in windows])


@pytest.mark.parametrize("map_shape", [(2, 5), (5, 2), (1, 1)])
def test_map_smaller_than_the_window_raises(map_shape):
    maps, table = jnp.zeros((1, *map_shape, 2)), jnp.zeros((1, 5, 5))
    with pytest.raises(
        ValueError, match=f"window of 3 needs map sides of at least 3, got {map_shape[0]} x {map_shape[1]}"
    ):
        neighborhood_attention(maps, maps, maps, table, kernel_size=3, num_heads=1)


@pytest.mark.parametrize("shape", [(2, 5, 5), (1, 3, 5), (5, 5)])
def test_table_of_another_shape_raises(shape):
    maps = jnp.zeros((1, 4, 4, 2))
    with pytest.raises(ValueError, match=rf"expected a table \(1, 5, 5\), got \({shape[0]}, {shape[1]}"):
        neighborhood_attention(maps, maps, maps, jnp.zeros(shape), kernel_size=3, num_heads=1)


def test_unknown_implementation_raises():
    maps, table = jnp.zeros((1, 4, 4, 2)), jnp.zeros((1, 5, 5))
    with pytest.raises(
        ValueError, match="has no implementation 'shifts'; choose one of auto, plain, rows, tiles, dense, gather"
    ):
        attend(3, 1, "shifts")(maps, maps, maps, table)


@pytest.mark.parametrize("implementation", NAMES)
def test_bfloat16_gives_bfloat16(implementation):
    arguments = make_arguments((9, 5), 3, heads=2, width=4)
    compare.assert_close_in_bfloat16(attend(3, 2, implementation), *arguments, tolerance=0.05)
