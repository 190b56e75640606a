"""The exact GELU and GELU before a linear layer: values, and backward passes compared with automatic differentiation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dat_jax.ops.dispatch import compiling_for
from dat_jax.ops.layers.activation import gelu, gelu_linear
from tests.reference import compare


def exact_gelu(x):
    return 0.5 * x * (1 + jax.lax.erf(x / np.sqrt(2)))


@pytest.mark.parametrize("shape", [(), (7,), (2, 3, 4, 5)])
def test_gelu_and_its_gradient_equal_the_definition(x64, shape):
    compare.assert_same({"gelu": gelu}, exact_gelu, *compare.normal(0, shape))


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("features", [3, 9])
@pytest.mark.parametrize("leading", [(5,), (2, 3, 4)])
def test_gelu_linear_and_its_gradients_equal_the_definition(x64, leading, features, platform):
    def definition(x, kernel, bias):
        return exact_gelu(x) @ kernel + jnp.broadcast_to(bias, (*leading, features))

    with compiling_for(platform):
        compare.assert_same(
            {"gelu_linear": gelu_linear}, definition, *compare.normal(0, (*leading, 6), (6, features), (features,))
        )


def test_bfloat16_gives_bfloat16():
    compare.assert_close_in_bfloat16(gelu, *compare.normal(0, (4, 5)), tolerance=0.02)
    compare.assert_close_in_bfloat16(gelu_linear, *compare.normal(0, (4, 5), (5, 3), (3,)), tolerance=0.1)
