"""Detectors train, are evaluated, go on, and come back: the same loop as for classifiers."""

import jax
import numpy as np
import pytest
from PIL import Image

from dat_jax import conversion
from dat_jax.checkpoints.class_names import read_class_names
from dat_jax.checkpoints.loading import load_trained
from dat_jax.data import synthetic
from dat_jax.errors import UserError
from dat_jax.parallel import sharding
from dat_jax.tasks.detection import task as task_lib
from dat_jax.training.loop import evaluate, train
from dat_jax.training.monitoring.metrics import read_metrics
from dat_jax.training.trainer import Trainer
from tests.helpers import tiny_detection
from tests.helpers.small_mesh import make_small_mesh


@pytest.fixture(scope="module", autouse=True)
def few_images_and_one_device():
    """Validate on few images and use one device, because programs are compiled without optimizations, which makes them slow."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", make_small_mesh)
        patch.setitem(synthetic.COUNTS, "validation", 40)
        yield


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Of a whole run on one device, and what it gave."""
    directory = tmp_path_factory.mktemp("detector")
    return directory, train(tiny_detection.get_config(), str(directory))


def test_it_learns_and_leaves_what_people_look_at(workdir):
    directory, result = workdir
    series = read_metrics(directory / "metrics.jsonl")
    assert series["train/loss"][8] < series["train/loss"][2]
    assert set(series["eval/bbox/AP"]) == set(series["eval/segm/AP50"]) == {4, 8}
    assert result["images"] == 40
    assert result["bbox/AP"] == pytest.approx(max(series["eval/bbox/AP"].values()))
    assert read_class_names(directory, count=10) == tiny_detection.CLASS_NAMES
    for name in ("curves.png", "detections.png"):
        with Image.open(directory / name) as picture:
            assert min(picture.size) > 200


@pytest.mark.slow
def test_a_checkpoint_is_evaluated_to_the_same_numbers(workdir):
    directory, result = workdir
    assert evaluate(tiny_detection.get_config(), str(directory)) == pytest.approx(result)


def test_weights_go_to_published_names_and_back(workdir):
    model, variables = load_trained(workdir[0])
    state_dict = conversion.detector_to_official(model, variables)
    back = conversion.detector_variables(model, state_dict)
    same = jax.tree.map(lambda a, b: a.dtype == b.dtype and np.array_equal(a, b), jax.device_get(back), dict(variables))
    assert all(jax.tree.leaves(same))


def two_steps(config, devices):
    """Metrics of two steps, BatchNorm's statistics after them, and detections of four images."""
    trainer = Trainer(config, devices=devices)
    state, batches, found = trainer.initialize(), trainer.train_batches(start_step=0), []
    for _ in range(2):
        batch = {name: array for name, array in next(batches).items() if name not in ("damaged", "dropped")}
        state, metrics = trainer.train_step(state, trainer.put_batch(batch))
        found.append(jax.device_get(metrics))
    return found, jax.device_get(state.model_state)


@pytest.mark.slow
def test_eight_devices_step_as_one():
    """A cascade: losses and BatchNorm are of the whole batch, on every mesh."""
    config = tiny_detection.get_config("cascade_mask_rcnn").unlock()
    eight = two_steps(config, jax.devices())
    config.mesh.data = config.mesh.fsdp = 1
    one = two_steps(config, jax.devices()[:1])
    assert "batch_stats" in one[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), eight, one)


def test_data_that_do_not_fit_are_refused(monkeypatch):
    config = tiny_detection.get_config().unlock()
    train_source = task_lib.DetectionTask(config).train_source

    class WithoutMasks:
        has_masks = False

    with pytest.raises(UserError, match="mask_rcnn learns masks, but the annotations have none"):
        task_lib.DetectionTask(config, sources=(WithoutMasks(), None)).make_train_batches(start_step=0, rows=[0])

    class OtherNames:
        category_ids, class_names = (1, 7), ("cat", "dog")

    sources = iter([train_source, OtherNames()])
    monkeypatch.setattr(task_lib, "load_detection_source", lambda *_, **__: next(sources))
    with pytest.raises(UserError, match=r"same categories .* 1 0, 2 1, 3 2, 4 3, 5 4 and 5 more and 1 cat, 7 dog"):
        task_lib.DetectionTask(config)
