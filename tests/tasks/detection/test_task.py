"""Losses of detectors for images without objects, and with degenerate boxes."""

import jax
import numpy as np
import pytest

from dat_jax.training.trainer import Trainer
from tests.helpers import tiny_detection


@pytest.mark.slow
@pytest.mark.parametrize("head", tiny_detection.DETECTORS)
def test_losses_and_gradients_are_finite_without_objects_and_with_degenerate_boxes(head):
    config = tiny_detection.get_config(head).unlock()
    config.mesh.data = config.mesh.fsdp = 1
    trainer = Trainer(config, devices=jax.devices()[:1])
    state = trainer.initialize()
    batch = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), trainer.task.example_batch(2))
    batch["valid"][:] = [[64, 64], [40, 33]]
    batch["boxes"][:] = np.nan

    @jax.jit
    def losses(batch):
        def loss(params):
            value, metrics, _ = trainer.objective.loss(
                {"params": params, **state.model_state}, batch, jax.random.key(0)
            )
            return value, metrics

        (_, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(state.params)
        return metrics, gradients

    def check():
        metrics, gradients = losses(batch)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((metrics, gradients)))
        return metrics

    metrics = check()
    assert all(value == 0 for name, value in metrics.items() if "box_loss" in name or "mask_loss" in name)
    # A box without area, a box outside the image, and later a box that covers the image.
    batch["box_mask"][1] = True
    batch["boxes"][1] = [[5, 5, 5, 30], [50, 50, 60, 60]]
    check()
    batch["boxes"][1, 0] = [0, 0, 33, 40]
    metrics = check()
    assert sum(value > 0 for name, value in metrics.items() if "box_loss" in name) > 0
