"""Results of detectors in COCO's format: the ids of the data, and the evaluation of pycocotools."""

import contextlib
import dataclasses
import io
import json
import pathlib

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from dat_jax import inference
from dat_jax.checkpoints.exports import export_model
from dat_jax.data.coco_ids import CATEGORIES, find_image_ids, format_categories, read_category_ids
from dat_jax.errors import UserError
from dat_jax.exporting.files import write_exported
from dat_jax.inference.command import predict_files
from dat_jax.tasks.detection.task import DetectionTask
from tests.helpers import tiny_detection

SIDE = 64
CATEGORY_IDS, NAMES = (0, 7, 90), ("red", "green", "blue")
BOXES = {0: ("b.png", 0, (4, 8, 20, 30)), 5: ("a.png", 1, (30, 2, 25, 40)), 400: ("sub/c.png", 2, (10, 10, 40, 20))}


@pytest.fixture(scope="module")
def model():
    return tiny_detection.random_detector("retinanet")


@pytest.fixture
def data(tmp_path):
    """Three images, each with a rectangle in the color of its class, and their annotations."""
    content = {"images": [], "annotations": [], "categories": []}
    for number, name in zip(CATEGORY_IDS, NAMES, strict=True):
        content["categories"].insert(0, {"id": number, "name": name})
    for number, (name, label, (x, y, width, height)) in BOXES.items():
        image = np.zeros((SIDE, SIDE, 3), np.uint8)
        image[y : y + height, x : x + width, label] = 255
        for split in ("train", "val"):
            (tmp_path / split / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(tmp_path / split / name)
        content["images"].append({"id": number, "file_name": name, "height": SIDE, "width": SIDE})
        annotation = {"id": len(content["annotations"]) + 1, "image_id": number, "category_id": CATEGORY_IDS[label]}
        annotation |= {"bbox": [x, y, width, height], "area": width * height, "iscrowd": 0}
        content["annotations"].append(annotation)
    (tmp_path / "annotations").mkdir()
    for split in ("train", "val"):
        (tmp_path / "annotations" / f"{split}.json").write_text(json.dumps(content))
    return tmp_path


def list_images(data) -> list[pathlib.Path]:
    return [data / "val" / name for name, _, _ in BOXES.values()]


def detect_rectangle(variables, batch):
    """Stand-in for the network that finds the bright rectangle."""
    del variables
    rows, columns, channels = np.nonzero(batch["image"][0] > 128)
    box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    outputs = {"boxes": np.array([box], np.float32) / batch["scale"][0], "scores": np.array([0.9], np.float32)}
    outputs |= {"labels": np.array([channels[0]], np.int32), "valid": np.array([True])}
    return {name: values[None] for name, values in outputs.items()}


def predict(monkeypatch, predictor, images, file, **options):
    predictor = dataclasses.replace(predictor, predict=detect_rectangle)
    monkeypatch.setattr(inference, "load", lambda path, **options: predictor)
    names = [str(path) for path in images]
    return predict_files("trained", names, json_file=str(file), overwrite=True, options={}, **options)


def evaluate(annotations, results) -> float:
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
        evaluation = COCOeval(truth, truth.loadRes(str(results)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats[0]


def make_workdir(data, directory):
    """Write what a run on the data writes into its work directory, without a checkpoint."""
    config = tiny_detection.get_config("retinanet").unlock()
    config.data.directory = str(data)
    task = DetectionTask(config)
    assert task.class_names == NAMES
    directory.mkdir()
    (directory / "config.json").write_text(config.to_json_best_effort())
    (directory / "classes.txt").write_text("".join(f"{name}\n" for name in NAMES))
    for name, text in task.description_files().items():
        (directory / name).write_text(text)
    return directory


def test_results_with_annotations_are_those_of_the_data_for_pycocotools(data, model, tmp_path, monkeypatch, capsys):
    workdir = make_workdir(data, tmp_path / "run")
    predictor = inference.detection.from_trained(workdir, *model)
    assert predictor.category_ids == CATEGORY_IDS
    annotations, results = data / "annotations/val.json", tmp_path / "results.json"
    assert predict(monkeypatch, predictor, list_images(data), results, annotations=str(annotations))
    entries = json.loads(results.read_text())
    assert [(entry["image_id"], entry["category_id"]) for entry in entries] == [(0, 0), (5, 7), (400, 90)]
    assert evaluate(annotations, results) == pytest.approx(1.0)
    assert "ids are those of" in capsys.readouterr().out.splitlines()[-1]


def test_an_export_keeps_the_category_ids(data, model, tmp_path):
    workdir = make_workdir(data, tmp_path / "run")
    predictor = inference.detection.from_trained(workdir, *model)
    manifest = write_exported(tmp_path / "export", predictor, formats=["orbax"], batch=1)
    assert manifest["category_ids"] == list(CATEGORY_IDS)
    exported = inference.load(tmp_path / "export")
    assert (exported.class_names, exported.category_ids) == (NAMES, CATEGORY_IDS)
    with pytest.raises(UserError, match=r"category_ids must be 3 different integers, got \(1, 1, 2\)"):
        inference.load(tmp_path / "export", category_ids=(1, 1, 2))


def test_a_model_without_category_ids_takes_those_of_the_annotations(data, model, tmp_path, monkeypatch, capsys):
    export_model(tmp_path / "old", model=model[0], variables=model[1], classes=NAMES)
    predictor = inference.load(tmp_path / "old")
    assert predictor.category_ids == (1, 2, 3)
    annotations, results = data / "annotations/val.json", tmp_path / "results.json"
    assert predict(monkeypatch, predictor, list_images(data), results, annotations=str(annotations))
    assert evaluate(annotations, results) == pytest.approx(1.0)
    other = dataclasses.replace(predictor, class_names=("red", "green", "violet"))
    assert predict(monkeypatch, other, list_images(data), results, annotations=str(annotations))
    assert [entry["category_id"] for entry in json.loads(results.read_text())] == [1, 2, 3]
    assert "violet" in capsys.readouterr().out.splitlines()[-1]


def test_without_annotations_a_line_says_how_images_are_numbered(data, model, tmp_path, monkeypatch, capsys):
    predictor, results = (
        inference.detection.from_trained(make_workdir(data, tmp_path / "run"), *model),
        tmp_path / "x.json",
    )
    assert predict(monkeypatch, predictor, list_images(data), results)
    assert [entry["image_id"] for entry in json.loads(results.read_text())] == [1, 2, 3]
    assert "image ids are 1 to 3" in capsys.readouterr().out.splitlines()[-1]
    (data / "val/b.png").rename(data / "val/000000000017.png")
    assert predict(monkeypatch, predictor, [data / "val/000000000017.png"], results)
    assert [entry["image_id"] for entry in json.loads(results.read_text())] == [17]
    assert "the numbers in the file names" in capsys.readouterr().out.splitlines()[-1]


def test_images_that_the_annotations_do_not_list_are_named(data, monkeypatch):
    annotations = data / "annotations/val.json"
    (data / "val/other.png").write_bytes((data / "val/a.png").read_bytes())
    with pytest.raises(UserError, match=r"not in .*val\.json: .*other\.png\.$"):
        find_image_ids(annotations, [data / "val/a.png", data / "val/other.png"])
    with pytest.raises(UserError, match=r"one image for two files: .*val/a\.png and .*train/a\.png"):
        find_image_ids(annotations, [data / "val/a.png", data / "train/a.png"])
    monkeypatch.chdir(data / "val/sub")
    assert find_image_ids(annotations, [pathlib.Path("c.png")])[0] == [400]


def test_image_ids_need_no_annotations(data):
    path = data / "annotations/val.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({"images": content["images"]}))
    assert find_image_ids(path, list_images(data)) == ([0, 5, 400], {})
    path.write_text(json.dumps({"images": [*content["images"], {**content["images"][0], "id": 8}]}))
    with pytest.raises(UserError, match=r"val\.json has several image ids for the file b\.png"):
        find_image_ids(path, list_images(data))
    path.write_text("{}")
    with pytest.raises(UserError, match="have no list 'images'"):
        find_image_ids(path, list_images(data))


def test_recorded_category_ids_follow_the_names(tmp_path):
    file = tmp_path / CATEGORIES
    assert read_category_ids(file, NAMES) is None
    file.write_text(format_categories((90, 0, 7), ("blue", "red", "green")), encoding="utf-8")
    assert read_category_ids(file, NAMES) == CATEGORY_IDS
    assert read_category_ids(file, ("x", "y", "z")) == (90, 0, 7)
    with pytest.raises(UserError, match="expected 2 categories, got 3"):
        read_category_ids(file, NAMES[:2])
    file.write_text("[1]")
    with pytest.raises(UserError, match=r"categories\.json cannot be read: expected a list of categories"):
        read_category_ids(file, NAMES)


def test_annotations_are_only_for_the_results_of_detectors(data, model, tmp_path, monkeypatch):
    predictor = inference.detection.from_trained(make_workdir(data, tmp_path / "run"), *model)
    monkeypatch.setattr(inference, "load", lambda path, **options: predictor)
    with pytest.raises(UserError, match="--annotations"):
        predict_files("run", [str(list_images(data)[0])], annotations="val.json", options={})
