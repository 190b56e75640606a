"""Additional evaluation sets: folders named by class or label, prepared data sets, the Reassessed Labels."""

import json

import numpy as np
import pytest
from PIL import Image

from dat_jax.data.eval_sets import index_by_name_or_number, load_eval_sets
from dat_jax.data.prepare import prepare
from dat_jax.data.sources import ArraySource, load_source
from dat_jax.errors import UserError
from tests.helpers.photographs import photographs

CLASSES = tuple(f"n{number:08}" for number in range(4))


def save(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Folders of four classes, with the published names of validation images."""
    directory = tmp_path_factory.mktemp("data")
    images = photographs(width=40, height=30)
    for number, name in enumerate(CLASSES):
        save(directory / "train" / name / "a.png", images[number])
        save(directory / "val" / name / f"ILSVRC2012_val_{4 - number:08}.png", images[number + 4])
    return directory


@pytest.fixture(scope="module")
def validation(data):
    return load_source("", directory=str(data), split="validation")


def test_folders_of_some_classes_are_labeled_by_name(data, validation, tmp_path):
    image = photographs(width=40, height=30)[9]
    for name in (CLASSES[3], CLASSES[1]):
        save(tmp_path / name / "x.png", image)
    [(name, (source, classes))] = load_eval_sets({"r": str(tmp_path), "a": ""}, validation).items()
    assert name == "r"
    assert list(classes) == [1, 3]
    assert [int(source[index]["label"]) for index in range(len(source))] == [1, 3]
    np.testing.assert_array_equal(source[0]["image"], image)


def test_folders_named_by_numbers_are_labels(validation, tmp_path):
    for number in range(4):
        save(tmp_path / str(number) / "x.png", photographs(width=40, height=30)[number])
    source, classes = load_eval_sets({"v2": str(tmp_path)}, validation)["v2"]
    assert classes is None  # all of them
    assert [int(source[index]["label"]) for index in range(4)] == [0, 1, 2, 3]
    assert list(index_by_name_or_number(["10", "2"], [f"c{i}" for i in range(11)], place="here")) == [10, 2]


def test_a_prepared_data_set_is_relabeled(data, validation, tmp_path):
    for name in CLASSES[2:]:
        save(tmp_path / "images" / name / "x.png", photographs(width=40, height=30)[0])
    images = str(tmp_path / "images")
    prepare(train=images, validation=images, output=str(tmp_path / "prepared"))
    source, classes = load_eval_sets({"sketch": str(tmp_path / "prepared")}, validation)["sketch"]
    assert list(classes) == [2, 3]
    assert [int(source[index]["label"]) for index in range(2)] == [2, 3]


def test_reassessed_labels_are_matched_by_image_number(validation, tmp_path):
    (tmp_path / "real.json").write_text(json.dumps([[3, 1], [2], [], [0]]))
    source, classes = load_eval_sets({"real": str(tmp_path / "real.json")}, validation)["real"]
    assert classes is None
    assert [list(np.flatnonzero(source[index]["acceptable"])) for index in range(4)] == [[0], [], [2], [1, 3]]
    np.testing.assert_array_equal(source[1]["image"], validation[1]["image"])


def test_invalid_sets_are_rejected(data, validation, tmp_path):
    with pytest.raises(UserError, match="There is no directory .*nowhere"):
        load_eval_sets({"a": str(tmp_path / "nowhere")}, validation)
    save(tmp_path / "set" / "dog" / "x.png", photographs(width=40, height=30)[0])
    with pytest.raises(
        UserError, match="has classes that the model's data set does not have: dog; expected .* the 4 classes"
    ):
        load_eval_sets({"a": str(tmp_path / "set")}, validation)
    with pytest.raises(UserError, match="Reassessed Labels .* cannot be read"):
        load_eval_sets({"real": str(tmp_path / "real.json")}, validation)
    (tmp_path / "real.json").write_text("[[7]]")
    with pytest.raises(UserError, match="have labels outside the 4 classes"):
        load_eval_sets({"real": str(tmp_path / "real.json")}, validation)
    (tmp_path / "real.json").write_text("[[0], [1]]")
    source, _ = load_eval_sets({"real": str(tmp_path / "real.json")}, validation)["real"]
    with pytest.raises(UserError, match="expect images named ILSVRC2012_val_00000001 to 00000002, got .*00000004"):
        source[0]
    digits = ArraySource(np.zeros((1, 8, 8, 3), np.uint8), np.zeros(1, np.int32), ("0",))
    with pytest.raises(UserError, match="require the validation images of ImageNet"):
        load_eval_sets({"real": str(tmp_path / "real.json")}, digits)
