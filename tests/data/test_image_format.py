"""Files of images with any number of channels, which are decoded as they are stored or refused by name."""

import importlib.util
import io

import cv2
import numpy as np
import pytest
import tifffile
from PIL import ExifTags, Image

from dat_jax.data.image_files import DamagedFile
from dat_jax.data.image_format import RGB, ImageFormat, decode
from dat_jax.data.images import decode_image, resize_as_pillow, resize_bicubic
from dat_jax.data.sources import load_source
from dat_jax.data.split import split_folder
from dat_jax.data.transforms import make_eval_transform, make_train_transform
from dat_jax.errors import UserError
from tests.helpers.photographs import photographs


def draw(channels, dtype, *, height=24, width=32):
    values = np.random.default_rng(channels).integers(0, np.iinfo(np.uint16).max, (height, width, channels))
    return (values >> 8 if dtype == "uint8" else values - 3e4 if dtype == "float32" else values).astype(dtype)


def encode_npy(image):
    file = io.BytesIO()
    np.save(file, image)
    return file.getvalue()


def encode_tiff(image, **options):
    file = io.BytesIO()
    tifffile.imwrite(file, image, **options)
    return file.getvalue()


def encode_pillow(image, kind, mode=None, **options):
    file = io.BytesIO()
    Image.fromarray(image, mode).save(file, kind, **options)
    return file.getvalue()


