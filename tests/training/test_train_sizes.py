"""Training images whose size changes during the run."""

import itertools
import json

import jax
import numpy as np
import pytest

from dat_jax.errors import UserError
from dat_jax.training import loop
from dat_jax.training.trainer import Trainer
from tests.helpers import tiny_config


def with_values(**values):
    config = tiny_config.get_config().unlock()
    config.update_from_flattened_dict({"logs": (), "data.image_size": 64, "data.eval_resize": 64, **values})
    return config.lock()


def test_the_run_is_split_into_equal_parts_by_size():
    trainer = Trainer(with_values(steps=8, **{"data.train_sizes": (32, 48, 64)}), devices=jax.devices()[:1])
    batches = list(itertools.islice(trainer.train_batches(start_step=0), 8))
    assert [batch["image"].shape[1] for batch in batches] == [32, 32, 48, 48, 48, 64, 64, 64]
    resumed = next(trainer.train_batches(start_step=5))
    np.testing.assert_array_equal(resumed["image"], batches[5]["image"])
    assert "32 x 32 from step 1, 48 x 48 from step 3, 64 x 64 from step 6" in trainer.describe()["data"]
    assert trainer.task.example_batch(1)["image"].shape == (1, 64, 64, 3)
    assert [batch["image"].shape[1] for batch in trainer.task.train_examples(1)] == [32, 48, 64]


def test_a_run_with_growing_images_evaluates_the_full_size(tmp_path):
    config = with_values(epochs=2, log_every=5, **{"data.train_sizes": (32, 64)})
    metrics = loop.train(config, str(tmp_path / "run"), quiet=True)
    assert metrics["examples"] == 50
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [record["train/loss"] for record in records if "train/loss" in record]
    assert len(losses) >= 4
    assert np.isfinite(losses).all()
    resumed = with_values(epochs=3, log_every=5, **{"data.train_sizes": (32, 64)})
    assert loop.train(resumed, str(tmp_path / "run"), quiet=True)["examples"] == 50


def test_one_other_size_is_used_throughout():
    trainer = Trainer(with_values(**{"data.train_sizes": (48,)}), devices=jax.devices()[:1])
    assert next(trainer.train_batches(start_step=0))["image"].shape[1] == 48
    assert trainer.task.example_batch(1, train=False)["image"].shape[1] == 64


def test_a_derived_batch_has_whole_groups_of_repeated_images():
    config = with_values(batch_size=-1, **{"augmentation.repeats": 3})
    assert Trainer(config, devices=jax.devices()[:1]).config.batch_size == 9
    with pytest.raises(UserError, match=r"must be a multiple of config\.augmentation\.repeats 3, got 16"):
        Trainer(with_values(batch_size=16, **{"augmentation.repeats": 3}))


def test_sizes_that_the_model_cannot_take():
    with pytest.raises(
        UserError, match=r"config\.data\.train_sizes \(16, 64\): .* sides of at least 32 pixels, got \(1, 16, 16, 3\)"
    ):
        Trainer(with_values(**{"data.train_sizes": (16, 64)}), devices=jax.devices()[:1])
    with pytest.raises(UserError, match=r"config\.data\.train_sizes has 2 sizes for 1 steps"):
        Trainer(with_values(steps=1, **{"data.train_sizes": (32, 64)}), devices=jax.devices()[:1])
    with pytest.raises(UserError, match=r"config\.data\.train_sizes must be a tuple of integers of at least 1"):
        Trainer(with_values(**{"data.train_sizes": (0,)}))
