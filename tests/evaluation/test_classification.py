"""Accuracy over a data set, against counting by hand."""

import jax.numpy as jnp
import numpy as np

from dat_jax.evaluation.classification import make_evaluator


def make_batches(logits, labels, batch_size):
    for first in range(0, len(labels), batch_size):
        indices = first + np.arange(batch_size)
        kept = np.minimum(indices, len(labels) - 1)
        yield {"logits": logits[kept], "label": labels[kept], "mask": (indices < len(labels)).astype(np.float32)}


def test_metrics_are_those_counted_by_hand_and_filling_does_not_count():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(23, 7)).astype(np.float32), rng.integers(0, 7, 23)
    order = np.argsort(-logits, axis=-1)
    log_probabilities = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    evaluate = make_evaluator(lambda variables, batch: {"logits": batch["logits"] * variables})
    for batch_size in (5, 23, 40):
        metrics = evaluate(jnp.float32(1), make_batches(logits, labels, batch_size))
        assert metrics["examples"] == 23
        np.testing.assert_allclose(metrics["top1"], 100 * (order[:, 0] == labels).mean(), rtol=1e-6)
        np.testing.assert_allclose(metrics["top5"], 100 * (order[:, :5] == labels[:, None]).any(axis=-1).mean())
        np.testing.assert_allclose(metrics["loss"], -log_probabilities[np.arange(23), labels].mean(), rtol=1e-5)


def test_logits_that_say_nothing_score_nothing():
    evaluate = make_evaluator(lambda variables, batch: {"logits": batch["logits"]})
    metrics = evaluate({}, make_batches(np.zeros((10, 10), np.float32), np.arange(10), 10))
    assert (metrics["top1"], metrics["top5"]) == (0.0, 0.0)


def test_logits_that_are_not_numbers_score_nothing():
    evaluate = make_evaluator(lambda variables, batch: {"logits": batch["logits"]})
    metrics = evaluate({}, make_batches(np.full((10, 10), np.nan, np.float32), np.arange(10), 10))
    assert metrics["top1"] == 0.0


def test_of_a_set_with_some_classes_only_those_are_predicted():
    logits = np.array([[5.0, 1.0, 0.0, 4.0], [9.0, 0.0, 3.0, 2.0]], np.float32)
    evaluate = make_evaluator(lambda variables, batch: {"logits": batch["logits"]})
    batches = list(make_batches(logits, np.array([3, 3]), 2))
    assert evaluate({}, batches)["top1"] == 0.0
    metrics = evaluate({}, batches, classes=[2, 3])
    assert (metrics["top1"], metrics["top5"], metrics["examples"]) == (50.0, 100.0, 2)
    wanted = -(logits[:, 3] - np.log(np.exp(logits[:, 2:]).sum(axis=-1))).mean()
    np.testing.assert_allclose(metrics["loss"], wanted, rtol=1e-5)


def test_any_acceptable_class_is_right_and_examples_without_one_do_not_count():
    logits = np.eye(4, dtype=np.float32)
    acceptable = np.array([[1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1]], bool)
    evaluate = make_evaluator(lambda variables, batch: {"logits": batch["logits"]})
    batch = {"logits": logits, "label": np.arange(4), "mask": np.array([1, 1, 1, 0], np.float32)}
    metrics = evaluate({}, [{**batch, "acceptable": acceptable}])
    assert metrics == {"top1": 50.0, "examples": 2}
