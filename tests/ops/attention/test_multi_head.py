"""Multi-head attention: cases by hand, and comparison with one head at a time."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from dat_jax.ops.attention.multi_head import multi_head_attention, softmax, split_heads
from tests.reference import attention as reference
from tests.reference import compare


def attend(query, key, value, **options):
    return compare.run(functools.partial(multi_head_attention, num_heads=1, **options), query, key, value)


def test_equal_logits_give_the_mean():
    value = np.asarray([[1.0, 2.0], [3.0, 6.0]])
    np.testing.assert_allclose(attend(np.zeros((1, 2)), np.ones((2, 2)), value), [[2, 4]], rtol=1e-6)


def test_logits_are_scaled_by_the_square_root_of_the_head_width():
    query = np.asarray([[np.log(3.0), 0.0, 0.0, 0.0]]) * 2
    key = np.asarray([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]])  # logits log 3 and 0
    value = np.asarray([[4.0] * 4, [8.0] * 4])
    np.testing.assert_allclose(attend(query, key, value), [[5] * 4], rtol=1e-6)


def test_bias_is_added_to_the_logits_and_minus_infinity_masks():
    query, key, value = np.zeros((3, 1)), np.ones((2, 1)), np.asarray([[4.0], [8.0]])
    bias = jnp.asarray([[[np.log(3.0), 0.0], [-np.inf, 0.0], [0.0, -np.inf]]], jnp.float32)
    np.testing.assert_allclose(attend(query, key, value, bias=bias), [[5], [8], [4]], rtol=1e-6)


def test_heads_are_consecutive_channels():
    x = jnp.arange(6).reshape(1, 6)
    np.testing.assert_array_equal(split_heads(x, 3), [[[0, 1], [2, 3], [4, 5]]])


@pytest.mark.parametrize(
    ("queries", "keys", "channels", "heads", "bias_shape"),
    [
        (1, 1, 1, 1, None),
        (3, 5, 4, 1, (2, 1, 3, 5)),
        (4, 2, 6, 3, (1, 3, 4, 2)),
        (5, 5, 8, 2, (2, 2, 5, 5)),
        (2, 7, 6, 6, None),
    ],
)
def test_value_and_gradients_equal_the_reference(x64, queries, keys, channels, heads, bias_shape):
    arguments = compare.normal(
        0, (2, queries, channels), (2, keys, channels), (2, keys, channels), *filter(None, [bias_shape])
    )

    def compute(function):
        return lambda q, k, v, bias=None: function(q, k, v, num_heads=heads, bias=bias)

    functions = {"multi_head_attention": compute(multi_head_attention)}
    compare.assert_same(functions, compute(reference.attend), *arguments)


def test_leading_axes_are_batch_axes(x64):
    arguments = compare.normal(0, (2, 3, 4, 6), (2, 3, 5, 6), (2, 3, 5, 6), (1, 3, 2, 4, 5))

    def compute(q, k, v, bias):
        return multi_head_attention(q, k, v, num_heads=2, bias=bias)

    def one_by_one(q, k, v, bias):
        outs = [[compute(q[i, j], k[i, j], v[i, j], bias[0, j]) for j in range(3)] for i in range(2)]
        return jnp.stack([jnp.stack(row) for row in outs])

    compare.assert_same({"batched": compute}, one_by_one, *arguments)


def test_channels_that_cannot_be_split_raise():
    with pytest.raises(ValueError, match="6 channels cannot be split into 4 heads"):
        split_heads(jnp.zeros((2, 6)), 4)
    with pytest.raises(ValueError, match="3 channels cannot be split into 2 heads"):
        multi_head_attention(*[jnp.zeros((1, 2, 3))] * 3, num_heads=2)


def test_softmax_of_bfloat16_is_float32():
    weights = softmax(jnp.asarray([[0.0, 1.0, 300.0]], jnp.bfloat16))
    assert weights.dtype == jnp.float32
    np.testing.assert_allclose(weights, [[0, 0, 1]])


def test_bfloat16_gives_bfloat16():
    arguments = compare.normal(0, (2, 4, 8), (2, 5, 8), (2, 5, 8))
    compare.assert_close_in_bfloat16(functools.partial(multi_head_attention, num_heads=2), *arguments, tolerance=0.03)
