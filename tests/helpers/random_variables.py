"""Random variables without the initialization of the model, which takes long to compile."""

import jax
import numpy as np


def random_variables(model, images, *, seed: int = 0, scale: float = 0.2):
    """Draw normal numbers for every parameter, around one for scales of normalization layers."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        center = 1.0 if "scale" in jax.tree_util.keystr(path[-1:]) else 0.0
        return (center + scale * rng.standard_normal(leaf.shape)).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)
