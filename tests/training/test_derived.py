"""Settings that follow from the size of the training set, and warnings about lengths."""

import json

import pytest
from ml_collections import ConfigDict

from dat_jax.config import list_configs, load_config, validate
from dat_jax.errors import UserError
from dat_jax.training.model_defaults import resolve_model
from dat_jax.training.schedule import list_length_warnings, resolve_length
from dat_jax.training.trainer import Trainer


@pytest.mark.parametrize(
    ("examples", "batch_size", "epochs", "peak", "every"),
    [(60, 8, 143, 5e-4, 7), (368, 16, 44, 5e-4, 2), (5_000, 128, 30, 4.6e-4, 1), (1_000_000, 128, 30, 1e-4, 1)],
)
def test_finetuning_follows_the_number_of_images(examples, batch_size, epochs, peak, every):
    config = load_config("finetune")
    validate(config)
    config = resolve_length(config, examples=examples, parts=1)
    validate(config)
    steps_per_epoch = examples // batch_size
    assert (config.batch_size, config.epochs, config.eval.every) == (batch_size, epochs, every)
    assert config.schedule.base_lr == pytest.approx(peak, rel=0.01)
    assert config.schedule.reference_batch_size == batch_size
    assert config.schedule.warmup_epochs == pytest.approx(epochs / 10)
    assert not list_length_warnings(config, steps_per_epoch=steps_per_epoch, total_steps=epochs * steps_per_epoch)


def test_set_values_are_not_derived():
    config = load_config("finetune")
    with config.unlocked():
        config.batch_size, config.epochs, config.schedule.base_lr = 32, 5, 2e-3
    config = resolve_length(config, examples=368, parts=8)
    assert (config.batch_size, config.epochs, config.schedule.base_lr) == (32, 5, 2e-3)
    assert config.schedule.reference_batch_size == 32
    assert config.schedule.min_lr == config.schedule.warmup_lr == pytest.approx(2e-5)


def test_each_rate_can_be_set_alone():
    config = load_config("finetune")
    with config.unlocked():
        config.schedule.update(min_lr=1e-4, reference_batch_size=512)
    schedule = resolve_length(config, examples=60, parts=1).schedule
    assert (schedule.min_lr, schedule.reference_batch_size) == (1e-4, 512)
    assert schedule.base_lr * 8 / 512 == pytest.approx(5e-4, rel=0.01)  # at a batch of 8
    assert schedule.warmup_lr == pytest.approx(schedule.base_lr / 100)


@pytest.mark.parametrize(("examples", "batch_size"), [(1, 1), (4, 4), (7, 4), (8, 8)])
def test_few_images_have_a_small_batch(examples, batch_size):
    assert resolve_length(load_config("finetune"), examples=examples, parts=1).batch_size == batch_size


def test_derived_batch_is_split_over_devices():
    assert resolve_length(load_config("finetune"), examples=60, parts=12).batch_size == 12


def test_image_size_is_that_of_the_weights_else_of_the_model(tmp_path):
    config = load_config("finetune")
    with config.unlocked():
        config.model.name, config.init_from = "dat_pp_nano", str(tmp_path)
    data = resolve_model(config).data
    assert (data.image_size, data.eval_resize) == (48, 55)
    (tmp_path / "config.json").write_text(json.dumps({"data": {"image_size": 64, "eval_resize": 70}}))
    data = resolve_model(config).data
    assert (data.image_size, data.eval_resize) == (64, 70)
    (tmp_path / "model.json").write_text(json.dumps({"options": {"image_size": 96, "resize": 100}}))
    data = resolve_model(config).data
    assert (data.image_size, data.eval_resize) == (96, 100)


def finetuning(**settings):
    schedule = ConfigDict({"warmup_epochs": 1.0})
    return ConfigDict(
        {
            "init_from": "w",
            "steps": 0,
            "batch_size": 128,
            "ema_decay": 0.0,
            "ema_warmup": False,
            "schedule": schedule,
            **settings,
        }
    )


def test_warnings_name_the_number_and_what_to_set():
    config = finetuning(ema_decay=0.99, schedule={"warmup_epochs": 15.0})
    steps, ema, warmup = list_length_warnings(config, steps_per_epoch=2, total_steps=60)
    expected = {
        steps: ("60 steps", "--config.epochs=250"),
        ema: ("100 steps", "--config.ema_decay=0.833"),
        warmup: ("30 steps", "--config.schedule.warmup_epochs=3"),
    }
    assert all(part in sentence for sentence, parts in expected.items() for part in parts)


def test_an_average_with_a_warm_up_may_be_longer_than_the_run():
    assert list_length_warnings(finetuning(ema_decay=0.9999), steps_per_epoch=62, total_steps=1000)
    assert not list_length_warnings(finetuning(ema_decay=0.9999, ema_warmup=True), steps_per_epoch=62, total_steps=1000)


def test_runs_from_scratch_may_be_shorter_than_finetuning():
    assert not list_length_warnings(finetuning(init_from=""), steps_per_epoch=62, total_steps=372)
    assert list_length_warnings(finetuning(), steps_per_epoch=62, total_steps=372)


EXAMPLES = {
    "quickstart": 5_000,
    "quickstart_recipe": 5_000,
    "quickstart_segmentation": 800,
    "quickstart_detection": 800,
}


@pytest.mark.parametrize("name", [name for name in list_configs() if name != "tiny"])
def test_packaged_configurations_have_no_warning(name):
    config = load_config(name)
    task_examples = {"segmentation": 20_210, "detection": 117_266}.get(config.task, 1_281_167)
    examples = EXAMPLES.get(name.partition(":")[0], task_examples)
    config = resolve_length(config, examples=examples, parts=1)
    steps_per_epoch = examples // config.batch_size
    total_steps = config.steps or config.epochs * steps_per_epoch
    assert not list_length_warnings(config, steps_per_epoch=steps_per_epoch, total_steps=total_steps)


def test_a_resize_below_the_derived_image_size_is_refused(tmp_path):
    config = load_config("finetune")
    with config.unlocked():
        config.model.name, config.init_from, config.data.eval_resize = "dat_pp_nano", "", 20
    with pytest.raises(UserError, match=r"eval_resize must be at least config\.data\.image_size 48 .*, got 20"):
        Trainer(config)
