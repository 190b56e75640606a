"""COCO average precision: recorded metrics of the published evaluation, edge cases, and result format."""

import json

import numpy as np
import pytest

from dat_jax.data.coco import DigitsSource, decode_mask, to_coco_ground_truth
from dat_jax.evaluation import detection
from tests.helpers.golden_files import DIRECTORY


@pytest.fixture(scope="module")
def golden():
    with np.load(DIRECTORY / "coco_eval.npz") as file:
        return {name: file[name] for name in file.files}


@pytest.fixture(scope="module")
def cases(golden):
    return json.loads(str(golden["gt"])), json.loads(str(golden["dets"]))


def test_metrics_equal_the_recorded_ones(golden, cases):
    before = json.dumps(cases)
    metrics = detection.evaluate_coco(*cases)
    assert json.loads(str(golden["stat_names"])) == list(detection.NAMES)
    assert len(metrics) == 24
    assert next(iter(metrics)) == detection.METRIC
    for kind in ("bbox", "segm"):
        for name, expected in zip(detection.NAMES, golden[f"{kind}.stats"], strict=True):
            assert abs(metrics[f"{kind}/{name}"] - 100 * expected) < 1e-7, (kind, name)
    assert json.dumps(cases) == before


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_curves_equal_the_recorded_ones(golden, cases, kind, capsys):
    curves = detection.compute_curves(*cases, kind=kind)
    np.testing.assert_allclose(curves["stats"], golden[f"{kind}.stats"], atol=1e-9, rtol=0)
    np.testing.assert_allclose(curves["recall"], golden[f"{kind}.recall"], atol=1e-9, rtol=0)
    np.testing.assert_allclose(curves["precision"], golden[f"{kind}.precision"], atol=1e-7, rtol=0)  # stored as float32
    per_class = curves["precision"][:, :, :, 0, -1]
    means = [values[values > -1].mean() if (values > -1).any() else -1 for values in np.moveaxis(per_class, 2, 0)]
    np.testing.assert_allclose(means, golden[f"{kind}.ap_per_class"], atol=1e-9, rtol=0)
    assert capsys.readouterr().out == ""


def test_boxes_do_not_affect_the_evaluation_of_masks(cases):
    """As in the published evaluation, boxes are removed first, because they would change the areas of the masks."""
    ground_truth, detections = cases
    without_boxes = [{key: value for key, value in entry.items() if key != "bbox"} for entry in detections]
    results = [
        detection.evaluate_coco(ground_truth, entries, kinds=["segm"]) for entries in (detections, without_boxes)
    ]
    assert results[0] == results[1]


def test_metrics_without_detections_are_zero(cases):
    metrics = detection.evaluate_coco(cases[0], [])
    assert set(metrics.values()) == {0.0}
    assert len(metrics) == 24


def test_metrics_of_absent_object_sizes_are_minus_one():
    ground_truth = to_coco_ground_truth(DigitsSource("validation"))
    assert all(entry["area"] < 96**2 for entry in ground_truth["annotations"])
    for detections in ([], make_perfect_detections(DigitsSource("validation"), 5)):
        metrics = detection.evaluate_coco(ground_truth, detections)
        for kind in ("bbox", "segm"):
            assert metrics[f"{kind}/APl"] == metrics[f"{kind}/ARl"] == -1
            assert metrics[f"{kind}/AP"] >= 0
        assert all(np.isfinite(value) for value in metrics.values())


def make_perfect_detections(source, count):
    """Convert the objects of some images to detections."""
    detections = []
    for index in range(count):
        record = source[index]
        shape = (0, *record["image"].shape[:2])
        masks = (
            np.stack([decode_mask(mask) == 1 for mask in record["masks"]]) if record["masks"] else np.zeros(shape, bool)
        )
        ids = dict(image_id=source.image_id(index), category_ids=source.category_ids)
        scores = np.linspace(0.9, 0.5, len(masks)).astype(np.float32)
        detections.extend(detection.make_detections(record["boxes"], record["labels"], scores, masks, **ids))
    return detections


def test_the_ground_truth_scores_100_percent():
    source = DigitsSource("validation")
    detections = json.loads(json.dumps(make_perfect_detections(source, len(source))))
    metrics = detection.evaluate_coco(to_coco_ground_truth(source), detections)
    for name in ("bbox/AP", "segm/AP", "bbox/AP75", "segm/APm", "bbox/AR100", "segm/AR10"):
        assert metrics[name] == pytest.approx(100)
    half = detection.evaluate_coco(to_coco_ground_truth(source), make_perfect_detections(source, 100), kinds=["bbox"])
    assert 35 < half["bbox/AP"] < 65
    assert set(half) == {f"bbox/{name}" for name in detection.NAMES}


def test_arrays_are_converted_to_coco_results():
    masks = np.zeros((3, 5, 9), bool)
    masks[0, 1:3, 2:7] = True
    boxes = np.array([[2, 1, 7, 3], [0, 0, 9, 5.5], [0, np.nan, 1, 1]], np.float32)
    scores = np.array([0.5, 0.25, 0.9], np.float32)
    labels = np.array([1, 0, 0])
    detections = detection.make_detections(boxes, labels, scores, masks, image_id=np.int64(12), category_ids=(3, 90))
    assert len(detections) == 2  # one is not finite
    assert [entry["bbox"] for entry in detections] == [[2, 1, 5, 2], [0, 0, 9, 5.5]]
    assert [entry["category_id"] for entry in detections] == [90, 3]
    assert [entry["score"] for entry in detections] == [0.5, 0.25]
    assert {entry["image_id"] for entry in detections} == {12}
    for entry, mask in zip(detections, masks, strict=False):
        np.testing.assert_array_equal(decode_mask(entry["segmentation"]), mask)
    assert json.loads(json.dumps(detections)) == detections
    without_masks = detection.make_detections(boxes, labels, scores, image_id=1, category_ids=(3, 90))
    assert "segmentation" not in without_masks[0]
    assert detection.make_detections(np.zeros((0, 4)), [], [], image_id=1, category_ids=(3,)) == []


def test_detections_with_infinite_or_nan_scores_are_left_out():
    assert detection.make_detections(np.ones((2, 4)), [0, 0], [np.inf, np.nan], image_id=1, category_ids=(3,)) == []


def test_a_detection_of_an_unknown_image_is_an_error(cases):
    ground_truth, detections = cases
    with pytest.raises(ValueError, match="The image 99 of a detection is not in the ground truth"):
        detection.evaluate_coco(ground_truth, [*detections, detections[0] | {"image_id": 99}])
