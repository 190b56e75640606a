"""LayerNorm with a linear layer: the kernel compared with the two ops."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from dat_jax.ops.layers.norm_linear import MAX_WEIGHTS, concatenated_norm_linear, norm_linear
from dat_jax.ops.layers.normalization import layer_norm
from tests.reference import compare


def make_arguments(channels=3, features=5):
    arrays = (2, 4, 3, channels), (channels,), (channels,), (channels, features), (features,)
    return compare.normal(0, *arrays)


def with_implementation(name):
    return functools.partial(concatenated_norm_linear, implementation=name)


@pytest.mark.parametrize(("channels", "features"), [(3, 5), (8, 2)])
def test_pallas_equals_the_two_ops(x64, channels, features):
    arguments = make_arguments(channels, features)
    functions = {name: with_implementation(name) for name in ("pallas", "products", "auto")}
    compare.assert_same(functions, with_implementation("plain"), *arguments)


@pytest.mark.parametrize("implementation", ["products", "pallas"])
def test_both_results_are_returned(implementation):
    x, scale, shift, kernel, bias = (jnp.asarray(y, jnp.float32) for y in make_arguments())
    normalized, out = norm_linear(x, scale, shift, kernel, bias, implementation=implementation)
    expected = np.asarray(layer_norm(x, scale, shift))
    np.testing.assert_allclose(normalized, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(out, expected @ np.asarray(kernel) + np.asarray(bias), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ["products", "pallas"])
def test_bfloat16_is_close_to_float32(implementation):
    arguments = make_arguments(8, 16)
    compare.assert_close_in_bfloat16(with_implementation(implementation), *arguments, tolerance=6e-2)


def test_kernels_that_do_not_fit_are_run_op_by_op():
    features = MAX_WEIGHTS // 512 + 1
    x, kernel = jnp.ones((1, 1, 1, 512)), jnp.ones((512, features))
    _, out = norm_linear(x, jnp.ones(512), jnp.ones(512), kernel, jnp.zeros(features), implementation="pallas")
    np.testing.assert_allclose(out, 512.0)
