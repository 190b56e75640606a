"""What lies in a directory, recognised and read."""

import concurrent.futures
import io
import pickle
import warnings

import numpy as np
import pytest
from PIL import Image

from dat_jax.data.prepare import prepare
from dat_jax.data.sources import load_source
from dat_jax.errors import UserError
from tests.helpers.photographs import photograph_files


def encode(image, kind):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def photograph():
    with Image.open(photograph_files()[0]) as image:
        return image.convert("RGB").resize((160, 107))


@pytest.fixture
def folders(photograph, tmp_path):
    """Three classes of 2 + 3 + 1 images to train; two of them to validate."""
    layout = {
        "train": {"b": ["1.JPEG", "10.png"], "a10": ["x.webp", "y.BMP", "z.jpg"], "a2": ["k.jpeg"]},
        "val": {"b": ["v.JPEG"], "a2": ["u.jpg", "w.jpg"]},
    }
    kinds = {"webp": "WEBP", "bmp": "BMP", "png": "PNG"}
    shift = 0
    for split, classes in layout.items():
        for name, files in classes.items():
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            (folder / ".hidden.jpg").write_bytes(b"x")
            (folder / "notes.txt").write_text("x")
            for file_name in files:
                shift += 5
                kind = kinds.get(file_name.split(".")[1].lower(), "JPEG")
                (folder / file_name).write_bytes(encode(photograph.crop((shift, 0, shift + 40, 30 + shift % 3)), kind))
    (tmp_path / "train" / ".cache").mkdir()
    return tmp_path


def load(directory, split="train"):
    return load_source("", split=split, directory=str(directory))


def assert_same(left, right):
    np.testing.assert_array_equal(left["image"], right["image"])
    assert left["label"] == right["label"]


def test_folders_are_read_in_the_order_of_names(folders):
    train, validation = load(folders), load(folders, "validation")
    assert train.class_names == validation.class_names == ("a10", "a2", "b")
    wanted = [
        *(("a10", name) for name in ("x.webp", "y.BMP", "z.jpg")),
        ("a2", "k.jpeg"),
        ("b", "1.JPEG"),
        ("b", "10.png"),
    ]
    assert len(train) == len(wanted)
    for index, (class_name, name) in enumerate(wanted):
        record = train[index]
        pixels = np.asarray(Image.open(folders / "train" / class_name / name).convert("RGB"))
        np.testing.assert_array_equal(record["image"], pixels)
        assert record["image"].dtype == np.uint8
        assert train.class_names[record["label"]] == class_name
        assert record["label"].dtype == np.int32
    assert [int(validation[index]["label"]) for index in range(3)] == [1, 1, 2]
    with pytest.raises(IndexError):
        train[6]
    wanted = validation[2]
    (folders / "val").rename(folders / "validation")
    assert_same(load(folders, "validation")[2], wanted)


def test_labels_come_from_the_training_folders(folders):
    (folders / "val" / "c").mkdir()
    with pytest.raises(UserError, match=r"val has classes that the training images have not: c\."):
        load(folders, "validation")
    (folders / "train" / "c").mkdir()
    assert load(folders, "validation").class_names == ("a10", "a2", "b", "c")
    with pytest.raises(UserError, match=r"class folders of .*train hold no images: c\."):
        load(folders)


def test_a_damaged_image_is_named_once_and_passed_over_in_training(folders):
    (folders / "train" / "a10" / "y.BMP").write_bytes(b"no image")
    (folders / "train" / "b" / "10.png").write_bytes(b"")  # the last: the first follows
    source = load(folders)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            assert_same(source[1], source[2])
            assert_same(source[5], source[0])
    messages = sorted(str(warning.message) for warning in caught)
    assert len(messages) == 2
    assert "a10/y.BMP" in messages[0]
    assert "b/10.png" in messages[1]


def test_a_damaged_image_ends_an_evaluation(folders):
    path = folders / "val" / "a2" / "w.jpg"
    path.write_bytes(b"no image")
    source = load(folders, "validation")
    source[0]
    with pytest.raises(UserError, match=r"a2/w.jpg .*`python -m dat_jax.data.prepare` finds all such files"):
        source[1]
    path.unlink()
    with pytest.raises(UserError, match=r"w.jpg cannot be read from .*No such file"):
        source[1]


