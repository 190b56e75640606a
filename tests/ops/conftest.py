"""Kernels for TPUs are interpreted in the tests of the ops."""

import pytest

from dat_jax.ops import dispatch


@pytest.fixture(autouse=True)
def interpreted_kernels():
    """Of every test here."""
    with dispatch.interpreted_kernels():
        yield
