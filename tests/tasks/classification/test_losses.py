"""Losses on soft targets, against formulas."""

import jax.numpy as jnp
import numpy as np

from dat_jax.tasks.classification.objective import binary_cross_entropy


def test_binary_cross_entropy_is_a_mean_over_classes():
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=(5, 3)), rng.uniform(size=(5, 3))
    probabilities = 1 / (1 + np.exp(-logits))
    wanted = -(targets * np.log(probabilities) + (1 - targets) * np.log(1 - probabilities)).mean()
    np.testing.assert_allclose(binary_cross_entropy(jnp.asarray(logits), jnp.asarray(targets)), wanted, rtol=1e-5)
