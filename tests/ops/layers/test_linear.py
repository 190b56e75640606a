"""The linear layer and its backward pass, compared with automatic differentiation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dat_jax.ops.dispatch import compiling_for
from dat_jax.ops.layers.linear import linear


@pytest.mark.parametrize("features", [3, 7, 20])
@pytest.mark.parametrize("leading", [(), (5,), (2, 5), (2, 3, 4)])
def test_value_and_gradients_equal_those_of_a_product(x64, leading, features):
    rng = np.random.default_rng(0)
    x, kernel, bias = (jnp.asarray(rng.normal(size=shape)) for shape in ((*leading, 7), (7, features), (features,)))
    gradient = jnp.asarray(rng.normal(size=(*leading, features)))
    expected, expected_backward = jax.vjp(
        lambda x, kernel, bias: x @ kernel + jnp.broadcast_to(bias, (*leading, features)), x, kernel, bias
    )
    for platform in ("cpu", "tpu"):
        with compiling_for(platform):
            out, backward = jax.vjp(linear, x, kernel, bias)
            actual = (out, *backward(gradient))
        for actual_array, expected_array in zip(actual, (expected, *expected_backward(gradient)), strict=True):
            assert actual_array.shape == expected_array.shape
            assert actual_array.dtype == expected_array.dtype
            np.testing.assert_allclose(actual_array, expected_array, rtol=1e-12, atol=1e-12)


def test_bfloat16_gives_bfloat16():
    arguments = (jnp.ones((2, 3, 4), jnp.bfloat16), jnp.ones((4, 5), jnp.bfloat16), jnp.ones(5, jnp.bfloat16))
    out, backward = jax.vjp(linear, *arguments)
    assert {leaf.dtype for leaf in (out, *backward(out))} == {jnp.dtype(jnp.bfloat16)}
