"""The configuration of ``tiny_detection`` with fewer validation images, for processes that a test starts."""

from dat_jax.data import synthetic
from tests.helpers import tiny_detection

IMAGES = 80


def get_config(head: str):
    """Return the configuration of ``tiny_detection``; the validation set of this process has ``IMAGES`` images."""
    synthetic.COUNTS["validation"] = IMAGES
    return tiny_detection.get_config(head)