def test_training_ends_where_nothing_can_be_read(folders):
    source = load(folders)
    (folders / "train").rename(folders / "away")
    with (
        pytest.warns(UserWarning, match="The next one is taken"),
        pytest.raises(UserError, match="cannot be read from"),
    ):
        source[0]


@pytest.fixture
def prepared(folders):
    output = folders / "data" / "images" / "1.0.0"
    prepare(train=str(folders / "train"), validation=str(folders / "val"), output=str(output), records_per_shard=3)
    return output


def test_a_tfds_directory_is_found_up_to_two_levels_below(folders, prepared, tmp_path):
    wanted = load(folders)
    for directory in (prepared, prepared.parent, prepared.parent.parent):
        source = load(directory)
        assert len(source) == 6
        assert source.class_names == ("a10", "a2", "b")
        assert_same(source[4], wanted[4])
    (prepared / "copy").mkdir()
    second = prepared.with_name("2.0.0")
    second.mkdir()
    for name in ("dataset_info.json", "features.json"):
        (second / name).write_bytes((prepared / name).read_bytes())
    with pytest.raises(UserError, match=r"several data sets, choose one of them: .*images/1.0.0, .*images/2.0.0"):
        load(prepared.parent.parent)


def test_a_tfds_directory_without_validation_gives_its_test_split(prepared):
    info = prepared / "dataset_info.json"
    text = info.read_text()
    wanted = load(prepared, "validation")[0]
    for path in prepared.glob("*-validation.*"):
        path.rename(prepared / path.name.replace("-validation.", "-test."))
    info.write_text(text.replace('"validation"', '"test"'))
    assert_same(load(prepared, "validation")[0], wanted)
    info.write_text(text.replace('"validation"', '"held_out"'))
    with pytest.raises(UserError, match="has the splits train, held_out: wanted validation or test"):
        load(prepared, "validation")


def test_sources_are_pickled_and_read_by_threads(folders, prepared):
    for directory in (folders, prepared):
        source = load(directory)
        first = [source[index] for index in range(len(source))]
        copy = pickle.loads(pickle.dumps(source))
        assert copy.class_names == source.class_names
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            for index, record in enumerate(pool.map(lambda i, copy=copy: copy[i % 6], range(60))):
                assert_same(record, first[index % 6])


def test_damaged_tfds_directories_are_refused(prepared):
    info, features = prepared / "dataset_info.json", prepared / "features.json"
    text = info.read_text()
    info.write_text(text.replace("array_record", "tfrecord"))
    with pytest.raises(UserError, match="is in the format tfrecord: wanted array_record"):
        load(prepared)
    info.write_text("{")
    with pytest.raises(UserError, match="The metadata of the data set in .* cannot be read"):
        load(prepared)
    info.write_text(text)
    whole = features.read_text()
    features.write_text(whole.replace('"label"', '"class"'))
    with pytest.raises(UserError, match="has class, file_name, image: wanted an image and a label"):
        load(prepared)
    features.write_text(whole)
    shard = prepared / "images-validation.array_record-00000-of-00001"
    content = shard.read_bytes()
    source = load(prepared, "validation")
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"The image 0 of validation in .* cannot be read"):
        source[0]
    shard.unlink()
    with pytest.raises(UserError, match=r"files are missing: images-validation.array_record-00000-of-00001\."):
        load(prepared, "validation")


def test_other_directories_are_refused(tmp_path):
    with pytest.raises(UserError, match="There is no directory nowhere"):
        load("nowhere")
    with pytest.raises(
        UserError, match="holds no data set: wanted dataset_info.json and features.json .* found nothing"
    ):
        load(tmp_path)
    (tmp_path / "photographs").mkdir()
    with pytest.raises(UserError, match="train/<class> and val/<class> .* found photographs"):
        load(tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match="train holds no images in class folders"):
        load(tmp_path)
    with pytest.raises(UserError, match="no folder of the validation images: wanted val or validation"):
        load(tmp_path, "validation")


def test_an_unknown_name_says_how_to_give_a_directory():
    with pytest.raises(UserError, match=r"Unknown data set 'imagenet'; choose one of mnist5k.*config\.data\.directory"):
        load_source("imagenet", split="train")
