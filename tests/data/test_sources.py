"""Sources of labeled images: layouts of directories, damaged images and invalid data sets."""

import concurrent.futures
import io
import pickle

import numpy as np
import pytest
from PIL import Image

from dat_jax.data.prepare import prepare
from dat_jax.data.sources import describe_damage, load_source
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
    """Three classes with 2 + 3 + 1 training images; two of them have validation images."""
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


def assert_equal(left, right):
    np.testing.assert_array_equal(left["image"], right["image"])
    assert left["label"] == right["label"]


def test_folders_are_read_in_the_order_of_class_and_file_names(folders):
    train, validation = load(folders), load(folders, "validation")
    assert train.class_names == validation.class_names == ("a10", "a2", "b")
    expected = [
        *(("a10", name) for name in ("x.webp", "y.BMP", "z.jpg")),
        ("a2", "k.jpeg"),
        ("b", "1.JPEG"),
        ("b", "10.png"),
    ]
    assert len(train) == len(expected)
    for index, (class_name, name) in enumerate(expected):
        record = train[index]
        pixels = np.asarray(Image.open(folders / "train" / class_name / name).convert("RGB"))
        np.testing.assert_array_equal(record["image"], pixels)
        assert record["image"].dtype == np.uint8
        assert train.class_names[record["label"]] == class_name
        assert record["label"].dtype == np.int32
    assert [int(validation[index]["label"]) for index in range(3)] == [1, 1, 2]
    with pytest.raises(IndexError):
        train[6]
    record = validation[2]
    (folders / "val").rename(folders / "validation")
    assert_equal(load(folders, "validation")[2], record)


def test_labels_come_from_the_training_folders(folders):
    (folders / "val" / "c").mkdir()
    with pytest.raises(UserError, match=r"val has classes that are missing in the training images: c\."):
        load(folders, "validation")
    (folders / "train" / "c").mkdir()
    assert load(folders, "validation").class_names == ("a10", "a2", "b", "c")
    with pytest.raises(UserError, match=r"class folders of .*train contain no images: c\."):
        load(folders)


def test_training_skips_damaged_images(folders):
    (folders / "train" / "a10" / "y.BMP").write_bytes(b"no image")
    (folders / "train" / "b" / "10.png").write_bytes(b"")  # the last one, which is replaced by the first
    source = load(folders)
    assert_equal(source[1], source[2])
    assert_equal(source[5], source[0])
    assert "a10/y.BMP" in describe_damage(source, 1)
    assert "b/10.png" in describe_damage(source, 5)
    assert describe_damage(source, 0) is None


def test_a_damaged_image_is_an_error_in_evaluation(folders):
    path = folders / "val" / "a2" / "w.jpg"
    path.write_bytes(b"no image")
    source = load(folders, "validation")
    source[0]
    with pytest.raises(UserError, match=r"a2/w.jpg cannot be decoded"):
        source[1]
    path.unlink()
    with pytest.raises(UserError, match=r"w.jpg cannot be read from .*No such file"):
        source[1]


def test_training_fails_if_no_image_can_be_read(folders):
    source = load(folders)
    (folders / "train").rename(folders / "away")
    with pytest.raises(UserError, match="cannot be read from"):
        source[0]


@pytest.fixture
def prepared(folders):
    output = folders / "data" / "images" / "1.0.0"
    prepare(train=str(folders / "train"), validation=str(folders / "val"), output=str(output), records_per_shard=3)
    return output


def test_a_tfds_data_set_is_found_up_to_two_levels_below_the_directory(folders, prepared, tmp_path):
    expected = load(folders)
    for directory in (prepared, prepared.parent, prepared.parent.parent):
        source = load(directory)
        assert len(source) == 6
        assert source.class_names == ("a10", "a2", "b")
        assert_equal(source[4], expected[4])
    (prepared / "copy").mkdir()
    second = prepared.with_name("2.0.0")
    second.mkdir()
    for name in ("dataset_info.json", "features.json"):
        (second / name).write_bytes((prepared / name).read_bytes())
    with pytest.raises(UserError, match=r"several data sets; choose one of .*images/1.0.0, .*images/2.0.0"):
        load(prepared.parent.parent)


def test_the_tfds_split_test_is_used_if_there_is_no_validation_split(prepared):
    info = prepared / "dataset_info.json"
    text = info.read_text()
    record = load(prepared, "validation")[0]
    for path in prepared.glob("*-validation.*"):
        path.rename(prepared / path.name.replace("-validation.", "-test."))
    info.write_text(text.replace('"validation"', '"test"'))
    assert_equal(load(prepared, "validation")[0], record)
    info.write_text(text.replace('"validation"', '"held_out"'))
    with pytest.raises(UserError, match="has the splits train, held_out: expected validation or test"):
        load(prepared, "validation")


def test_sources_can_be_pickled_and_read_by_threads(folders, prepared):
    for directory in (folders, prepared):
        source = load(directory)
        first = [source[index] for index in range(len(source))]
        copy = pickle.loads(pickle.dumps(source))
        assert copy.class_names == source.class_names
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            for index, record in enumerate(pool.map(lambda i, copy=copy: copy[i % 6], range(60))):
                assert_equal(record, first[index % 6])


def test_damaged_tfds_data_sets_are_rejected(prepared):
    info, features = prepared / "dataset_info.json", prepared / "features.json"
    text = info.read_text()
    info.write_text(text.replace("array_record", "tfrecord"))
    with pytest.raises(UserError, match="has the format tfrecord: expected array_record"):
        load(prepared)
    info.write_text("{")
    with pytest.raises(UserError, match="The metadata of the data set in .* cannot be read"):
        load(prepared)
    info.write_text(text)
    whole = features.read_text()
    features.write_text(whole.replace('"label"', '"class"'))
    with pytest.raises(UserError, match="has the features class, file_name, image: expected image and label"):
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


def test_directories_without_a_data_set_are_rejected(tmp_path):
    with pytest.raises(UserError, match="There is no directory nowhere"):
        load("nowhere")
    with pytest.raises(
        UserError, match="contains no data set: expected dataset_info.json and features.json .* got nothing"
    ):
        load(tmp_path)
    (tmp_path / "photographs").mkdir()
    with pytest.raises(UserError, match="train/<class> and val/<class> .* got photographs"):
        load(tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match="train contains no images in class folders"):
        load(tmp_path)
    with pytest.raises(UserError, match="no folder of validation images: expected val or validation"):
        load(tmp_path, "validation")


def test_the_error_for_an_unknown_name_mentions_the_directory():
    with pytest.raises(UserError, match=r"Unknown data set 'imagenet'; choose one of mnist5k.*config\.data\.directory"):
        load_source("imagenet", split="train")