WRITERS = {
    "npy": encode_npy,
    "npy in other orders": lambda image: encode_npy(np.asfortranarray(image.astype(image.dtype.newbyteorder(">")))),
    "interleaved": lambda image: encode_tiff(image, photometric="minisblack", planarconfig="contig"),
    "tiled": lambda image: encode_tiff(
        image,
        photometric="minisblack",
        planarconfig="contig",
        compression="zlib",
        predictor=image.dtype.kind == "u",
        tile=(16, 16),
    ),
    "planes": lambda image: encode_tiff(
        np.moveaxis(image, 2, 0), photometric="minisblack", planarconfig="separate", bigtiff=True, byteorder=">"
    ),
    "pages": lambda image: encode_tiff(np.moveaxis(image, 2, 0), photometric="minisblack"),
    "without a color type": encode_tiff,
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("channels", [2, 5, 12])
def test_values_are_those_of_the_file(writer, dtype, channels):
    image = draw(channels, dtype)
    decoded = decode(WRITERS[writer](image), name="a", image_format=ImageFormat(channels, dtype))
    np.testing.assert_array_equal(decoded, image)
    assert (decoded.dtype.name, decoded.flags.c_contiguous) == (dtype, True)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_gray_images_have_one_channel(dtype):
    gray = draw(1, dtype)[:, :, 0]
    files = [encode_npy(gray), encode_npy(gray[:, :, None]), encode_tiff(gray), encode_pillow(gray, "TIFF")]
    if dtype != "float32":
        files.append(encode_pillow(gray, "PNG"))
        files.append(cv2.imencode(".png", gray)[1].tobytes())
    for data in files:
        decoded = decode(data, name="a", image_format=ImageFormat(1, dtype))
        np.testing.assert_array_equal(decoded, gray[:, :, None])


def test_files_of_pillow_are_not_converted():
    photograph = photographs(width=32, height=24)[0]
    gray = np.asarray(Image.fromarray(photograph).convert("L"))
    jpeg = encode_pillow(gray, "JPEG")
    expected = np.asarray(Image.open(io.BytesIO(jpeg)))[:, :, None]
    np.testing.assert_array_equal(decode(jpeg, name="a", image_format=ImageFormat(1)), expected)
    alpha = np.dstack([photograph, gray])
    np.testing.assert_array_equal(decode(encode_pillow(alpha, "PNG"), name="a", image_format=ImageFormat(4)), alpha)
    bilevel = encode_pillow(gray > 99, "PNG")
    np.testing.assert_array_equal(
        decode(bilevel, name="a", image_format=ImageFormat(1))[:, :, 0], 255 * (gray > 99).astype(np.uint8)
    )


def test_rgb_is_decoded_as_before_and_from_arrays():
    photograph = photographs(width=32, height=24)[0]
    for data in (encode_pillow(photograph, "JPEG"), encode_pillow(photograph, "TIFF")):
        np.testing.assert_array_equal(decode(data, name="a"), decode_image(data, name="a"))
    np.testing.assert_array_equal(decode(encode_npy(photograph), name="a"), photograph)
    gray = encode_pillow(photograph[:, :, 0], "PNG")
    np.testing.assert_array_equal(decode(gray, name="a"), np.repeat(photograph[:, :, :1], 3, axis=2))


@pytest.mark.parametrize("writer", ["interleaved", "tiled"])
def test_other_channels_than_rgb_are_refused_by_default(writer):
    with pytest.raises(UserError, match="^The image a has 12 channels of uint16: expected 3 channels of uint8") as info:
        decode(WRITERS[writer](draw(12, "uint16")), name="a")
    assert not isinstance(info.value, DamagedFile)


def test_damaged_rgb_files_are_damaged():
    for data in (b"", b"II*\0", encode_pillow(PHOTOGRAPH, "JPEG")[:300]):
        with pytest.raises(DamagedFile, match="^The image a cannot be decoded"):
            decode(data, name="a")


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_orientation_tags_are_applied(orientation):
    image, tags = draw(1, "uint8"), Image.Exif()
    tags[ExifTags.Base.Orientation] = orientation
    upright = {1: image, 3: image[::-1, ::-1], 6: np.rot90(image, -1)}[orientation]
    png = encode_pillow(image[:, :, 0], "PNG", exif=tags)
    tiff = encode_tiff(image[:, :, 0], extratags=[(274, "H", 1, orientation, True)])
    for data in (png, tiff):
        np.testing.assert_array_equal(decode(data, name="a", image_format=ImageFormat(1)), upright)
        stored = decode(data, name="a", image_format=ImageFormat(1), apply_orientation=False)
        np.testing.assert_array_equal(stored, image)


PHOTOGRAPH = photographs(width=32, height=24)[0]
WITH_NAN = np.where(np.arange(12) == 5, np.nan, draw(12, "float32")).astype(np.float32)
REFUSED = {
    "fewer channels": (WRITERS["interleaved"](draw(4, "uint8")), "has 4 channels of uint8: expected 12 channels"),
    "fewer planes": (WRITERS["planes"](draw(4, "uint8")), "has 4 channels of uint8: expected 12 channels"),
    "fewer pages": (WRITERS["pages"](draw(4, "uint8")), "has 4 pages of 24 x 32: expected a page for each of 12"),
    "another dtype": (encode_npy(draw(12, "uint16")), "has 12 channels of uint16: expected 12 channels of uint8"),
    "float64": (encode_npy(draw(12, "uint8") / 2), "has 12 channels of float64: expected 12 channels of uint8"),
    "RGB": (encode_pillow(PHOTOGRAPH, "PNG"), "has 3 channels of uint8: expected 12"),
    "gray": (encode_pillow(PHOTOGRAPH[:, :, 0], "PNG"), "has 1 channel of uint8: expected 12"),
    "a palette": (encode_pillow(PHOTOGRAPH[:, :, 0], "PNG", "P"), "has the color mode P: expected L, LA, RGB"),
    "a palette in a TIFF": (
        encode_tiff(PHOTOGRAPH[:, :, 0], photometric="palette", colormap=np.zeros((3, 256), np.uint16)),
        "has the TIFF color type PALETTE: expected MINISBLACK",
    ),
    "colors with 16 bits in a PNG": (
        cv2.imencode(".png", draw(3, "uint16"))[1].tobytes(),
        "has colors with 16 bits in a PNG file",
    ),
    "one axis": (encode_npy(np.zeros(12, np.uint8)), r"has the shape \(12,\): expected \(height, width, channels\)"),
    "several images": (encode_npy(np.zeros((2, 9, 9, 12), np.uint8)), r"has the shape \(2, 9, 9, 12\)"),
    "no pixels": (encode_npy(np.zeros((0, 9, 12), np.uint8)), r"has the shape \(0, 9, 12\)"),
    "pages that may be rows": (
        encode_tiff(np.zeros((12, 9, 12), np.uint8), photometric="minisblack"),
        "has 12 pages of 9 x 12: expected a page for each of 12 channels",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_images_are_refused_by_name(case):
    data, message = REFUSED[case]
    with pytest.raises(UserError, match=f"^The image dir/a.x .*{message}") as info:
        decode(data, name="dir/a.x", image_format=ImageFormat(12))
    assert not isinstance(info.value, DamagedFile)


def test_values_that_are_not_finite_are_refused():
    with pytest.raises(UserError, match="The image a has values that are not finite"):
        decode(encode_npy(WITH_NAN), name="a", image_format=ImageFormat(12, "float32"))


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.05, 0.2, 0.5])
def test_truncated_files_are_damaged(writer, fraction):
    data = WRITERS[writer](draw(12, "uint16"))
    with pytest.raises(DamagedFile, match="The image a cannot be decoded: "):
        decode(data[: int(fraction * len(data))], name="a", image_format=ImageFormat(12, "uint16"))


@pytest.mark.parametrize("writer", WRITERS)
def test_no_damage_gives_other_values_without_an_error(writer):
    """A file of several pages may end within the description of the last one."""
    image = draw(12, "uint16")
    data, image_format = WRITERS[writer](image), ImageFormat(12, "uint16")
    for size in range(1, len(data), len(data) // 97):
        try:
            decoded = decode(data[:size], name="a", image_format=image_format)
        except UserError:
            continue
        np.testing.assert_array_equal(decoded, image)


def test_large_files_are_refused_before_they_are_decoded(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 24 * 32 - 1)
    with pytest.raises(DamagedFile, match="The image a cannot be decoded: it has more than 767 pixels; resize it"):
        decode(WRITERS["interleaved"](draw(12, "uint8")), name="a", image_format=ImageFormat(12))


@pytest.mark.skipif(
    importlib.util.find_spec("imagecodecs") is not None, reason="imagecodecs is installed, so LZW is decoded"
)
def test_a_compression_that_another_package_reads_is_not_damage():
    """The file says that it has LZW; its bytes are not looked at."""
    data = encode_tiff(draw(12, "uint8"), photometric="minisblack", planarconfig="contig")
    lzw = tifffile.COMPRESSION.LZW
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        tag = file.pages.first.tags["Compression"]
    data = data[: tag.valueoffset] + int(lzw).to_bytes(2, "little") + data[tag.valueoffset + 2 :]
    with pytest.raises(UserError, match="has the compression LZW, which another package reads: pip install") as info:
        decode(data, name="a", image_format=ImageFormat(12))
    assert not isinstance(info.value, DamagedFile)


@pytest.fixture
def folders(tmp_path):
    """Two classes of images with 12 channels, in two formats."""
    for index in range(8):
        path = tmp_path / "all" / "ab"[index % 2] / f"{index}"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = draw(12, "uint16") // (1 + index)
        suffix, writer = ((".npy", "npy"), (".tif", "interleaved"))[index // 4]
        path.with_suffix(suffix).write_bytes(WRITERS[writer](image))
    assert split_folder(str(tmp_path / "all"), str(tmp_path / "data"), validation=0.25) == {"train": 6, "val": 2}
    return tmp_path / "data"


def test_class_folders_have_images_of_any_format(folders):
    source = load_source("", split="train", directory=str(folders), image_format=ImageFormat(12, "uint16"))
    assert source.class_names == ("a", "b")
    records = [source[index] for index in range(len(source))]
    assert {(record["image"].shape, record["image"].dtype.name) for record in records} == {((24, 32, 12), "uint16")}
    assert len({record["image"].max() for record in records}) == 6
    with pytest.raises(UserError, match="/train/a/.*has 12 channels of uint16: expected 4 channels of uint16"):
        load_source("", split="train", directory=str(folders), image_format=ImageFormat(4, "uint16"))[0]


def test_embedded_images_are_rgb():
    with pytest.raises(UserError, match="of the embedded data set mnist5k has 3 channels of uint8: expected 1 channel"):
        load_source("mnist5k", split="validation", image_format=ImageFormat(1))


@pytest.mark.parametrize("size", [(20, 13), (48, 40), (24, 24)])
def test_channels_are_resized_as_those_of_rgb_images(size):
    """For training by OpenCV, which takes at most four channels, and for evaluation by Pillow."""
    width, height = size
    photograph = photographs(width=32, height=28)[0]
    channels = photograph[:, :, np.arange(12) % 3]
    for resize in (resize_bicubic, resize_as_pillow):
        expected = resize(photograph, width=width, height=height)
        np.testing.assert_array_equal(resize(channels, width=width, height=height), expected[:, :, np.arange(12) % 3])
        gray = resize(photograph[:, :, :1], width=width, height=height)
        np.testing.assert_array_equal(gray, expected[:, :, :1])
        for dtype in ("uint16", "float32"):
            result = resize(channels[:, :, :5].astype(dtype), width=width, height=height)
            assert (result.dtype.name, result.shape) == (dtype, (height, width, 5))
            clipped = np.clip(np.rint(result), 0, 255)  # Pillow rounds twice if values have 8 bits
            assert np.abs(clipped - expected[:, :, [0, 1, 2, 0, 1]]).mean() < 0.3


def test_large_integers_are_clipped_and_not_wrapped():
    image = np.zeros((16, 16, 2), np.uint16)
    image[:, 8:] = 65535  # an edge, at which bicubic interpolation overshoots
    for resize in (resize_bicubic, resize_as_pillow):
        resized = resize(image, width=40, height=40).astype(int)
        assert (np.diff(resized[20, :18, 0]) >= -3000).all()
        assert resized[:, :15].max() < 20000
        assert resized[:, 25:].min() > 45000


@pytest.mark.parametrize(("channels", "dtype"), [(1, "uint8"), (4, "uint8"), (12, "uint16"), (12, "float32")])
def test_transforms_keep_channels_and_dtype(channels, dtype):
    image = draw(channels, dtype)
    evaluated = make_eval_transform(resize=20, image_size=16)({"image": image})["image"]
    expected = resize_as_pillow(image, width=20, height=20)[2:18, 2:18]
    np.testing.assert_array_equal(evaluated, expected)
    settings = dict(rand_augment_count=0, rand_augment_magnitude=9.0, rand_augment_std=0.5)
    whole = dict(min_crop_area=1.0, max_crop_aspect=1.0, flip_probability=1.0)
    square = image[:, :24]
    flipped = make_train_transform(image_size=24, **whole, **settings)({"image": square}, np.random.default_rng(0))
    np.testing.assert_array_equal(flipped["image"], square[:, ::-1])
    cropped = make_train_transform(image_size=16, **{**whole, "min_crop_area": 0.1}, **settings)
    results = [cropped({"image": image}, np.random.default_rng(seed))["image"] for seed in (0, 0, 1)]
    assert {(result.shape, result.dtype.name) for result in results} == {((16, 16, channels), dtype)}
    np.testing.assert_array_equal(results[0], results[1])
    assert (results[0] != results[2]).any()


def test_formats_are_described_in_words():
    assert (str(RGB), str(ImageFormat(1, "uint16"))) == ("3 channels of uint8", "1 channel of uint16")
