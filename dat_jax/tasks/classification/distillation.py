"""Losses of a student that learns from a teacher: its logits, its features, or its prediction at each position.

The outputs of both are those of ``model_outputs``; a teacher that is no model of this project has "logits" only.
"""

from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from dat_jax.models.dat import DAT

KINDS = {"soft": "logits", "hard": "logits", "features": "embedding", "tokens": "tokens"}  # which output each compares
Outputs = Mapping[str, jax.Array]


def model_outputs(model: DAT, variables: Any, images: jax.Array, **options: Any) -> dict[str, jax.Array]:
    """Compute the outputs of a classifier that distillation compares.

    Args:
      model: a classifier.
      variables: its variables.
      images: (B, H, W, 3), normalized.
      **options: of ``model.apply``; "train" is that of the model.

    Returns:
      "logits", (B, K); "embedding", (B, C), the input of the head; and "tokens", (B, H', W', K), the output of the head at each
      position of the last map, without the mean.
    """
    train = options.pop("train", False)

    def compute(model, images):
        last_map = model.features(images, train=train)[-1]
        pixels = last_map.reshape(-1, 1, 1, last_map.shape[-1])
        embedding = model.pool(last_map)
        return {
            "logits": model.cls_head(embedding),
            "embedding": embedding,
            "tokens": model.classify(pixels).reshape(*last_map.shape[:-1], -1),
        }

    return cast(dict[str, jax.Array], model.apply(variables, images, method=compute, **options))


def distillation_loss(student: Outputs, teacher: Outputs, *, kind: str, temperature: float) -> jax.Array:
    """The loss of a student, a mean over the batch; gradients do not flow to the teacher.

    Args:
      student, teacher: see ``model_outputs``.
      kind: "soft": T^2 times the Kullback-Leibler divergence of the student's probabilities from the teacher's, both with logits
        divided by T (1503.02531). "hard": cross-entropy to the teacher's class (2012.12877). "features": mean squared
        difference of the matrices of similarities between the embeddings of the batch, with rows of length 1 (1907.09682); it
        does not depend on the number of channels. "tokens": "soft" at every position of the last map (2104.10858).
      temperature: T, of "soft" and "tokens".
    """
    ours, theirs = (outputs[KINDS[kind]].astype(jnp.float32) for outputs in (student, jax.lax.stop_gradient(teacher)))
    if kind == "hard":
        return optax.softmax_cross_entropy_with_integer_labels(ours, theirs.argmax(axis=-1)).mean()
    if kind == "features":
        difference = _similarities(ours) - _similarities(theirs)
        return jnp.square(difference).sum(axis=-1).mean()
    ours, theirs = (jax.nn.log_softmax(logits / temperature) for logits in (ours, theirs))
    divergence = (jnp.exp(theirs) * (theirs - ours)).sum(axis=-1)
    return temperature**2 * divergence.mean()


def _similarities(embedding):
    """Similarities of the examples of a batch, with rows of length 1: (B, B)."""
    products = embedding @ embedding.T
    return products / jnp.maximum(jnp.linalg.norm(products, axis=1, keepdims=True), 1e-12)


def self_distillation_loss(
    student: Outputs, average: Callable[[], Outputs], *, progress: jax.Array, start: float
) -> jax.Array:
    """Cross-entropy to the prediction of the averaged model, from a part of the run on (MESA, 2205.14083).

    Args:
      student: outputs of the student.
      average: computes those of the averaged model; it is not called before ``start``.
      progress: finished part of the run, from 0 to 1.
      start: part of the run before which the loss is 0.
    """

    def loss():
        targets = jax.nn.softmax(jax.lax.stop_gradient(average()["logits"]).astype(jnp.float32))
        return optax.softmax_cross_entropy(student["logits"].astype(jnp.float32), targets).mean()

    return jax.lax.cond(progress >= start, loss, lambda: jnp.zeros((), jnp.float32))
