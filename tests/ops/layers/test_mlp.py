"""The MLP with a convolution: cases by hand, and the kernel compared with the products."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from dat_jax.ops import dispatch
from dat_jax.ops.layers.mlp import conv_mlp, uses_pallas
from dat_jax.ops.layers.normalization import layer_norm
from tests.reference import compare


def make_arguments(map_shape, channels, hidden):
    shapes = (channels, hidden), (hidden,), (3, 3, 1, hidden), (hidden,), (hidden, channels), (channels,)
    return compare.normal(0, (2, *map_shape, channels), *shapes)


@pytest.mark.parametrize("implementation", dispatch.IMPLEMENTATIONS["conv_mlp"])
def test_a_tap_reads_its_neighbor_and_zero_outside(implementation):
    """Sums each pixel and its lower left neighbor. GELU leaves large values unchanged."""
    x = 100 + np.arange(9.0).reshape(1, 3, 3, 1)
    taps, one, zero = np.zeros((3, 3, 1, 1)), np.ones((1, 1)), np.zeros(1)
    taps[2, 0] = 1
    function = functools.partial(conv_mlp, implementation=implementation)
    out = compare.run(function, x, one, zero, taps, zero, one, zero)[0, :, :, 0]
    np.testing.assert_allclose(out, [[100, 204, 206], [103, 210, 212], [106, 107, 108]], rtol=1e-6)


@pytest.mark.parametrize(("map_shape", "channels", "hidden"), [((5, 4), 3, 6), ((3, 7), 4, 256), ((1, 1), 2, 2)])
def test_pallas_equals_the_products(x64, map_shape, channels, hidden):
    arguments = make_arguments(map_shape, channels, hidden)
    plain = functools.partial(conv_mlp, implementation="plain")
    kernel = functools.partial(conv_mlp, implementation="pallas")
    compare.assert_same({"pallas": kernel}, plain, *arguments)


@pytest.mark.parametrize(("map_shape", "channels", "hidden"), [((5, 4), 3, 6), ((3, 7), 4, 256)])
def test_pallas_equals_the_products_as_a_residual_branch(x64, map_shape, channels, hidden):
    """The drop path factor of the first example is zero, so only the residual reaches it."""
    arguments = [*make_arguments(map_shape, channels, hidden), *compare.normal(1, (channels,), (channels,))]
    arguments.append(np.array([0.0, 1.25]))

    def branch(*arguments, implementation):
        norm = dict(zip(("norm_scale", "norm_bias", "factors"), arguments[7:], strict=True))
        return conv_mlp(*arguments[:7], **norm, implementation=implementation)

    plain, kernel = (functools.partial(branch, implementation=name) for name in ("plain", "pallas"))
    compare.assert_same({"pallas": kernel}, plain, *arguments)
    np.testing.assert_array_equal(compare.run(kernel, *arguments)[0], arguments[0][0])
    normalized = layer_norm(jnp.asarray(arguments[0]), *arguments[7:9])
    expected = arguments[0][1] + 1.25 * compare.run(conv_mlp, normalized, *arguments[1:7])[1]
    np.testing.assert_allclose(compare.run(plain, *arguments)[1], expected, rtol=1e-10)


def test_residual_branch_needs_all_of_its_arguments():
    arguments = make_arguments((2, 2), 2, 4)
    with pytest.raises(ValueError, match="all or none of norm_scale, norm_bias and factors"):
        conv_mlp(*arguments, factors=np.ones(2))


def test_bfloat16_is_close_to_float32():
    arguments = make_arguments((4, 5), 8, 32)
    arguments = [x if x.ndim == 4 and x.shape[0] == 2 else x / 4 for x in arguments]
    for implementation in dispatch.IMPLEMENTATIONS["conv_mlp"]:
        function = functools.partial(conv_mlp, implementation=implementation)
        compare.assert_close_in_bfloat16(function, *arguments, tolerance=5e-2)


def test_pallas_is_used_if_requested_and_weights_fit():
    assert uses_pallas((1, 14, 14, 256), 1024, implementation="pallas")
    assert not uses_pallas((1, 14, 14, 256), 1024, implementation="auto")
    assert not uses_pallas((1, 7, 7, 1024), 4096, implementation="pallas")
    assert uses_pallas((1, 200, 334, 64), 256, dtype=jnp.bfloat16, implementation="pallas")
    assert not uses_pallas((1, 200, 4000, 64), 256, implementation="pallas")  # the rows around one row do not fit
