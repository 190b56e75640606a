"""Image files as cameras, web pages and other programs write them: decoded correctly, or refused in one sentence."""

import io
import os
import struct
import subprocess
import sys
import zlib

import cv2
import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms, PngImagePlugin, features

from dat_jax.data.image_files import DamagedFile
from dat_jax.data.images import check_image, decode_image, read_size
from dat_jax.data.segmentation_sources import SegmentationArraySource
from dat_jax.data.sources import load_source
from dat_jax.errors import UserError
from dat_jax.inference.image_files import find_images, read_image
from dat_jax.tasks.segmentation.task import SegmentationTask
from tests.helpers import tiny_segmentation
from tests.helpers.photographs import photographs

HEIGHT, WIDTH = 30, 40
PIXELS = photographs(width=WIDTH, height=HEIGHT)[0]
IMAGE = Image.fromarray(PIXELS)
GRAY = np.asarray(IMAGE.convert("L"))
GRAY_RGB = np.repeat(GRAY[..., None], 3, axis=-1)
PALETTE = IMAGE.quantize(64)
PALETTE_RGB = np.asarray(PALETTE.convert("RGB"))
BLACK_AND_WHITE = IMAGE.convert("1")
BLACK_AND_WHITE_RGB = np.asarray(BLACK_AND_WHITE.convert("RGB"))
OTHER = Image.fromarray(PIXELS[::-1].copy())  # second frame of animations
RGBA = Image.fromarray(np.dstack([PIXELS, np.zeros((HEIGHT, WIDTH), np.uint8)]))  # fully transparent
SHARP = {"quality": 95, "subsampling": 0}


def encode(image, kind, **options):
    file = io.BytesIO()
    image.copy().save(file, kind, **options)  # saving leaves settings in an image
    return file.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(values, *, depth=8, color=2, size=None, extra=b""):
    """A PNG with the samples of an array, uint8 or uint16 (H, W, ...)."""
    rows = b"".join(b"\0" + row.astype(f">u{depth // 8}").tobytes() for row in values)
    height, width = size or values.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def interlaced_png():
    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    rows = b"".join(b"\0" + row.tobytes() for x, y, dx, dy in passes for row in PIXELS[y::dy, x::dx])
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 8, 2, 0, 0, 1)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def ycck_jpeg():
    """A JPEG of Adobe's kind YCCK: CMYK without black, whose CMY are stored as YCbCr."""
    planes = np.asarray(Image.fromarray(255 - PIXELS).convert("YCbCr"))
    inverted = np.dstack([255 - planes, np.zeros((HEIGHT, WIDTH), np.uint8)])
    data = encode(Image.frombytes("CMYK", (WIDTH, HEIGHT), inverted.tobytes()), "JPEG", **SHARP)
    transform = data.index(b"Adobe") + 11
    return data[:transform] + b"\2" + data[transform + 1 :]


def cmyk_jpeg(*, adobe):
    data = encode(IMAGE.convert("CMYK"), "JPEG", **SHARP)
    start = data.index(b"\xff\xee")
    end = start + 2 + struct.unpack(">H", data[start + 2 : start + 4])[0]
    return data if adobe else data[:start] + data[end:]


def deep_tiff():
    """A TIFF in RGB with 16 bits per channel, which Pillow cannot write."""
    return cv2.imencode(".tif", PIXELS[..., ::-1].astype(np.uint16) * 257)[1].tobytes()


def rotated(kind, orientation=6):
    tags = Image.Exif()
    tags[ExifTags.Base.Orientation] = orientation
    return encode(IMAGE, kind, exif=tags, **({"lossless": True} if kind == "WEBP" else {}))


def animated(kind, **options):
    return encode(IMAGE, kind, save_all=True, append_images=[OTHER.copy()], **options)


PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
UPRIGHT = np.rot90(PIXELS, -1)

