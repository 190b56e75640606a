"""Cases of parametrized tests that `make test` leaves out."""

import pytest


def slow(*values):
    """Return a case that only `make test-all` runs, as the mark does for a whole test."""
    return pytest.param(*values, marks=pytest.mark.slow)
