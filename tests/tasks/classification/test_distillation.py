"""Losses of teachers and of the averaged model, against formulas, and outputs of a model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

import dat_jax
from dat_jax.tasks.classification.distillation import distillation_loss, model_outputs, self_distillation_loss
from tests.helpers.tiny_config import ONE_STAGE


def random_outputs(seed, channels):
    rng = np.random.default_rng(seed)
    shapes = {"logits": (6, 4), "embedding": (6, channels), "tokens": (6, 2, 3, 4)}
    return {name: jnp.asarray(2 * rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


STUDENT, TEACHER = random_outputs(0, 5), random_outputs(1, 7)


def compute(kind, temperature=1.0, student=STUDENT, teacher=TEACHER):
    return distillation_loss(student, teacher, kind=kind, temperature=temperature)


def divergence(student, teacher, temperature):
    ours, theirs = (scipy.special.log_softmax(np.float64(x) / temperature, axis=-1) for x in (student, teacher))
    return temperature**2 * (np.exp(theirs) * (theirs - ours)).sum(axis=-1).mean()


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize(("kind", "output"), [("soft", "logits"), ("tokens", "tokens")])
def test_probabilities_are_compared_by_their_divergence(kind, output, temperature):
    wanted = divergence(STUDENT[output], TEACHER[output], temperature)
    np.testing.assert_allclose(compute(kind, temperature), wanted, rtol=1e-5)
    np.testing.assert_allclose(compute(kind, temperature, student=TEACHER), 0, atol=1e-6)


def test_the_class_of_the_teacher_is_a_label():
    logits, classes = np.float64(STUDENT["logits"]), np.asarray(TEACHER["logits"]).argmax(axis=-1)
    wanted = -scipy.special.log_softmax(logits, axis=-1)[np.arange(6), classes].mean()
    np.testing.assert_allclose(compute("hard", 5.0), wanted, rtol=1e-5)


def test_features_are_compared_by_their_similarities():
    def similarities(embedding):
        products = np.float64(embedding) @ np.float64(embedding).T
        return products / np.linalg.norm(products, axis=1, keepdims=True)

    difference = similarities(STUDENT["embedding"]) - similarities(TEACHER["embedding"])
    np.testing.assert_allclose(compute("features"), (difference**2).sum() / 6, rtol=1e-5)
    rotated = {"embedding": 3 * jnp.pad(STUDENT["embedding"], ((0, 0), (0, 2)))[:, ::-1]}
    np.testing.assert_allclose(compute("features", teacher=rotated), 0, atol=1e-10)


@pytest.mark.parametrize("kind", ["soft", "hard", "features", "tokens"])
def test_gradients_flow_to_the_student_only(kind):
    to_student, to_teacher = jax.grad(
        lambda student, teacher: compute(kind, 2.0, student=student, teacher=teacher), argnums=(0, 1)
    )(STUDENT, TEACHER)
    assert sum(float(jnp.abs(leaf).sum()) for leaf in to_student.values()) > 0.01
    assert not any(np.any(leaf) for leaf in to_teacher.values())


def test_the_averaged_model_teaches_from_a_part_of_the_run_on():
    def loss(progress):
        return self_distillation_loss(STUDENT, lambda: TEACHER, progress=jnp.asarray(progress), start=0.25)

    targets = scipy.special.softmax(np.float64(TEACHER["logits"]), axis=-1)
    wanted = -(targets * scipy.special.log_softmax(np.float64(STUDENT["logits"]), axis=-1)).sum(axis=-1).mean()
    assert float(loss(0.24)) == 0
    np.testing.assert_allclose([loss(0.25), loss(1.0)], wanted, rtol=1e-5)
    to_average = jax.grad(
        lambda teacher: self_distillation_loss(STUDENT, lambda: teacher, progress=jnp.asarray(1.0), start=0.25)
    )(TEACHER)
    assert not any(np.any(leaf) for leaf in to_average.values())


def test_outputs_of_a_model():
    """The logits are those of the model, and the mean of the tokens."""
    model = dat_jax.create_model("dat_pp_nano", num_classes=4, **ONE_STAGE)
    images = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
    variables = jax.jit(model.init)(jax.random.key(1), images)
    outputs = jax.jit(lambda variables: model_outputs(model, variables, images))(variables)
    assert {name: array.shape for name, array in outputs.items()} == {
        "logits": (2, 4),
        "embedding": (2, 16),
        "tokens": (2, 8, 8, 4),
    }
    logits = jax.jit(model.apply)(variables, images)
    np.testing.assert_allclose(outputs["logits"], logits, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(outputs["tokens"].mean(axis=(1, 2)), logits, rtol=1e-4, atol=1e-5)
