"""Interprets kernels in all tests of ops."""

import pytest

from dat_jax.ops import dispatch


@pytest.fixture(autouse=True)
def interpreted_kernels():
    """Interprets Pallas kernels, as there is no TPU or GPU."""
    with dispatch.interpreted_kernels():
        yield
