"""Label files as annotation tools write them: read as they are meant, or refused in one sentence before training."""

import struct
import zlib

import numpy as np
import pytest
from PIL import ExifTags, Image

from dat_jax.data.segmentation_sources import load_segmentation_source
from dat_jax.errors import UserError
from dat_jax.tasks.segmentation.label_check import check_labels
from tests.helpers.logs import collect_logs
from tests.helpers.photographs import photographs

HEIGHT, WIDTH = 30, 40
PIXELS = photographs(width=WIDTH, height=HEIGHT)[0]
LABEL = np.zeros((HEIGHT, WIDTH), np.uint8)
LABEL[5:20, 5:30] = 1
LABEL[:3] = 255


def orientation(value):
    tags = Image.Exif()
    tags[ExifTags.Base.Orientation] = value
    return tags


def make_palette(values, colors):
    image = Image.frombytes("P", values.shape[::-1], values.tobytes())
    image.putpalette(np.zeros(3 * colors, np.uint8).tolist())
    return image


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def short_palette_png(values):
    """A palette PNG with 8 bits per pixel and two colors, whatever the values are."""
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 8, 3, 0, 0, 0)
    rows = zlib.compress(b"".join(b"\0" + row.tobytes() for row in values))
    chunks = (b"IHDR", header), (b"PLTE", bytes(6)), (b"IDAT", rows), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*entry) for entry in chunks)


class Folders:
    """A data set of one photograph and its label file."""

    def __init__(self, root):
        self.root, self.images, self.masks = root, root / "images/train", root / "masks/train"
        self.images.mkdir(parents=True)
        self.masks.mkdir(parents=True)
        (root / "classes.txt").write_text("background\nobject\n")
        Image.fromarray(PIXELS).save(self.images / "x.png")
        self.save(LABEL)

    def save(self, label, name="x.png", **options):
        """Write a label file, an image, an array or bytes, in place of x.png."""
        (self.masks / "x.png").unlink(missing_ok=True)
        if isinstance(label, bytes):
            (self.masks / name).write_bytes(label)
        else:
            image = label if isinstance(label, Image.Image) else Image.fromarray(label)
            image.save(self.masks / name, **options)

    def turn_photograph(self, value, pixels=PIXELS):
        Image.fromarray(pixels).save(self.images / "x.png", exif=orientation(value))

    def read(self, **options):
        """Read and check the data set as training does, and return its label map."""
        source = load_segmentation_source("", split="train", directory=str(self.root), **options)
        check_labels(source, split="training")
        record = source[0]
        assert record["image"].shape[:2] == record["label"].shape
        return record["label"]


@pytest.fixture
def folders(tmp_path):
    return Folders(tmp_path)


WITHOUT_IGNORED = np.where(LABEL == 255, 0, LABEL)
ONE_BASED = np.where(LABEL == 255, 0, LABEL + 1)
TWO_VALUES = np.where(LABEL == 1, 255, 0).astype(np.uint8)

# Label file, settings, and the label map expected.
READABLE = {
    "gray": (lambda folders: folders.save(LABEL), {}, LABEL),
    "palette": (lambda folders: folders.save(make_palette(LABEL, 256)), {}, LABEL),
    "palette with fewer colors than values": (lambda folders: folders.save(short_palette_png(LABEL)), {}, LABEL),
    "palette with 1 bit": (
        lambda folders: folders.save(make_palette(WITHOUT_IGNORED, 2), bits=1),
        {},
        WITHOUT_IGNORED,
    ),
    "palette with transparency": (
        lambda folders: folders.save(make_palette(LABEL, 256), transparency=0),
        {},
        LABEL,
    ),
    "1-based": (lambda folders: folders.save(ONE_BASED), {"zero_is_ignored": True}, LABEL),
    "0 and 255": (lambda folders: folders.save(TWO_VALUES), {"label_values": (0, 255)}, WITHOUT_IGNORED),
    "254 as a class": (
        lambda folders: folders.save(np.where(LABEL == 1, 254, LABEL)),
        {"label_values": (0, 254)},
        LABEL,
    ),
    "upper-case suffix": (lambda folders: folders.save(LABEL, "x.PNG"), {}, LABEL),
    "hidden files and Thumbs.db": (
        lambda folders: [(folders.masks / name).write_text("x") for name in ("._x.png", ".DS_Store", "Thumbs.db")],
        {},
        LABEL,
    ),
    "upright label of a rotated photograph": (
        lambda folders: [folders.turn_photograph(6), folders.save(np.rot90(LABEL, -1).copy())],
        {},
        np.rot90(LABEL, -1),
    ),
    "stored label of a rotated photograph": (
        lambda folders: folders.turn_photograph(6),
        {"apply_orientation": False},
        LABEL,
    ),
    "label with the tag of its photograph": (
        lambda folders: [folders.turn_photograph(3), folders.save(LABEL, exif=orientation(3))],
        {},
        LABEL[::-1, ::-1],
    ),
}


