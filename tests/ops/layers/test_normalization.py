"""LayerNorm: values, and the backward pass compared with automatic differentiation."""

import jax.numpy as jnp
import numpy as np
import pytest

from dat_jax.ops.dispatch import compiling_for
from dat_jax.ops.layers.normalization import layer_norm
from tests.reference import compare


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 16, 3, 6)])
def test_value_and_gradients_equal_the_definition(x64, shape, platform):
    def definition(x, scale, bias):
        mean = x.mean(axis=-1, keepdims=True)
        normalized = (x - mean) / jnp.sqrt(((x - mean) ** 2).mean(axis=-1, keepdims=True) + 1e-5)
        return normalized * jnp.broadcast_to(scale, shape) + jnp.broadcast_to(bias, shape)

    with compiling_for(platform):
        compare.assert_same(
            {"layer_norm": lambda x, scale, bias: layer_norm(x, scale, bias, 1e-5)},
            definition,
            *compare.normal(0, shape, shape[-1:], shape[-1:]),
        )


def test_bfloat16_gives_bfloat16():
    def normalize(x):
        return layer_norm(x, jnp.ones(8), jnp.zeros(8), 1e-5)

    compare.assert_close_in_bfloat16(normalize, *(10 * x for x in compare.normal(0, (4, 8))), tolerance=0.05)


def test_constant_input_gives_the_bias():
    out = layer_norm(jnp.full((2, 4), 3.0), jnp.ones(4), jnp.arange(4.0), 1e-5)
    np.testing.assert_allclose(out, [[0, 1, 2, 3]] * 2, atol=1e-6)
