"""Classification by the nearest neighbors of frozen features, without training."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

TEMPERATURE = 0.07  # of the weights of neighbors, as in DINO (2104.14294)
_CHUNK = 2**14  # features that are compared at once


def collect_features(embed: Callable, variables: Any, batches: Iterable[dict]) -> tuple[np.ndarray, np.ndarray]:
    """Compute the features of a data set.

    Args:
      embed: function of (variables, batch) that returns features, (B, C).
      variables: variables of the model.
      batches: with "label", int (B,), and "mask", (B,), 1 for examples that count.

    Returns:
      Features of length 1, float32 (N, C), and labels, int32 (N,).
    """
    features, labels = [], []
    compute = jax.jit(lambda variables, batch: _normalize(embed(variables, batch)))
    for batch in batches:
        counts = np.asarray(batch["mask"]) > 0
        features.append(np.asarray(compute(variables, batch))[counts])
        labels.append(np.asarray(batch["label"], np.int32)[counts])
    return np.concatenate(features), np.concatenate(labels)


def vote(queries: jax.Array, features: jax.Array, labels: jax.Array, *, neighbors: int, num_classes: int) -> jax.Array:
    """Let the most similar features vote for their classes. Source: the k-NN evaluation of DINO (2104.14294).

    Args:
      queries: (B, C), of length 1.
      features: (N, C), of length 1.
      labels: (N,) int.
      neighbors: number of features that vote, at most N of which there are.
      num_classes: K.

    Returns:
      (B, K): for each class the sum of exp(similarity / ``TEMPERATURE``) over the neighbors of the class, divided by the largest
      of these weights.
    """
    neighbors = min(neighbors, len(features))
    chunk = min(_CHUNK, len(features))
    count = -(-len(features) // chunk)
    padding = count * chunk - len(features)
    features = jnp.pad(features, ((0, padding), (0, 0))).reshape(count, chunk, -1)
    labels = jnp.pad(labels, (0, padding), constant_values=-1).reshape(count, chunk)

    def add_chunk(nearest, part):
        """The nearest of the neighbors so far and of a chunk."""
        part_features, part_labels = part
        similarities = jnp.where(part_labels[None] < 0, -jnp.inf, queries @ part_features.T)
        everything = jnp.concatenate([nearest[0], similarities], axis=1)
        every_label = jnp.concatenate([nearest[1], jnp.broadcast_to(part_labels[None], similarities.shape)], axis=1)
        largest, indices = jax.lax.top_k(everything, neighbors)
        return (largest, jnp.take_along_axis(every_label, indices, axis=1)), None

    shape = (len(queries), neighbors)
    start = jnp.full(shape, -jnp.inf, queries.dtype), jnp.full(shape, -1, labels.dtype)
    (similarities, classes), _ = jax.lax.scan(add_chunk, start, (features, labels))
    weights = jnp.exp((similarities - similarities[:, :1]) / TEMPERATURE)
    return jnp.einsum("bn,bnk->bk", weights, jax.nn.one_hot(classes, num_classes))


def make_predict(embed: Callable, *, neighbors: int, num_classes: int) -> Callable[[Any, dict], dict]:
    """Make a function of (variables, batch) for ``evaluation.classification``; its logits are the votes.

    Its variables are {"model": those of ``embed``, "features": (N, C), "labels": (N,)}, see ``vote``.
    """

    def predict(variables, batch):
        queries = _normalize(embed(variables["model"], batch))
        options = dict(neighbors=neighbors, num_classes=num_classes)
        return {"logits": vote(queries, variables["features"], variables["labels"], **options)}

    return predict


def _normalize(features):
    features = features.astype(jnp.float32)
    return features / jnp.maximum(jnp.linalg.norm(features, axis=1, keepdims=True), 1e-12)
