"""Nearest neighbors of frozen features, against a plain computation, and of a run."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dat_jax.errors import UserError
from dat_jax.evaluation import neighbors
from dat_jax.training import loop
from dat_jax.training.trainer import Trainer
from tests.helpers import tiny_config


def random_features(count, seed):
    features = np.random.default_rng(seed).normal(size=(count, 5)).astype(np.float32)
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def plain_vote(query, features, labels, *, count, classes):
    similarities = features @ query
    nearest = np.argsort(-similarities)[:count]
    weights = np.exp((similarities[nearest] - similarities[nearest[0]]) / 0.07)
    return np.array([weights[labels[nearest] == label].sum() for label in range(classes)])


@pytest.mark.parametrize(("count", "chunk"), [(40, 100), (40, 16), (41, 8), (3, 16)])
def test_votes_are_those_of_the_nearest_features(count, chunk, monkeypatch):
    monkeypatch.setattr(neighbors, "_CHUNK", chunk)
    queries, features = random_features(6, 0), random_features(count, 1)
    labels = np.random.default_rng(2).integers(0, 4, count).astype(np.int32)
    votes = neighbors.vote(jnp.asarray(queries), features, labels, neighbors=7, num_classes=4)
    wanted = [plain_vote(query, features, labels, count=7, classes=4) for query in queries]
    np.testing.assert_allclose(votes, wanted, rtol=1e-4, atol=1e-6)


def test_features_have_length_one_and_padding_is_left_out():
    rng = np.random.default_rng(0)
    batches = [
        {"x": rng.normal(size=(4, 3)), "label": np.arange(4), "mask": np.array([1, 1, 1, 1])},
        {"x": rng.normal(size=(4, 3)), "label": np.arange(4), "mask": np.array([1, 0, 1, 0])},
    ]
    features, labels = neighbors.collect_features(lambda variables, batch: 5 * batch["x"] + variables, 0.0, batches)
    assert labels.tolist() == [0, 1, 2, 3, 0, 2]
    rows = np.concatenate([batches[0]["x"], batches[1]["x"][[0, 2]]])
    np.testing.assert_allclose(features, rows / np.linalg.norm(rows, axis=1, keepdims=True), rtol=1e-5)


@pytest.mark.slow
def test_features_of_a_run_are_evaluated(tmp_path):
    """Of a trained model on halves of noise; a validation image that is also a training image votes for itself."""
    directory = str(tmp_path / "run")
    result = loop.train(tiny_config.get_config(), directory, quiet=True)
    config = tiny_config.get_config().unlock()
    config.eval.neighbors = 5
    metrics = loop.evaluate_neighbors(config.lock(), directory, quiet=True)
    assert list(metrics) == ["knn_top1", "knn_top5", "examples"]
    assert metrics["examples"] == result["examples"] == 50
    assert metrics["knn_top1"] > 90
    trainer = Trainer(config)
    same = Trainer(config, sources=(trainer.task.train_source, trainer.task.train_source))
    config.eval.neighbors = 1
    assert same.evaluate_neighbors(trainer.initialize().eval_variables).metrics["knn_top1"] == 100


def test_damaged_training_images_do_not_vote(tmp_path, monkeypatch, logs):
    """They are not replaced by the next image, as in training, and are logged."""
    rng = np.random.default_rng(0)
    for split, name in itertools.product(("train", "val"), "ab"):
        (tmp_path / split / name).mkdir(parents=True)
        for index in range(2):
            pixels = rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / split / name / f"{index}.png")
    (tmp_path / "train" / "a" / "damaged.png").write_bytes(b"no image")
    config = tiny_config.get_config().unlock()
    config.data.update(name="folders", directory=str(tmp_path))
    config.batch_size, config.mesh.data = 2, 1
    trainer = Trainer(config, devices=jax.devices()[:1])
    embed = lambda variables, batch: batch["image"].mean(axis=(1, 2))  # noqa: E731
    trainer.objective = dataclasses.replace(trainer.objective, embed=embed)
    collected, collect = [], neighbors.collect_features
    monkeypatch.setattr(
        neighbors, "collect_features", lambda *arguments: collected.append(collect(*arguments)) or collected[-1]
    )
    assert trainer.evaluate_neighbors({}).metrics["examples"] == 4
    assert collected[0][1].tolist() == [0, 0, 1, 1]
    assert any("damaged.png" in message and "left out" in message for message in logs)


def test_other_tasks_and_several_processes_are_refused(monkeypatch):
    trainer = Trainer(tiny_config.get_config())
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="for a single process, got 2 processes"):
        trainer.evaluate_neighbors({})
    monkeypatch.undo()
    monkeypatch.setattr(trainer, "objective", trainer.objective.__class__(None, None, None))
    with pytest.raises(UserError, match=r"--mode=knn is for classification, got config\.task"):
        trainer.evaluate_neighbors({})
