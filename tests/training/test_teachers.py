"""Runs that learn from a teacher or from their averaged weights, and teachers that do not fit."""

import itertools
import shutil

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import dat_jax
from dat_jax.config import validate
from dat_jax.errors import UserError
from dat_jax.tasks.preprocessing import normalize
from dat_jax.training import loop
from dat_jax.training.teachers import load_teacher
from dat_jax.training.trainer import Trainer
from tests.helpers import tiny_config


def with_values(**values):
    config = tiny_config.get_config().unlock()
    config.update_from_flattened_dict(values)
    return config.lock()


def save_program(path, *, classes=2, dtype=jnp.float32, side=32, arguments=1, batch=None, platform="cpu", wrap=dict):
    """A program whose logits are sums of the pixels of each half."""

    def classify(images, *others):
        halves = images.astype(jnp.float32).reshape(images.shape[0], side, classes, -1, 3)
        return wrap(logits=halves.mean(axis=(1, 3, 4)))

    (symbol,) = jax.export.symbolic_shape("b")
    images = jax.ShapeDtypeStruct((batch or symbol, side, side, 3), dtype)
    export = jax.export.export(jax.jit(classify), platforms=[platform])
    path.write_bytes(export(*[images] * arguments).serialize())
    return str(path)


def run_steps(config, count=3):
    """Metrics of the first steps, and the last state."""
    trainer = Trainer(config, devices=jax.devices()[:1])
    state, metrics = trainer.initialize(), []
    for batch in itertools.islice(trainer.train_batches(start_step=0), count):
        state, values = trainer.train_step(state, batch)
        metrics.append(jax.device_get(values))
    return metrics, state


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.uint8])
def test_a_program_gets_normalized_images_or_their_pixels(dtype, tmp_path):
    path = save_program(tmp_path / "halves.stablehlo", dtype=dtype)
    teacher = load_teacher(path, kind="soft", class_names=("left", "right"), data=tiny_config.get_config().data)
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    got = teacher.outputs(teacher.variables, normalize(jnp.asarray(images)))["logits"]
    pixels = images.astype(np.float32) if dtype == jnp.uint8 else np.asarray(normalize(jnp.asarray(images)))
    np.testing.assert_allclose(got, pixels.reshape(3, 32, 2, -1, 3).mean(axis=(1, 3, 4)), rtol=1e-4, atol=1e-5)


def test_a_program_gets_the_images_of_the_training(tmp_path):
    """Their size may be another one than that of the evaluation."""
    path = save_program(tmp_path / "teacher.stablehlo", side=32)
    options = dict(kind="soft", class_names=("left", "right"))
    data = with_values(**{"data.image_size": 64, "data.train_sizes": (32,)}).data
    assert load_teacher(path, data=data, **options).variables == {}
    data = with_values(**{"data.image_size": 64, "data.train_sizes": (32, 64)}).data
    with pytest.raises(UserError, match="cannot be used with 2 images of 64 x 64"):
        load_teacher(path, data=data, **options)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"classes": 4}, "soft", r"expected logits of 2 classes, got an array \(2, 4\)"),
        ({"side": 64}, "soft", r"cannot be used with 2 images of 32 x 32"),
        ({"batch": 3}, "soft", r"cannot be used with 2 images of 32 x 32"),
        ({"platform": "tpu"}, "soft", r"is a program for tpu, but the run is on cpu"),
        ({"dtype": jnp.int32}, "soft", r"expected a program of images that are uint8 or floats, got int32"),
        ({"wrap": lambda logits: (logits, logits)}, "soft", r'that returns logits, or a dict with "logits"'),
        ({"wrap": lambda logits: {"boxes": logits}}, "soft", r'that returns logits, or a dict with "logits"'),
        ({"arguments": 2}, "hard", "expected a program of images only, got one with 2 arguments"),
        ({}, "tokens", r"has logits only: expected config\.distillation\.kind soft or hard, got tokens"),
    ],
)
def test_programs_that_do_not_fit(options, kind, message, tmp_path):
    path = save_program(tmp_path / "teacher.stablehlo", **options)
    with pytest.raises(UserError, match=message):
        load_teacher(path, kind=kind, class_names=("left", "right"), data=tiny_config.get_config().data)


def test_a_program_for_the_batch_of_the_run_is_a_teacher(tmp_path):
    path = save_program(tmp_path / "teacher.stablehlo", batch=8)
    assert Trainer(with_values(**{"distillation.teacher": path, "batch_size": 16, "accumulate_steps": 2})).teacher


