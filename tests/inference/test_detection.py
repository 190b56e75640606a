"""Detectors as functions of images."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image

import dat_jax
from dat_jax import inference
from dat_jax.checkpoints.exports import export_model
from dat_jax.data import coco_names
from dat_jax.data.detection_transforms import make_detection_eval_transform
from dat_jax.errors import UserError
from dat_jax.ops.detection.masks import paste_masks
from dat_jax.tasks.detection.objective import default_settings, make_detection_objective
from dat_jax.tasks.preprocessing import normalize
from tests.helpers import tiny_detection
from tests.helpers.photographs import photographs

SMALL = dict(long_side=64, short_side=64, candidates=50, proposals=20, max_detections=5)


def export_detector(directory, head="mask_rcnn", **options):
    model, variables = tiny_detection.random_detector(head, **options)
    export_model(directory, model=model, variables=variables)
    return directory


def detect(trained, image, *, scale=(64, 64), **settings):
    """Detections computed with the model directly."""
    model, variables = dat_jax.load_pretrained(trained)
    record = make_detection_eval_transform(scale=scale)({"image": image})
    batch = {name: record[name][None] for name in ("image", "valid", "scale")}
    task = make_detection_objective(model, settings=dataclasses.replace(default_settings(model), **settings))
    outputs = {name: np.asarray(values[0]) for name, values in jax.jit(task.predict)(variables, batch).items()}
    outputs = {name: values[outputs["valid"]] for name, values in outputs.items()}
    if "masks" in outputs:
        outputs["masks"] = paste_masks(outputs["masks"], outputs["boxes"], image.shape[:2], threshold=0.5)
    return outputs


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    return export_detector(tmp_path_factory.mktemp("export") / "export")


@pytest.mark.slow
@pytest.mark.parametrize("head", tiny_detection.DETECTORS)
def test_detector_returns_the_detections_of_the_model(head, tmp_path):
    directory, image = export_detector(tmp_path / "export", head), photographs(width=96, height=64)[0]
    detections = inference.load(directory, **SMALL)(image)
    settings = dict(candidates=50) if head == "retinanet" else dict(test_candidates=50, test_proposals=20)
    expected = detect(directory, image, max_detections=5, **settings)
    assert len(detections["boxes"]) == 5
    assert len(set(detections["labels"].tolist())) > 1 or head == "cascade_mask_rcnn"
    for name in ("boxes", "scores", "labels"):
        np.testing.assert_array_equal(detections[name], expected[name], err_msg=name)
    if head == "retinanet":
        assert detections["masks"] is None
    else:
        assert (detections["masks"].dtype, detections["masks"].shape) == (bool, (5, 64, 96))
        np.testing.assert_array_equal(detections["masks"], expected["masks"])


def test_a_model_of_80_classes_has_the_names_of_coco(tmp_path):
    directory = export_detector(tmp_path / "export", "retinanet", num_classes=80)
    detector = inference.load(directory)
    assert detector.class_names == coco_names.CLASS_NAMES
    assert detector.category_ids == coco_names.CATEGORY_IDS
    assert (detector.transform.scale, detector.transform.multiple, detector.min_score) == ((1333, 800), 32, 0.3)
    (tmp_path / "names.txt").write_text("".join(f"name {k}\n" for k in range(80)))
    detector = inference.load(directory, classes=tmp_path / "names.txt")
    assert detector.class_names[79] == "name 79"
    assert detector.category_ids == coco_names.CATEGORY_IDS


def test_coco_names_have_their_category_ids():
    assert len(set(coco_names.CLASS_NAMES)) == len(coco_names.CATEGORY_IDS) == 80
    numbers = dict(zip(coco_names.CLASS_NAMES, coco_names.CATEGORY_IDS, strict=True))
    expected = {"person": 1, "stop sign": 13, "backpack": 27, "wine glass": 46, "dining table": 67, "toothbrush": 90}
    assert {name: numbers[name] for name in expected} == expected


def test_category_ids_of_other_classes_start_at_1(export):
    detector = inference.load(export)
    assert (detector.class_names, detector.category_ids) == (("0", "1", "2"), (1, 2, 3))
    assert len({tuple(color) for color in detector.palette.tolist()}) == 3


@pytest.mark.slow
def test_detections_above_the_minimum_score_are_drawn(export, tmp_path):
    detector, image = inference.load(export, min_score=0.5, **SMALL), photographs(width=64, height=64)[0]
    prediction = detector(image)
    drawn = detector.filter_by_score(prediction)
    assert 0 < len(drawn["boxes"]) < len(prediction["boxes"]) == 5
    assert drawn["masks"].shape == (len(drawn["scores"]), 64, 64)
    description = detector.describe(prediction)
    scores = [score for value in description.values() for score in value.split()]
    assert sorted(scores, reverse=True) == [f"{score:.2f}" for score in drawn["scores"]]
    assert next(iter(description)) == str(prediction["labels"][0])
    detector.save(tmp_path / "some.png", image, prediction)
    detector.save(tmp_path / "none.png", image, {name: values[:0] for name, values in prediction.items()})
    some, none = (np.array(Image.open(tmp_path / f"{name}.png").convert("RGB")) for name in ("some", "none"))
    np.testing.assert_array_equal(none, np.repeat(np.repeat(image, 10, axis=0), 10, axis=1))
    changed = (some != none).any(axis=-1)
    x1, y1, _, y2 = drawn["boxes"][0]
    assert changed[:, round(10 * x1) - 1 : round(10 * x1) + 2][round(10 * y1) : round(10 * y2)].any(axis=1).mean() > 0.9
    # Pixels inside masks are colored, those outside are not.
    centers = np.s_[5::10, 5::10]
    assert changed[centers][drawn["masks"].any(axis=0)].mean() > 0.9
    assert changed[centers][~drawn["masks"].any(axis=0)].mean() < 0.5


@pytest.mark.slow
def test_a_lower_minimum_score_also_lowers_the_score_threshold(export):
    image = photographs(width=64, height=64)[0]
    fewer, more = (
        inference.load(export, min_score=score, **{**SMALL, "score_threshold": 0.5})(image)["scores"]
        for score in (0.5, 0.3)
    )
    assert 0 < len(fewer) < len(more) == 5
    np.testing.assert_allclose(more[: len(fewer)], fewer)


@pytest.mark.slow
def test_sampled_points_are_those_of_the_backbone(export):
    image = photographs(width=96, height=64)[1]
    sampled = inference.load(export, **SMALL, buckets="64x96").sample(image)  # within a larger array
    assert sampled["image"].shape == (64, 64, 3)  # 43 rows and padding
    assert not sampled["image"][43:].any()
    model, variables = dat_jax.load_pretrained(export)
    backbone = {"params": variables["params"]["backbone"]["dat"]}
    images = normalize(sampled["image"][None]).at[:, 43:].set(0)
    _, state = model.dat.apply(backbone, images, method="features", mutable=["intermediates"])
    expected = state["intermediates"]["stages_3"]["blocks_0"]["attn"]["positions"][0][0]
    assert sampled["map_shapes"] == {"stages_3/blocks_0": (2, 2)}
    np.testing.assert_allclose(sampled["positions"]["stages_3/blocks_0"], expected, atol=1e-5)


@pytest.mark.slow
def test_options_and_class_names_are_read_from_the_work_directory(export, tmp_path):
    config = tiny_detection.get_config("retinanet").unlock()
    config.data.test_short_side, config.eval.multiple = 48, 64
    (tmp_path / "config.json").write_text(config.to_json_best_effort())
    (tmp_path / "classes.txt").write_text("one\ntwo\nthree\n")
    model, variables = dat_jax.load_pretrained(export)
    detector = inference.detection.from_trained(tmp_path, model, variables)
    assert (detector.transform.scale, detector.transform.multiple) == ((64, 48), 64)
    assert (detector.class_names, detector.category_ids) == (("one", "two", "three"), (1, 2, 3))
    assert len(detector(photographs(width=64, height=64)[0])["boxes"]) == 5
    (tmp_path / "config.json").write_text(json.dumps({"data": {"test_short_side": 40}}))  # of an older version
    detector = inference.detection.from_trained(tmp_path, model, variables)
    assert (detector.transform.scale, detector.transform.multiple) == ((1333, 40), 32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratios": (1.0,)}, "Unknown option 'ratios' of a detector; the options are long_side, short_side"),
        ({"short_side": 0}, "short_side must be at least 1, got 0"),
        ({"max_detections": 0}, "max_detections must be at least 1, got 0"),
        ({"min_score": 1.5}, "min_score must be from 0 to 1, got 1.5"),
        ({"min_score": float("nan")}, "min_score must be from 0 to 1, got nan"),
    ],
)
def test_invalid_options_are_reported(options, message, export):
    with pytest.raises(UserError, match=message):
        inference.load(export, **options)