# Content of a file, the pixels expected, and the largest mean difference from them.
READABLE = {
    "progressive JPEG": (lambda: encode(IMAGE, "JPEG", progressive=True, **SHARP), PIXELS, 2.5),
    "CMYK JPEG of Adobe": (lambda: cmyk_jpeg(adobe=True), PIXELS, 1.5),
    "CMYK JPEG without Adobe's marker": (lambda: cmyk_jpeg(adobe=False), PIXELS, 1.5),
    "YCCK JPEG": (ycck_jpeg, PIXELS, 2.5),
    "RGB JPEG": (lambda: encode(IMAGE, "JPEG", keep_rgb=True, quality=95), PIXELS, 1.5),
    "gray JPEG": (lambda: encode(IMAGE.convert("L"), "JPEG", **SHARP), GRAY_RGB, 1.5),
    "JPEG with bytes after its end": (lambda: encode(IMAGE, "JPEG", **SHARP) + b"junk" * 99, PIXELS, 2.5),
    "JPEG with a color profile": (lambda: encode(IMAGE, "JPEG", icc_profile=PROFILE, **SHARP), PIXELS, 2.5),
    "JPEG with a damaged color profile": (lambda: encode(IMAGE, "JPEG", icc_profile=b"x" * 99, **SHARP), PIXELS, 2.5),
    "JPEG with junk for EXIF": (lambda: encode(IMAGE, "JPEG", exif=b"Exif\0\0junk", **SHARP), PIXELS, 2.5),
    "MPO of a phone": (lambda: animated("MPO", **SHARP), PIXELS, 2.5),
    "1 pixel wide": (lambda: encode(IMAGE.crop((0, 0, 1, HEIGHT)), "PNG"), PIXELS[:, :1], 0),
    "5000 x 2 pixels": (lambda: png(np.tile(PIXELS[:2], (1, 125, 1))), np.tile(PIXELS[:2], (1, 125, 1)), 0),
    "PNG with 1 bit": (lambda: encode(BLACK_AND_WHITE, "PNG"), BLACK_AND_WHITE_RGB, 0),
    "PNG in RGB with 16 bits": (lambda: png(PIXELS.astype(int) * 257, depth=16), PIXELS, 0),
    "interlaced PNG": (interlaced_png, PIXELS, 0),
    "gray PNG with alpha": (lambda: encode(IMAGE.convert("LA"), "PNG"), GRAY_RGB, 0),
    "transparent PNG": (lambda: encode(RGBA, "PNG"), PIXELS, 0),
    "PNG with a transparent color": (lambda: png(PIXELS, extra=chunk(b"tRNS", b"\0\1\0\2\0\3")), PIXELS, 0),
    "palette PNG with alpha": (lambda: encode(PALETTE, "PNG", transparency=b"\0\x80\xff"), PALETTE_RGB, 0),
    "PNG with gamma": (lambda: png(PIXELS, extra=chunk(b"gAMA", struct.pack(">I", 100000))), PIXELS, 0),
    "animated PNG": (lambda: animated("PNG"), PIXELS, 0),
    "animated GIF": (
        lambda: encode(PALETTE, "GIF", save_all=True, append_images=[OTHER.quantize(64)]),
        PALETTE_RGB,
        0,
    ),
    "TIFF of several pages": (lambda: animated("TIFF"), PIXELS, 0),
    "TIFF with LZW": (lambda: encode(IMAGE, "TIFF", compression="tiff_lzw"), PIXELS, 0),
    "TIFF with 1 bit": (lambda: encode(BLACK_AND_WHITE, "TIFF", compression="group4"), BLACK_AND_WHITE_RGB, 0),
    "TIFF in CMYK": (lambda: encode(IMAGE.convert("CMYK"), "TIFF"), PIXELS, 0),
    "TIFF in RGB with 16 bits": (deep_tiff, PIXELS, 0),
    "transparent WebP": (lambda: encode(RGBA, "WEBP", lossless=True, exact=True), PIXELS, 0),
    "animated WebP": (lambda: animated("WEBP", lossless=True), PIXELS, 0),
    "BMP with a palette": (lambda: encode(PALETTE, "BMP"), PALETTE_RGB, 0),
    "PPM with 16 bits": (
        lambda: b"P6 40 30 65535\n" + (PIXELS.astype(int) * 257).astype(">u2").tobytes(),
        PIXELS,
        0,
    ),
    "PGM with values up to 15": (lambda: b"P5 40 30 15\n" + (GRAY // 17).tobytes(), GRAY_RGB // 17 * 17, 0),
    "ICO": (lambda: encode(IMAGE, "ICO", sizes=[(WIDTH, HEIGHT)]), PIXELS, 0),
    "rotated PNG": (lambda: rotated("PNG"), UPRIGHT, 0),
    "rotated WebP": (lambda: rotated("WEBP"), UPRIGHT, 0),
    "rotated TIFF": (lambda: rotated("TIFF"), UPRIGHT, 0),
    "orientation 9": (lambda: rotated("PNG", 9), PIXELS, 0),
}


@pytest.mark.parametrize("kind", READABLE)
def test_readable_files_have_the_pixels_of_the_image(kind, tmp_path):
    make, expected, tolerance = READABLE[kind]
    data = make()
    pixels = decode_image(data, name="x")
    assert pixels.dtype == np.uint8
    assert pixels.shape == expected.shape
    assert np.abs(pixels.astype(int) - expected).mean() <= tolerance
    assert check_image(data) is None
    (tmp_path / "x").write_bytes(data)
    assert read_size(str(tmp_path / "x")) == expected.shape[:2]


JPEG = encode(IMAGE, "JPEG", **SHARP)
PNG = png(PIXELS)
DEPTH = "more than 8 bits per channel: convert it to 8 bits first"
UNKNOWN = r"the image format is not recognized\.$"
NOT_READABLE = {
    "empty file": (lambda: b"", DamagedFile, r"the file is empty\.$"),
    "text": (lambda: b"not an image\n", DamagedFile, UNKNOWN),
    "web page": (lambda: b"<!DOCTYPE html><html></html>", DamagedFile, UNKNOWN),
    "pointer of Git LFS": (lambda: b"version https://git-lfs.github.com/spec/v1\n", DamagedFile, UNKNOWN),
    "SVG": (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", DamagedFile, UNKNOWN),
    "HEIC": (lambda: b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200), DamagedFile, UNKNOWN),
    "bytes before a JPEG": (lambda: b"\n" + JPEG, DamagedFile, UNKNOWN),
    "truncated JPEG": (lambda: JPEG[: len(JPEG) // 2], DamagedFile, "truncated"),
    "JPEG without its last bytes": (lambda: JPEG[:-2], DamagedFile, "truncated"),
    "truncated PNG": (lambda: PNG[: len(PNG) // 2], DamagedFile, "truncated"),
    "PNG with a flipped byte": (
        lambda: PNG[:-20] + bytes([PNG[-20] ^ 255]) + PNG[-19:],
        DamagedFile,
        "broken data stream",
    ),
    "truncated TIFF": (lambda: encode(IMAGE, "TIFF")[:2000], DamagedFile, "truncated"),
    "truncated WebP": (lambda: encode(IMAGE, "WEBP")[:200], DamagedFile, "could not create decoder"),
    "truncated PPM": (lambda: encode(IMAGE, "PPM")[:2000], DamagedFile, "truncated"),
    "900 million pixels": (
        lambda: png(PIXELS, size=(30000, 30000)),
        DamagedFile,
        r"it has more than 89,478,485 pixels; resize it first\.$",
    ),
    "100 million pixels": (lambda: png(PIXELS, size=(5000, 20000)), DamagedFile, "more than 89,478,485 pixels"),
    "PNG of 0 x 0 pixels": (lambda: png(PIXELS, size=(0, 0)), DamagedFile, UNKNOWN),
    "gray PNG with 16 bits": (lambda: png(GRAY.astype(int) * 257, depth=16, color=0), UserError, DEPTH),
    "gray PNG with alpha and 16 bits": (
        lambda: png(np.dstack([GRAY, GRAY]).astype(int), depth=16, color=4),
        UserError,
        DEPTH,
    ),
    "PGM with 10 bits": (lambda: b"P5 40 30 1023\n" + GRAY.astype(">u2").tobytes(), UserError, DEPTH),
    "TIFF with 16 bits": (lambda: encode(Image.fromarray(GRAY.astype(np.uint16)), "TIFF"), UserError, DEPTH),
    "TIFF in floating point": (lambda: encode(Image.fromarray(GRAY.astype(np.float32)), "TIFF"), UserError, DEPTH),
    "TIFF in LAB": (
        lambda: encode(Image.frombytes("LAB", (WIDTH, HEIGHT), PIXELS.tobytes()), "TIFF"),
        UserError,
        "color mode LAB: convert it to RGB first",
    ),
    "PNG with 3 MB of text": (
        lambda: encode(IMAGE, "PNG", pnginfo=long_text()),
        DamagedFile,
        "Decompressed data too large",
    ),
}


def long_text():
    text = PngImagePlugin.PngInfo()
    text.add_text("workflow", "x" * 3_000_000, zip=True)
    return text


@pytest.mark.parametrize("kind", NOT_READABLE)
def test_other_files_are_refused_in_one_sentence(kind):
    make, error_type, message = NOT_READABLE[kind]
    data = make()
    with pytest.raises(UserError, match=message) as error:
        decode_image(data, name="x")
    assert type(error.value) is error_type
    assert str(error.value).startswith("The image x ")
    assert ".." not in str(error.value)
    assert "\n" not in str(error.value)
    assert check_image(data)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_avif_is_read_and_a_damaged_one_is_refused():
    data = encode(IMAGE, "AVIF", quality=90)
    assert np.abs(decode_image(data, name="x").astype(int) - PIXELS).mean() < 6
    start = data.index(b"mdat") + 8
    damaged = data[:start] + bytes(len(data) - start)
    with pytest.raises(DamagedFile, match="The image x cannot be decoded: Failed to decode"):
        decode_image(damaged, name="x")
    assert "Failed to decode" in check_image(damaged)


def test_a_damaged_exif_block_is_ignored_without_a_warning(tmp_path):
    file = tmp_path / "x.jpg"
    file.write_bytes(encode(IMAGE, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff", **SHARP))
    code = "import sys; from dat_jax.data.images import *; data = open(sys.argv[1], 'rb').read(); "
    code += "print(decode_image(data, name='x').shape, read_size(sys.argv[1]), check_image(data))"
    done = subprocess.run([sys.executable, "-c", code, file], capture_output=True, text=True, check=True)
    assert done.stdout == "(30, 40, 3) (30, 40) None\n"
    assert done.stderr == ""


@pytest.fixture
def folders(tmp_path):
    for path in ("train/a/1.jpg", "train/b/2.jpg", "val/a/3.jpg", "val/b/4.jpg"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(JPEG)
    return tmp_path


def load(folders, split="train"):
    return load_source("", split=split, directory=str(folders))


@pytest.mark.parametrize(("name", "data"), [("9.png", JPEG), ("9.JPG", JPEG), ("9.jpg", PNG), ("9.Tiff", PNG)])
def test_wrong_and_upper_case_suffixes_are_read_by_content(folders, name, data):
    (folders / "train/a" / name).write_bytes(data)
    (folders / "train/a/1.jpg").unlink()
    np.testing.assert_array_equal(load(folders)[0]["image"], decode_image(data, name="x"))


def test_symbolic_links_are_followed(folders):
    (folders / "elsewhere.jpg").write_bytes(PNG)
    (folders / "train/a/1.jpg").unlink()
    (folders / "train/a/1.jpg").symlink_to(folders / "elsewhere.jpg")
    np.testing.assert_array_equal(load(folders)[0]["image"], PIXELS)


def test_a_broken_symbolic_link_is_a_damaged_image(folders):
    for split in ("train", "val"):
        (folders / split / "a/0.jpg").symlink_to(folders / "missing.jpg")
    record = load(folders)[0]
    assert record["damaged"] == 1
    with pytest.raises(DamagedFile, match=r"0\.jpg cannot be read from .*: No such file or directory\.$"):
        load(folders, "validation")[0]
    assert [path.name for path in find_images([str(folders / "val/a")])] == ["3.jpg"]


def test_an_unreadable_file_is_a_damaged_image(folders, monkeypatch):
    source, target = load(folders, "validation"), str(folders / "val/a/3.jpg")

    def refuse(path, *arguments, **options):
        raise PermissionError(13, os.strerror(13), path)

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(DamagedFile, match=r"3\.jpg cannot be read from .*: Permission denied\.$"):
        source[0]
    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
    (path,) = find_images([target])
    with pytest.raises(UserError, match=r"3\.jpg cannot be read: Permission denied\.$"):
        read_image(path)


def test_a_folder_named_as_an_image_is_no_image(folders):
    (folders / "train/a/9.jpg").mkdir()
    assert len(load(folders)) == 2
    (folders / "photos").mkdir()
    (folders / "photos/9.jpg").mkdir()
    with pytest.raises(UserError, match=r"no image in .*photos: .* Its folders are not read: 9\.jpg"):
        find_images([str(folders / "photos")])


def test_an_image_that_is_too_thin_for_a_segmentor_is_refused_before_training():
    images = [np.zeros((64, 64, 3), np.uint8), np.zeros((4, 900, 3), np.uint8)]
    source = SegmentationArraySource(images, [image[..., 0] for image in images], ("a", "b"))
    config = tiny_segmentation.get_config()
    task = SegmentationTask(config, sources=(source, source))
    rows = list(range(config.eval.batch_size))
    for check in (task.check_data, lambda: task.make_eval_batches(source, rows=rows)):
        with pytest.raises(UserError, match=r"image 1 of 4 x 900 pixels is resized to 1 x 64 pixels: .* at least 32\."):
            check()
