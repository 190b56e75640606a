"""Accuracy over a data set, compared with NumPy."""

import jax.numpy as jnp
import numpy as np

from dat_jax.evaluation.classification import make_evaluator


def make_batches(logits, labels, batch_size):
    for first in range(0, len(labels), batch_size):
        indices = first + np.arange(batch_size)
        clipped = np.minimum(indices, len(labels) - 1)
        yield {"logits": logits[clipped], "label": labels[clipped], "mask": (indices < len(labels)).astype(np.float32)}


def test_metrics_equal_numpy_and_filling_is_not_counted():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(23, 7)).astype(np.float32), rng.integers(0, 7, 23)
    order = np.argsort(-logits, axis=-1)
    log_probabilities = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    evaluate = make_evaluator(lambda variables, batch: {"logits": batch["logits"] * variables})
    for batch_size in (5, 23, 40):
        evaluation = evaluate(jnp.float32(1), make_batches(logits, labels, batch_size))
        metrics = evaluation.metrics
        assert metrics["examples"] == 23
        np.testing.assert_allclose(metrics["top1"], 100 * (order[:, 0] == labels).mean(), rtol=1e-6)
        np.testing.assert_allclose(metrics["top5"], 100 * (order[:, :5] == labels[:, None]).any(axis=-1).mean())
        np.testing.assert_allclose(metrics["loss"], -log_probabilities[np.arange(23), labels].mean(), rtol=1e-5)
        confusion = np.zeros((7, 7), int)
        np.add.at(confusion, (labels, order[:, 0]), 1)
        np.testing.assert_array_equal(evaluation.confusion, confusion)
        np.testing.assert_array_equal(evaluation.per_class["examples"], np.bincount(labels, minlength=7))
        accuracies = [100 * np.mean(order[labels == index, 0] == index) for index in range(7)]
        np.testing.assert_allclose(evaluation.per_class["top1"], accuracies, rtol=1e-6)


def test_constant_logits_have_zero_accuracy():
    evaluate = make_evaluator(lambda variables, batch: {"logits": batch["logits"]})
    metrics = evaluate({}, make_batches(np.zeros((10, 10), np.float32), np.arange(10), 10)).metrics
    assert (metrics["top1"], metrics["top5"]) == (0.0, 0.0)


def test_nan_logits_have_zero_accuracy():
    evaluate = make_evaluator(lambda variables, batch: {"logits": batch["logits"]})
    metrics = evaluate({}, make_batches(np.full((10, 10), np.nan, np.float32), np.arange(10), 10)).metrics
    assert metrics["top1"] == 0.0


def test_predictions_can_be_restricted_to_some_classes():
    logits = np.array([[5.0, 1.0, 0.0, 4.0], [9.0, 0.0, 3.0, 2.0]], np.float32)
    evaluate = make_evaluator(lambda variables, batch: {"logits": batch["logits"]})
    batches = list(make_batches(logits, np.array([3, 3]), 2))
    assert evaluate({}, batches).metrics["top1"] == 0.0
    metrics = evaluate({}, batches, classes=[2, 3]).metrics
    assert (metrics["top1"], metrics["top5"], metrics["examples"]) == (50.0, 100.0, 2)
    expected = -(logits[:, 3] - np.log(np.exp(logits[:, 2:]).sum(axis=-1))).mean()
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)


def test_any_acceptable_class_is_correct_and_examples_without_one_are_not_counted():
    logits = np.eye(4, dtype=np.float32)
    acceptable = np.array([[1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1]], bool)
    evaluate = make_evaluator(lambda variables, batch: {"logits": batch["logits"]})
    batch = {"logits": logits, "label": np.arange(4), "mask": np.array([1, 1, 1, 0], np.float32)}
    evaluation = evaluate({}, [{**batch, "acceptable": acceptable}])
    assert evaluation.metrics == {"top1": 50.0, "examples": 2}
    assert (evaluation.per_class, evaluation.confusion) == ({}, None)


def test_many_classes_have_no_confusion_matrix():
    logits = np.zeros((2, 2001), np.float32)
    logits[[0, 1], [7, 8]] = 1
    evaluate = make_evaluator(lambda variables, batch: {"logits": batch["logits"]})
    evaluation = evaluate({}, make_batches(logits, np.array([7, 7]), 2))
    assert evaluation.confusion is None
    assert (evaluation.per_class["top1"][7], evaluation.per_class["examples"].sum()) == (50, 2)
