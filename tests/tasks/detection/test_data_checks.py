"""Checks of detection data before training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import ExifTags, Image

from dat_jax.errors import UserError
from dat_jax.ops.detection.anchors import inside_image, make_anchors
from dat_jax.ops.detection.boxes import pairwise_iou
from dat_jax.tasks.detection.anchor_check import AnchorSettings, compute_best_ious
from dat_jax.tasks.detection.task import DetectionTask
from dat_jax.training.trainer import Trainer
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


def test_photographs_that_are_turned_are_reported(tmp_path):
    task = make_task(tmp_path, [(5, 5, 20, 20)])
    tags = Image.Exif()
    tags[ExifTags.Base.Orientation] = 3
    (path,) = (tmp_path / "train").iterdir()
    Image.open(path).copy().save(path, exif=tags)
    with collect_logs() as logs:
        task.check_data()
    assert any("1 of 1 training images are turned by their orientation tag: their boxes" in message for message in logs)


def test_data_without_masks_train_a_retinanet_after_the_advice(tmp_path):
    with pytest.raises(UserError, match=r"mask_rcnn learns masks.*config\.head\.name=retinanet"):
        make_task(tmp_path, [(5, 5, 20, 20)], head="mask_rcnn", segmentation=None).check_data()
    config = tiny_detection.get_config("mask_rcnn").unlock()
    config.data.directory, config.head.name = str(tmp_path), "retinanet"
    config.mesh.data = config.mesh.fsdp = config.batch_size = 1
    with collect_logs() as logs:
        trainer = Trainer(config, devices=jax.devices()[:1])
    assert any("config.head.name retinanet has no width (16)" in message for message in logs)
    assert "width" not in trainer.config.head
    assert config.head.width == 16
    trainer.task.check_data()
    assert trainer.describe()["data"].startswith(f"{tmp_path}: 1 to train")


def test_attributes_that_no_detector_has_are_refused(tmp_path):
    config = tiny_detection.get_config("retinanet").unlock()
    config.head.widht = 3
    with pytest.raises(UserError, match="RetinaNet has no attribute 'widht'"):
        Trainer(config)


def test_classes_without_objects_are_named(tmp_path):
    with collect_logs() as logs:
        make_task(tmp_path, [(5, 5, 20, 20)]).check_data()
    assert any("1 of 2 classes have no object" in message and message.endswith(": a.") for message in logs)


def check(directory, boxes, **options) -> list[str]:
    with collect_logs() as logs:
        make_task(directory, boxes, **options).check_data()
    return [message for message in logs if "IoU" in message]


BARS = [(x, y, 30, 7) for x in (3, 20, 31) for y in (2, 15, 28, 41)]


@pytest.mark.parametrize(("head", "threshold"), [("retinanet", "0.5"), ("mask_rcnn", "0.3")])
def test_bars_that_no_anchor_matches_are_warned_about(tmp_path, head, threshold):
    summary, warning = check(tmp_path, BARS, head=head)
    assert f"0 of 12 sampled objects have an anchor with an IoU of {threshold}" in summary
    assert "small 0 of 12" in summary
    assert "longer than 4:1 0 of 12" in summary
    assert f"IoU of {threshold}: small 0 of 12, longer than 4:1 0 of 12." in warning
    for key in ("data.short_sides", "data.long_side", "head.anchor_scales", "head.anchor_ratios"):
        assert f"config.{key}" in warning


@pytest.mark.parametrize("head", ["retinanet", "mask_rcnn", "cascade_mask_rcnn"])
def test_objects_of_the_size_of_the_anchors_are_only_counted(tmp_path, head):
    (summary,) = check(tmp_path, [(16, 16, 31, 31)] * 12, head=head)
    assert "12 of 12" in summary
    (summary,) = check(tmp_path, BARS[:9], head=head)  # too few for a warning
    assert "0 of 9" in summary


def test_digits_are_matched_by_the_anchors_of_the_quickstart():
    with collect_logs() as logs:
        DetectionTask(tiny_detection.get_config()).check_data()
    assert len(logs) == 1
    assert logs[0].startswith("Anchors: ")


@pytest.mark.parametrize("inside_only", [False, True])
def test_best_overlaps_are_those_of_all_anchors(inside_only):
    rng, height, width = np.random.default_rng(0), 70, 100
    starts = rng.uniform(0, 60, (40, 2))
    boxes = np.concatenate([starts, np.minimum(starts + rng.uniform(1, 70, (40, 2)), [width, height])], axis=1)
    options = dict(strides=(8, 16, 32), scales=(2.0, 4.0), ratios=(0.5, 1.0, 3.0))
    settings = AnchorSettings(**options, inside_only=inside_only, required=0.5, positive=0.5)
    shapes = [(-(-96 // stride), -(-128 // stride)) for stride in (8, 16, 32)]
    anchors = jnp.concatenate(make_anchors(shapes, **options))
    if inside_only:
        anchors = anchors[inside_image(anchors, image_shape=(height, width))]
    expected = pairwise_iou(anchors, jnp.asarray(boxes, jnp.float32)).max(axis=0)
    best = compute_best_ious(boxes, np.tile([height, width], (40, 1)), settings)
    np.testing.assert_allclose(best, expected, atol=1e-5)
    assert compute_best_ious(np.ones((1, 4)), np.array([[70, 100]]), settings) == 0


def test_sampled_boxes_are_clipped_objects_that_can_be_trained_on(tmp_path):
    source = make_task(tmp_path, [(5, 5, 20, 20), (30, 30, 20, 20)], bbox=[50, -4, 30, 20]).train_source
    boxes, sizes = source.sample_boxes(10)
    assert boxes.tolist() == [[50, 0, 14, 16]] * 2
    assert sizes.tolist() == [[64, 64]] * 2
    assert len(source.sample_boxes(1)[0]) == 1
