"""Damaged examples of an evaluation: masked, named, and left out of the metrics of every task."""

import dataclasses

import numpy as np
import pytest

from dat_jax.data.batching import make_eval_batches
from dat_jax.data.detection_transforms import make_detection_eval_transform
from dat_jax.data.image_files import DamagedFile
from dat_jax.data.segmentation_sources import SegmentationArraySource
from dat_jax.data.segmentation_transforms import make_segmentation_eval_transform
from dat_jax.data.sized_batching import make_detection_eval_batches, make_sized_eval_batches
from dat_jax.data.sources import ArraySource, read_spread_examples
from dat_jax.errors import UserError
from dat_jax.evaluation.detection import make_evaluator
from dat_jax.training.monitoring.input import without_damaged
from tests.helpers.logs import collect_logs

DAMAGED = (1, 4)


@dataclasses.dataclass(frozen=True)
class PartlyDamaged:
    """A source of which some examples cannot be read."""

    source: object
    damaged: tuple[int, ...] = DAMAGED
    sizes_too: bool = False

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        if index in self.damaged:
            raise DamagedFile(f"The image {index} cannot be decoded.")
        return self.source[index]

    def size(self, index):
        if self.sizes_too and index in self.damaged:
            raise DamagedFile(f"The size of {index} cannot be read.")
        return self.source.size(index)


def make_images(count, sizes=((40, 40),)):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*sizes[index % len(sizes)], 3), dtype=np.uint8) for index in range(count)]


def check_marks(batches, count, damaged=DAMAGED):
    masks = np.concatenate([batch["mask"] for batch in batches])
    indices = np.concatenate([batch["damaged_index"] for batch in batches])
    assert masks.sum() == count - len(damaged)
    assert sorted(indices[indices >= 0].tolist()) == sorted(damaged)
    assert not masks[indices >= 0].any()


@pytest.mark.parametrize("damaged", [DAMAGED, (6,), (0, 1, 2, 3, 4, 5)])
def test_classification(damaged):
    source = ArraySource(np.stack(make_images(7)), np.arange(7), tuple("abcdefg"))
    batches = list(make_eval_batches(PartlyDamaged(source, damaged), dict, batch_size=4))
    assert [batch["image"].shape for batch in batches] == [(4, 40, 40, 3)] * 2
    check_marks(batches, 7, damaged)


@pytest.mark.parametrize("sizes_too", [False, True])
def test_segmentation(sizes_too):
    images = make_images(7, ((40, 40), (40, 48)))
    labels = [np.zeros(image.shape[:2], np.uint8) for image in images]
    source = PartlyDamaged(SegmentationArraySource(images, labels, ("a", "b")), sizes_too=sizes_too)
    transform = make_segmentation_eval_transform(scale=(64, 64), ratios=(1.0,))
    batches = list(make_sized_eval_batches(source, transform, batch_size=2))
    check_marks(batches, 7)
    for batch in batches:
        assert (batch["label"][batch["damaged_index"] >= 0] == 255).all()


class Detections:
    """Images of one size."""

    def __init__(self, count):
        self.images = make_images(count)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {"image": self.images[index]}

    def size(self, index):
        return self.images[index].shape[:2]


def test_detection_is_evaluated_without_the_objects_of_damaged_images():
    source = PartlyDamaged(Detections(7))
    transform = make_detection_eval_transform(scale=(64, 64))
    batches = list(make_detection_eval_batches(source, transform, batch_size=4))
    check_marks(batches, 7)
    box = [10.0, 10.0, 20.0, 20.0]
    truth = {
        "images": [{"id": 100 + k, "height": 40, "width": 40} for k in range(7)],
        "annotations": [
            {"id": k + 1, "image_id": 100 + k, "category_id": 5, "bbox": box, "area": 400.0, "iscrowd": 0}
            for k in range(7)
        ],
        "categories": [{"id": 5, "name": "a"}],
    }

    def predict(variables, batch):
        count = batch["image"].shape[0]
        corners = np.tile(np.array([[10.0, 10.0, 30.0, 30.0]], np.float32), (count, 1, 1))
        return {
            "boxes": corners + 0 * batch["image"].sum(),
            "scores": np.ones((count, 1), np.float32),
            "labels": np.zeros((count, 1), np.int32),
            "valid": np.ones((count, 1), bool),
        }

    evaluate = make_evaluator(predict, load_ground_truth=lambda: truth, category_ids=(5,), masks=False)
    with collect_logs() as messages:
        counted = without_damaged(
            batches, count=7, max_damaged=0.5, describe=lambda index: f"Image {index} is damaged."
        )
        evaluation = evaluate({}, counted)
    metrics = evaluation.metrics
    assert metrics["images"] == 5
    assert metrics["bbox/AP"] == pytest.approx(100)
    np.testing.assert_allclose(evaluation.per_class["bbox/AP"], [100])
    assert messages[:2] == [f"Image {index} is damaged. It is left out of the evaluation." for index in DAMAGED]
    assert messages[2] == "The metrics are those of 5 of 7 images; 2 are damaged."


def test_too_many_damaged_examples_end_the_evaluation():
    source = ArraySource(np.stack(make_images(7)), np.arange(7), tuple("abcdefg"))
    batches = make_eval_batches(PartlyDamaged(source), dict, batch_size=4)
    with pytest.raises(UserError, match=r"2 of the 7 images to evaluate .* config.data.max_damaged 0.2"):
        list(without_damaged(batches, count=7, max_damaged=0.2, describe=str))


def test_figures_show_readable_examples():
    source = PartlyDamaged(ArraySource(np.stack(make_images(7)), np.arange(7), tuple("abcdefg")))
    assert [record["label"] for record in read_spread_examples(source, 7)] == [0, 2, 2, 3, 5, 5, 6]
