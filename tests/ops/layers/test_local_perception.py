"""The local perception unit: a case by hand, and the kernel compared with the products."""

import functools

import numpy as np
import pytest

from dat_jax.ops import dispatch
from dat_jax.ops.layers.local_perception import local_perception, uses_pallas
from tests.reference import compare


def perceive(implementation):
    return functools.partial(local_perception, implementation=implementation)


@pytest.mark.parametrize("implementation", dispatch.IMPLEMENTATIONS["local_perception"])
def test_a_tap_reads_its_neighbor_and_zero_outside(implementation):
    x, kernel = np.arange(6.0).reshape(1, 2, 3, 1), np.zeros((3, 3, 1, 1))
    kernel[2, 0] = 10  # the lower left neighbor
    out = compare.run(perceive(implementation), x, kernel, np.full(1, 0.5))[0, :, :, 0]
    np.testing.assert_allclose(out, [[0.5, 31.5, 42.5], [3.5, 4.5, 5.5]], rtol=1e-6)


@pytest.mark.parametrize("shape", [(2, 5, 4, 3), (2, 3, 7, 256), (1, 1, 1, 2)])
def test_pallas_equals_the_products(x64, shape):
    arguments = compare.normal(0, shape, (3, 3, 1, shape[-1]), shape[-1:])
    compare.assert_same({"pallas": perceive("pallas")}, perceive("plain"), *arguments)


@pytest.mark.parametrize("implementation", dispatch.IMPLEMENTATIONS["local_perception"])
def test_bfloat16_is_close_to_float32(implementation):
    arguments = compare.normal(0, (2, 6, 5, 8), (3, 3, 1, 8), (8,))
    compare.assert_close_in_bfloat16(perceive(implementation), *arguments, tolerance=5e-2)


def test_pallas_is_used_if_requested_and_the_map_fits():
    assert uses_pallas((1, 14, 14, 64), implementation="pallas")
    assert not uses_pallas((1, 14, 14, 64))
    assert not uses_pallas((1, 100, 100, 64), implementation="pallas")