@pytest.mark.parametrize("kind", READABLE)
def test_readable_label_files_have_the_classes_that_are_meant(folders, kind):
    make, options, expected = READABLE[kind]
    make(folders)
    np.testing.assert_array_equal(folders.read(**options), expected)


def soft_mask():
    small = Image.fromarray(TWO_VALUES).resize((WIDTH // 2, HEIGHT // 2), Image.Resampling.BILINEAR)
    return small.resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR)


KIND = r"x\.png is {} per channel: expected a single channel with 8 bits that holds class indices\.$"
SIZE = r"x\.png has {} pixels: expected {}, the size of .*x\.png\.{}$"
EXCHANGED = r" The height and the width are exchanged\."
TURNED = r" Its orientation tag was applied: set config\.data\.apply_orientation=False if the annotations .*\."
UNLABELED = r"images/train have no label file with the same name in .*masks/train: {}\.$"

# Label file, settings, and the message expected.
REFUSED = {
    "colors": (
        lambda folders: folders.save(np.stack([LABEL] * 3, axis=-1)),
        {},
        KIND.format("RGB with 8 bits"),
    ),
    "colors with alpha": (
        lambda folders: folders.save(np.stack([LABEL] * 4, axis=-1)),
        {},
        KIND.format("RGBA with 8 bits"),
    ),
    "gray with alpha": (
        lambda folders: folders.save(Image.fromarray(LABEL).convert("LA")),
        {},
        KIND.format("gray and alpha with 8 bits"),
    ),
    "1 bit": (lambda folders: folders.save(Image.fromarray(LABEL == 1)), {}, KIND.format("gray with 1 bits")),
    "16 bits": (lambda folders: folders.save(LABEL.astype(np.uint16)), {}, KIND.format("gray with 16 bits")),
    "undeclared 0 and 255": (
        lambda folders: folders.save(TWO_VALUES),
        {},
        "Only the class background occurs .* set config.data.label_values=0,255",
    ),
    "undeclared 1-based": (lambda folders: folders.save(ONE_BASED), {}, r"has the value 2: expected 0\.\.1 for the 2"),
    "254": (
        lambda folders: folders.save(np.where(LABEL == 255, 254, LABEL)),
        {},
        r"has the value 254: expected 0\.\.1 for the 2 classes, or 255 for no class",
    ),
    "index without a color": (
        lambda folders: folders.save(short_palette_png(np.where(LABEL == 1, 200, LABEL))),
        {},
        "has the value 200",
    ),
    "soft edges": (lambda folders: folders.save(soft_mask()), {"label_values": (0, 255)}, "expected 0, 255 for the 2"),
    "one row less": (lambda folders: folders.save(LABEL[:-1]), {}, SIZE.format("29 x 40", "30 x 40", "")),
    "half the size": (
        lambda folders: folders.save(LABEL[::2, ::2].copy()),
        {},
        SIZE.format("15 x 20", "30 x 40", ""),
    ),
    "transposed": (lambda folders: folders.save(LABEL.T.copy()), {}, SIZE.format("40 x 30", "30 x 40", EXCHANGED)),
    "stored label of a rotated photograph": (
        lambda folders: folders.turn_photograph(6),
        {},
        SIZE.format("30 x 40", "40 x 30", TURNED),
    ),
    "upright label of stored pixels": (
        lambda folders: [folders.turn_photograph(6), folders.save(np.rot90(LABEL, -1).copy())],
        {"apply_orientation": False},
        r"Its orientation tag was not applied: set config\.data\.apply_orientation=True",
    ),
    "JPEG": (lambda folders: folders.save(LABEL, "x.jpg"), {}, r"contains label files that are not PNG: x\.jpg\.$"),
    "TIFF": (lambda folders: folders.save(LABEL, "x.tif"), {}, r"contains label files that are not PNG: x\.tif\.$"),
    "array of NumPy": (lambda folders: folders.save(b"x", "x.npy"), {}, UNLABELED.format(r"x\.png")),
    "JPEG named PNG": (
        lambda folders: folders.save(LABEL, format="JPEG"),
        {},
        r"x\.png is not a readable PNG: it does not start with a PNG header",
    ),
    "empty file": (lambda folders: folders.save(b""), {}, r"x\.png is not a readable PNG"),
    "text": (lambda folders: folders.save(b"0 0 1 1"), {}, r"x\.png is not a readable PNG"),
    "truncated": (
        lambda folders: folders.save((folders.masks / "x.png").read_bytes()[:60]),
        {},
        r"x\.png cannot be decoded: .*truncated",
    ),
    "nothing but 0": (lambda folders: folders.save(LABEL * 0), {}, "Only the class background occurs in the 1 "),
    "nothing but 255": (lambda folders: folders.save(LABEL * 0 + 255), {}, "No pixel of the 1 training label maps"),
    "missing": (lambda folders: (folders.masks / "x.png").unlink(), {}, UNLABELED.format(r"x\.png")),
    "without an image": (
        lambda folders: Image.fromarray(LABEL).save(folders.masks / "y.png"),
        {},
        r"masks/train have no image with the same name in .*images/train: y\.png\.$",
    ),
    "with a suffix of its own": (lambda folders: folders.save(LABEL, "x_mask.png"), {}, UNLABELED.format(r"x\.png")),
    "with two suffixes": (lambda folders: folders.save(LABEL, "x.png.png"), {}, UNLABELED.format(r"x\.png")),
    "other letter case": (lambda folders: folders.save(LABEL, "X.png"), {}, UNLABELED.format(r"x\.png")),
    "two images for one label": (
        lambda folders: Image.fromarray(PIXELS).save(folders.images / "x.jpg"),
        {},
        r"contains both x\.jpg and x\.png: expected names that differ before the suffix\.$",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_label_files_are_refused_in_one_sentence(folders, kind):
    make, options, message = REFUSED[kind]
    make(folders)
    with pytest.raises(UserError, match=message) as error:
        folders.read(**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("value", "square"), [(3, False), (6, True)])
def test_photographs_that_are_turned_without_a_change_of_size_are_reported(folders, value, square):
    pixels, label = (PIXELS[:, :HEIGHT], LABEL[:, :HEIGHT].copy()) if square else (PIXELS, LABEL)
    folders.turn_photograph(value, pixels)
    folders.save(label)
    with collect_logs() as messages:
        folders.read()
    (message,) = [text for text in messages if "orientation" in text]
    assert "1 of 1 training images are turned by their orientation tag" in message
    assert "config.data.apply_orientation=False" in message
    with collect_logs() as messages:
        folders.read(apply_orientation=False)
    assert not any("orientation" in text for text in messages)


NAMES = ("background", "object")
CLASS_FILES = {
    "byte order mark and CRLF": (b"\xef\xbb\xbfbackground\r\nobject\r\n", NAMES),
    "no newline at the end": (b"background\nobject", NAMES),
    "blank lines at the end": (b"background\nobject\n\n \n", NAMES),
    "spaces around": (b" background \nobject\t\n", NAMES),
    "CR only": (b"background\robject\r", NAMES),
    "blank line": (b"background\n\nobject\n", r"Line 2 of .*classes\.txt is empty: expected the name of a class"),
    "empty": (b"", r"Line 1 of .*classes\.txt is empty"),
    "duplicates": (b"object\nsky\nobject\n", r"classes\.txt has these classes more than once: object\.$"),
    "UTF-16": ("background\nobject\n".encode("utf-16"), r"classes\.txt cannot be read: 'utf-8' codec can't decode"),
    "Latin-1": (b"background\nstra\xdfe\n", r"classes\.txt cannot be read: 'utf-8' codec can't decode"),
    "one line with commas": (b"background,object\n", r"has the value 1: expected 0\.\.0 for the 1 classes"),
    "too many": ("".join(f"{k}\n" for k in range(256)).encode(), r"has 256 classes: expected at most 255"),
}


@pytest.mark.parametrize("kind", CLASS_FILES)
def test_files_of_class_names(folders, kind):
    content, expected = CLASS_FILES[kind]
    (folders.root / "classes.txt").write_bytes(content)
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            folders.read()
        return
    np.testing.assert_array_equal(folders.read(), LABEL)
    assert load_segmentation_source("", split="train", directory=str(folders.root)).class_names == expected
