"""A classifier that compiles in seconds."""

import numpy as np

from dat_jax.models.registry import create_model
from tests.helpers import tiny_segmentation
from tests.helpers.random_variables import random_variables


def random_classifier(*, scale: float = 0.4, **settings):
    """Make a model of five classes and random variables whose predicted classes differ between images."""
    model = create_model("dat_pp_nano", **{"num_classes": 5, **tiny_segmentation.BACKBONE, **settings})
    images = np.zeros((1, 64, 64, model.in_channels), np.float32)
    return model, random_variables(model, images, scale=scale)
