"""Checks of detection data before training."""

import numpy as np
import pytest

from dat_jax.errors import UserError
from dat_jax.tasks.detection.task import DetectionTask
from tests.helpers import tiny_detection
from tests.helpers.coco_files import annotation, write
from tests.helpers.logs import collect_logs
from tests.helpers.photographs import photographs


def make_task(directory, boxes, head="retinanet", side=64, **changes):
    """Make a task whose training image has objects with some boxes, x, y, width and height, of the class "b"."""
    masks = np.zeros((len(boxes), side, side), bool)
    for mask, (x, y, width, height) in zip(masks, boxes, strict=True):
        mask[y : y + height, x : x + width] = True
    annotations = [annotation(k, 0, 5, mask, **changes) for k, mask in enumerate(masks)]
    images, categories = (
        {0: photographs(width=side, height=side)[0]},
        [{"id": 0, "name": "a"}, {"id": 5, "name": "b"}],
    )
    for split in ("train", "val"):
        write(directory, images=images, annotations=annotations, categories=categories, split=split)
    config = tiny_detection.get_config(head).unlock()
    config.data.directory = str(directory)
    return DetectionTask(config)


def test_a_training_set_without_objects_is_refused_with_the_counts_by_reason(tmp_path):
    with pytest.raises(UserError, match=r"train\.json have no object to train on.* 2 crowd objects\.$"):
        make_task(tmp_path, [(5, 5, 20, 20), (30, 30, 20, 20)], iscrowd=1).check_data()
    with pytest.raises(UserError, match=r'no object to train on.* 1 annotations marked "ignore"\.$'):
        make_task(tmp_path, [(5, 5, 20, 20)], ignore=1).check_data()
    with pytest.raises(UserError, match=r"no object to train on.* 1 empty boxes\.$"):
        make_task(tmp_path, [(5, 5, 20, 20)], bbox=[5, 5, 0, 20]).check_data()


def test_classes_without_objects_are_named(tmp_path):
    with collect_logs() as logs:
        make_task(tmp_path, [(5, 5, 20, 20)]).check_data()
    assert any("1 of 2 classes have no object" in message and message.endswith(": a.") for message in logs)
