"""Files of an evaluation: metrics of each class, and the confusion matrix."""

import csv

import numpy as np
import pytest
from PIL import Image

from dat_jax.evaluation.detection import make_evaluator
from dat_jax.evaluation.results import Evaluation, describe_worst_classes, save_class_results

NAMES = ("cat, tabby", 'a "quoted" name', "猫")
CONFUSION = np.array([[3, 1, 0], [0, 0, 2], [0, 0, 0]])


@pytest.fixture
def evaluation():
    top1 = np.array([75.0, 0.0, np.nan])
    return Evaluation({"top1": 50.0}, {"top1": top1, "examples": np.array([4.0, 2.0, 0.0])}, CONFUSION)


def read_csv(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def test_tables_and_figure_are_written(evaluation, tmp_path):
    files = save_class_results(evaluation, class_names=NAMES, directory=tmp_path / "run")
    assert [path.name for path in files] == ["per_class.csv", "confusion.csv", "confusion.png"]
    assert read_csv(files[0]) == [
        ["class", "top1", "examples"],
        [NAMES[0], "75", "4"],
        [NAMES[1], "0", "2"],
        [NAMES[2], "", "0"],
    ]
    assert read_csv(files[1]) == [
        ["label / prediction", *NAMES],
        *([name, *map(str, row)] for name, row in zip(NAMES, CONFUSION.tolist(), strict=True)),
    ]
    with Image.open(files[2]) as image:
        assert np.asarray(image.convert("L")).std() > 10


def test_files_of_further_sets_carry_their_names(evaluation, tmp_path):
    files = save_class_results(evaluation, class_names=NAMES, directory=tmp_path, name="v2")
    assert [path.name for path in files] == ["per_class_v2.csv", "confusion_v2.csv", "confusion_v2.png"]
    assert save_class_results(Evaluation({"top1": 1.0}), class_names=NAMES, directory=tmp_path / "none") == []
    assert not (tmp_path / "none").exists()


def test_a_thousand_classes_are_drawn(tmp_path):
    evaluation = Evaluation({}, {}, np.eye(1000, dtype=int))
    files = save_class_results(evaluation, class_names=[f"class {k}" for k in range(1000)], directory=tmp_path)
    with Image.open(files[-1]) as image:
        assert max(image.size) < 2000


def test_the_worst_classes_are_named_and_those_without_examples_left_out(evaluation):
    assert describe_worst_classes(evaluation, class_names=NAMES) == 'a "quoted" name (0), cat, tabby (75)'
    assert describe_worst_classes(Evaluation({}), class_names=NAMES) == ""


def test_precision_of_categories_has_the_order_of_the_labels():
    """Labels 0, 1, 2 are categories 9, 2, 5; all objects of category 9 are found, of 5 none, and 2 has no object."""
    box = [10.0, 10.0, 20.0, 20.0]
    truth = {
        "images": [{"id": 1, "height": 40, "width": 40}],
        "annotations": [
            {"id": k, "image_id": 1, "category_id": category, "bbox": box, "area": 400.0, "iscrowd": 0}
            for k, category in ((1, 9), (2, 5))
        ],
        "categories": [{"id": number, "name": str(number)} for number in (2, 5, 9)],
    }

    def predict(variables, batch):
        corners = np.array([[[10.0, 10.0, 30.0, 30.0]]], np.float32)
        arrays = {"boxes": corners, "scores": np.ones((1, 1)), "labels": np.zeros((1, 1), int)}
        return arrays | {"valid": np.ones((1, 1), bool)}

    evaluate = make_evaluator(predict, load_ground_truth=lambda: truth, category_ids=(9, 2, 5), masks=False)
    batch = {
        "image": np.zeros((1, 40, 40, 3), np.uint8),
        "valid": np.array([[40, 40]]),
        "scale": np.ones((1, 2), np.float32),
        "original": np.array([[40, 40]]),
        "index": np.array([0]),
        "mask": np.ones(1, np.float32),
    }
    evaluation = evaluate({}, [batch])
    np.testing.assert_allclose(evaluation.per_class["bbox/AP"], [100, np.nan, 0])
    assert evaluation.metrics["bbox/AP"] == pytest.approx(50)