def test_teachers_that_do_not_exist_or_are_damaged(tmp_path):
    options = dict(kind="soft", class_names=("left", "right"), data=tiny_config.get_config().data)
    with pytest.raises(UserError, match=r"missing\.stablehlo cannot be read: No such file"):
        load_teacher(str(tmp_path / "missing.stablehlo"), **options)
    (tmp_path / "damaged.stablehlo").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"damaged\.stablehlo is not a program that jax .* can read"):
        load_teacher(str(tmp_path / "damaged.stablehlo"), **options)
    with pytest.raises(
        UserError, match=r"config\.distillation\.teacher: Expected a folder of weights .* got .*nothing"
    ):
        load_teacher(str(tmp_path / "nothing"), **options)


def test_mesa_needs_averaged_weights():
    with pytest.raises(UserError, match=r"config\.mesa needs averaged weights: expected config\.ema_decay above 0"):
        validate(with_values(**{"mesa.weight": 1.0}))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two epochs."""
    directory = tmp_path_factory.mktemp("teacher")
    loop.train(tiny_config.get_config(), str(directory), quiet=True)
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["soft", "features", "tokens"])
def test_a_student_that_is_its_teacher_learns_nothing_from_it(kind, trained):
    """The first loss is 0 (but for stochastic depth, which is off here), and that of another student is not."""
    values = {"distillation.teacher": str(trained), "distillation.kind": kind, "distillation.weight": 1.0}
    config = with_values(**values, **{"model.drop_path_rate": 0.0, "init_from": str(trained)})
    trainer = Trainer(config, devices=jax.devices()[:1])
    from dat_jax.checkpoints.restore import initialize_state

    state = initialize_state(trainer.config, **loop._state_options(trainer))
    batch = next(trainer.train_batches(start_step=0))
    _, metrics = trainer.train_step(state, batch)
    assert float(metrics["distillation"]) < 1e-6
    assert float(metrics["loss"]) == float(metrics["distillation"])
    _, metrics = trainer.train_step(trainer.initialize(), batch)
    assert float(metrics["distillation"]) > 1e-3


@pytest.mark.slow
def test_tokens_need_maps_of_the_same_size(trained):
    options = dict(class_names=("left", "right"), data=tiny_config.get_config().data)
    assert load_teacher(str(trained), kind="tokens", tokens=(8, 8), **options)
    with pytest.raises(UserError, match="expected a last map of 4 x 4 positions, .* got 8 x 8"):
        load_teacher(str(trained), kind="tokens", tokens=(4, 4), **options)
    other_classes = dict(options, class_names=("cat", "dog", "bird"))
    assert load_teacher(str(trained), kind="features", **other_classes)


@pytest.mark.slow
def test_classes_of_the_teacher_are_ordered_by_name(trained, tmp_path):
    names, reversed_names = ("left", "right"), ("right", "left")
    options = dict(kind="soft", data=tiny_config.get_config().data)
    images = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
    logits = []
    for class_names in (names, reversed_names):
        teacher = load_teacher(str(trained), class_names=class_names, **options)
        logits.append(teacher.outputs(teacher.variables, images)["logits"])
    np.testing.assert_allclose(logits[0], logits[1][:, ::-1], rtol=1e-6)
    with pytest.raises(UserError, match="has other classes: .* do not have left"):
        load_teacher(str(trained), class_names=("cat", "right"), **options)
    model, variables = dat_jax.load(trained)
    dat_jax.export_model(tmp_path / "unnamed", model=model, variables=variables)
    assert load_teacher(str(tmp_path / "unnamed"), class_names=("cat", "right"), **options)


@pytest.mark.slow
def test_parts_of_a_batch_and_the_averaged_model(tmp_path):
    """Two accumulated parts give about the loss of the whole batch; MESA starts after a part of the run."""
    path = save_program(tmp_path / "halves.stablehlo")
    values = {"distillation.teacher": path, "ema_decay": 0.5, "mesa.weight": 2.0, "mesa.start": 2 / 20}
    values |= {"model.drop_path_rate": 0.0}
    whole, _ = run_steps(with_values(**values))
    parts, _ = run_steps(with_values(**values, accumulate_steps=2))
    for metrics in (whole, parts):
        assert [bool(values["mesa"] > 0) for values in metrics] == [False, False, True]
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_allclose([a["distillation"], a["loss"]], [b["distillation"], b["loss"]], rtol=1e-3)


@pytest.mark.slow
def test_runs_with_a_teacher_resume_and_do_not_need_it_for_evaluation(tmp_path):
    path = save_program(tmp_path / "halves.stablehlo")
    config = with_values(**{"distillation.teacher": path, "ema_decay": 0.5, "mesa.weight": 1.0})
    result = loop.train(config, str(tmp_path / "run"), quiet=True)
    shutil.move(path, tmp_path / "away.stablehlo")
    assert loop.evaluate(config, str(tmp_path / "run"), quiet=True) == result
    with pytest.raises(UserError, match="cannot be read"):
        loop.train(config, str(tmp_path / "other"), quiet=True)
    assert not (tmp_path / "other" / "checkpoints").exists()
