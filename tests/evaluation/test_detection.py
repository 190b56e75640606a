"""COCO's average precision: the published evaluation's numbers, and what is said of extremes."""

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


def test_the_numbers_are_the_recorded_ones(golden, cases):
    before = json.dumps(cases)
    metrics = detection.evaluate_coco(*cases)
    assert json.loads(str(golden["stat_names"])) == list(detection.NAMES)
    assert len(metrics) == 24
    assert next(iter(metrics)) == detection.METRIC
    for kind in ("bbox", "segm"):
        for name, wanted in zip(detection.NAMES, golden[f"{kind}.stats"], strict=True):
            assert abs(metrics[f"{kind}/{name}"] - 100 * wanted) < 1e-7, (kind, name)
    assert json.dumps(cases) == before


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_the_curves_are_the_recorded_ones(golden, cases, kind, capsys):
    curves = detection.compute_curves(*cases, kind=kind)
    np.testing.assert_allclose(curves["stats"], golden[f"{kind}.stats"], atol=1e-9, rtol=0)
    np.testing.assert_allclose(curves["recall"], golden[f"{kind}.recall"], atol=1e-9, rtol=0)
    np.testing.assert_allclose(curves["precision"], golden[f"{kind}.precision"], atol=1e-7, rtol=0)  # kept as float32
    per_class = curves["precision"][:, :, :, 0, -1]
    means = [values[values > -1].mean() if (values > -1).any() else -1 for values in np.moveaxis(per_class, 2, 0)]
    np.testing.assert_allclose(means, golden[f"{kind}.ap_per_class"], atol=1e-9, rtol=0)
    assert capsys.readouterr().out == ""


def test_boxes_would_change_the_areas_of_masks(golden, cases):
    """The published evaluation takes them away first, and so is it here; with them small, medium and large would differ."""
    truth, found = cases
    bare = [{key: value for key, value in entry.items() if key != "bbox"} for entry in found]
    with_boxes, without = (detection.evaluate_coco(truth, entries, kinds=["segm"]) for entries in (found, bare))
    assert with_boxes == without


def test_nothing_found_is_zero(cases):
    metrics = detection.evaluate_coco(cases[0], [])
    assert set(metrics.values()) == {0.0}
    assert len(metrics) == 24


def test_sizes_that_do_not_occur_are_minus_one():
    truth = to_coco_ground_truth(DigitsSource("validation"))
    assert all(entry["area"] < 96**2 for entry in truth["annotations"])
    for found in ([], perfect(DigitsSource("validation"), 5)):
        metrics = detection.evaluate_coco(truth, found)
        for kind in ("bbox", "segm"):
            assert metrics[f"{kind}/APl"] == metrics[f"{kind}/ARl"] == -1
            assert metrics[f"{kind}/AP"] >= 0
        assert all(np.isfinite(value) for value in metrics.values())


def perfect(source, count):
    """The objects of some images as results of an image, boxes as float32, masks as bitmaps."""
    found = []
    for index in range(count):
        record = source[index]
        shape = (0, *record["image"].shape[:2])
        masks = (
            np.stack([decode_mask(mask) == 1 for mask in record["masks"]]) if record["masks"] else np.zeros(shape, bool)
        )
        number = dict(image_id=source.image_id(index), category_ids=source.category_ids)
        scores = np.linspace(0.9, 0.5, len(masks)).astype(np.float32)
        found.extend(detection.make_detections(record["boxes"], record["labels"], scores, masks, **number))
    return found


def test_the_ground_truth_itself_is_a_hundred_percent():
    source = DigitsSource("validation")
    found = json.loads(json.dumps(perfect(source, len(source))))
    metrics = detection.evaluate_coco(to_coco_ground_truth(source), found)
    for name in ("bbox/AP", "segm/AP", "bbox/AP75", "segm/APm", "bbox/AR100", "segm/AR10"):
        assert metrics[name] == pytest.approx(100)
    half = detection.evaluate_coco(to_coco_ground_truth(source), perfect(source, 100), kinds=["bbox"])
    assert 35 < half["bbox/AP"] < 65
    assert set(half) == {f"bbox/{name}" for name in detection.NAMES}


def test_arrays_become_results():
    masks = np.zeros((3, 5, 9), bool)
    masks[0, 1:3, 2:7] = True
    boxes = np.array([[2, 1, 7, 3], [0, 0, 9, 5.5], [0, np.nan, 1, 1]], np.float32)
    scores = np.array([0.5, 0.25, 0.9], np.float32)
    labels = np.array([1, 0, 0])
    found = detection.make_detections(boxes, labels, scores, masks, image_id=np.int64(12), category_ids=(3, 90))
    assert len(found) == 2  # one is not finite
    assert [entry["bbox"] for entry in found] == [[2, 1, 5, 2], [0, 0, 9, 5.5]]
    assert [entry["category_id"] for entry in found] == [90, 3]
    assert [entry["score"] for entry in found] == [0.5, 0.25]
    assert {entry["image_id"] for entry in found} == {12}
    for entry, mask in zip(found, masks, strict=False):
        np.testing.assert_array_equal(decode_mask(entry["segmentation"]), mask)
    assert json.loads(json.dumps(found)) == found
    bare = detection.make_detections(boxes, labels, scores, image_id=1, category_ids=(3, 90))
    assert "segmentation" not in bare[0]
    assert detection.make_detections(np.zeros((0, 4)), [], [], image_id=1, category_ids=(3,)) == []


def test_scores_that_are_not_finite_are_left_out():
    found = detection.make_detections(np.ones((2, 4)), [0, 0], [np.inf, np.nan], image_id=1, category_ids=(3,))
    assert found == []


def test_a_result_of_another_image_is_an_error(cases):
    truth, found = cases
    with pytest.raises(ValueError, match="The image 99 of a detection is none of the ground truth"):
        detection.evaluate_coco(truth, [*found, found[0] | {"image_id": 99}])
