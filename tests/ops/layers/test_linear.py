"""The linear layer and its backward pass against JAX's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dat_jax.ops.dispatch import compiling_for
from dat_jax.ops.layers import linear


@pytest.mark.parametrize("features", [3, 7, 20])
@pytest.mark.parametrize("leading", [(), (5,), (2, 5), (2, 3, 4)])
def test_the_layer_and_its_gradients_are_those_of_a_product(x64, leading, features):
    rng = np.random.default_rng(0)
    x, kernel, bias = (jnp.asarray(rng.normal(size=shape)) for shape in ((*leading, 7), (7, features), (features,)))
    gradient = jnp.asarray(rng.normal(size=(*leading, features)))
    wanted, wanted_backward = jax.vjp(
        lambda x, kernel, bias: x @ kernel + jnp.broadcast_to(bias, (*leading, features)), x, kernel, bias
    )
    for platform in ("cpu", "tpu"):
        with compiling_for(platform):
            out, backward = jax.vjp(linear.linear, x, kernel, bias)
            got = (out, *backward(gradient))
        for one, other in zip(got, (wanted, *wanted_backward(gradient)), strict=True):
            assert one.shape == other.shape
            assert one.dtype == other.dtype
            np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-12)


def test_a_narrow_dtype_stays():
    arguments = (jnp.ones((2, 3, 4), jnp.bfloat16), jnp.ones((4, 5), jnp.bfloat16), jnp.ones(5, jnp.bfloat16))
    out, backward = jax.vjp(linear.linear, *arguments)
    assert {leaf.dtype for leaf in (out, *backward(out))} == {jnp.dtype(jnp.bfloat16)}
